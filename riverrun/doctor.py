"""Compares every implementation of every op with its float64 definition, on the chip and compilers at hand.

    verdicts = run("cuda")        # or "cpu"; None takes a GPU if there is one. `riverrun doctor` prints them

Forward and all gradients (of y and the final state, to inputs and initial state), with resets, on random
and on extreme inputs, at T = 1, at odd and at even sizes; `testing/exactness.py` says what error and bound
are. Verdicts are remembered (kernels/verdicts.py), and ops refuse what failed until it passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import torch

from riverrun.config import nearest
from riverrun.kernels import verdicts as store
from riverrun.ops import OPS
from riverrun.testing import inputs
from riverrun.testing.exactness import definition, distance, outcome
from riverrun.testing.inputs import Case, Size

DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),  # Numba widens both halves alike
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
ODD = Size(K=19, V=21, D=37, N=5, P=11)
EVEN = Size(T=200, H=2, G=1, K=64, V=64, D=128, N=16, P=64)
LONG = Size(B=1, T=5000, H=1, V=4, D=8)
LONG_OPS = ("diagonal", "selective", "softmax")  # whose kernels cut time in pieces when it is long
WIDE = Size(T=40, H=2, P=160)
WIDE_OPS = ("elman", "lstm", "gru", "slstm")  # whose heads many programs share when they are wide


@dataclass(frozen=True)
class Verdict:
    """The worst case of one implementation in one dtype. verdict: "pass", "fail" or "cannot" (it refused)."""

    op: str
    impl: str
    dtype: str
    error: float
    bound: float
    verdict: str
    where: str  # the worst case and its worst tensor, or why it could not run
    first_s: float  # the first call and its gradients, with compilation
    best_ms: float  # the fastest call and its gradients

    @property
    def line(self) -> str:
        errors = f"error {self.error:.1e}, bound {self.bound:.1e}"
        return f"{self.op} {self.impl} {self.dtype}: {errors}, {self.where}"


def run(
    device: str | None = None,
    ops: Iterable[str] | None = None,
    dtypes: Iterable[torch.dtype] | None = None,
    impls: Iterable[str] | None = None,
    remember: bool = True,
    progress: Callable[[Verdict], None] | None = None,
    jobs: int | None = None,
) -> list[Verdict]:
    """Examine `impls` (all) of `ops` (all) in `dtypes` on `device`; `progress` is given every verdict.

    With `jobs`, as many processes at a time take an op and a dtype each: most of the time goes into
    compiling, and what one kernel does to a GPU the others do not see. None examines in this process.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(device).type
    if kind not in DTYPES:
        raise ValueError(f"the doctor examines {sorted(DTYPES)}, not '{device}'")
    ops = [*(ops or OPS)]
    if unknown := [name for name in ops if name not in OPS]:
        raise ValueError(f"no op '{unknown[0]}'; {nearest(unknown[0], OPS)}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    patients = [(name, dtype) for name in ops for dtype in dtypes or DTYPES[kind]]
    found = []
    for verdict in examined(patients, device, None if impls is None else list(impls), jobs):
        found.append(verdict)
        if progress:
            progress(verdict)
    if remember:
        failed = {f"{v.op} {v.impl} {v.dtype}": v.line if v.verdict == "fail" else None for v in found}
        store.record(device, failed)
    return found


def examined(
    patients: list[tuple[str, torch.dtype]], device: str, impls: list[str] | None, jobs: int | None
) -> Iterator[Verdict]:
    """The verdicts of all patients, in their order."""
    if jobs is None:
        for name, dtype in patients:
            yield from examine(name, dtype, device, impls)
        return
    with ThreadPoolExecutor(jobs) as threads:
        for verdicts in threads.map(partial(apart, device=device, impls=impls), patients):
            yield from verdicts


def apart(patient: tuple[str, torch.dtype], device: str, impls: list[str] | None) -> list[Verdict]:
    """`examine` in a process of its own. One that ends without verdicts is a finding about the kernel."""
    context = get_context("spawn")  # a process that has used a GPU cannot be forked
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(its, *patient, device, impls))
    process.start()
    its.close()
    try:
        return mine.recv()
    except EOFError:
        process.join()
        name, dtype = patient
        kernel = "cpu" if torch.device(device).type == "cpu" else "gpu"
        why = f"its process ended with code {process.exitcode}"
        return [verdict(name, kernel, dtype, (float("inf"), 0.0, why), "", [])]
    finally:
        process.join()


def _send(pipe: Connection, name: str, dtype: torch.dtype, device: str, impls: list[str] | None) -> None:
    pipe.send(examine(name, dtype, device, impls))


def cases(op: str, dtype: torch.dtype, device: str) -> Iterable[tuple[str, Case]]:
    """The cases an implementation must pass, each with a name."""
    half = dtype.itemsize == 2
    sizes = [(ODD, False), (ODD, True), (replace(ODD, T=1), False)]
    if torch.device(device).type == "cuda":
        sizes += [(EVEN, False), (EVEN, True)] + ([(LONG, False)] if op in LONG_OPS and not half else [])
        sizes += [(WIDE, False)] if op in WIDE_OPS else []
    for size, extreme in sizes:
        for case in inputs.cases(op, size, seed=size.T, extreme=extreme):
            if not (half and case.form == "complex"):
                name = f"{'extreme' if extreme else 'random'} '{case.form}' T={size.T} K={size.K} D={size.D}"
                yield name, case.to(dtype)


def examine(name: str, dtype: torch.dtype, device: str, only: Iterable[str] | None = None) -> list[Verdict]:
    """One verdict for every implementation of an op (those in `only`) in one dtype."""
    op = OPS[name]
    impls = [i for i in op.impls if only is None or i in only]
    worst: dict[str, tuple[float, float, str]] = {}
    cannot: dict[str, str] = {}
    times: dict[str, list[float]] = {impl: [] for impl in impls}
    for which, case in cases(name, dtype, device):
        truth, scales, bounds, gain = definition(op, case, dtype)
        moved = case.to(dtype, device)
        for impl in impls:
            with store.ignored():
                why = op.refusal(impl, moved.args)
            if why:
                cannot[impl] = why
                continue
            try:
                found, seconds = outcome(op, moved, impl, gain=gain)
            except Exception as problem:  # a compiler that gives up is a finding, whatever it raises
                worst[impl] = float("inf"), 0.0, f"{which}: {type(problem).__name__}: {str(problem)[:200]}"
                if gone(device):
                    return after_a_loss(name, dtype, impl, impls, worst[impl])
                continue
            times[impl].append(seconds)
            for what, x in found.items():
                error, bound = distance(x.cpu(), truth[what], scales[what]), bounds[what]
                if impl not in worst or error * worst[impl][1] > worst[impl][0] * bound:
                    worst[impl] = error, bound, f"{what} in {which}"
    return [verdict(name, i, dtype, worst.get(i), cannot.get(i, ""), times[i]) for i in impls]


def gone(device: str) -> bool:
    """Whether the GPU answers this process no more, as after a kernel that wrote outside its memory."""
    try:
        torch.ones(1, device=device).item()
    except RuntimeError:
        return True
    return False


def after_a_loss(name: str, dtype: torch.dtype, guilty: str, impls: list[str], worst: Any) -> list[Verdict]:
    """The verdict on what broke the device, and that there is none on the others."""
    why = f"not examined to the end: {guilty} broke the device"
    return [
        verdict(name, i, dtype, worst if i == guilty else None, "" if i == guilty else why, []) for i in impls
    ]


def verdict(op: str, impl: str, dtype: torch.dtype, worst: Any, why: str, times: list[float]) -> Verdict:
    first, best = (times[0], 1e3 * min(times)) if times else (0.0, 0.0)
    kind = str(dtype).removeprefix("torch.")
    if worst is None:
        return Verdict(op, impl, kind, 0.0, 0.0, "cannot", why, first, best)
    error, bound, where = worst
    return Verdict(op, impl, kind, error, bound, "pass" if error <= bound else "fail", where, first, best)
