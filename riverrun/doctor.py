"""Compares every implementation of every op with its float64 definition, on the chip and compilers at hand.

    verdicts = run("cuda")        # or "cpu"; None takes a GPU if there is one. `riverrun doctor` prints them

Forward and all gradients (of y and the final state, to inputs and initial state), with resets, on random
and on extreme inputs. They are rounded to the dtype under test first, so what is measured is the
implementation's own

    error = ‖found - definition‖ / scale        the worst of y, each state tensor and each gradient

where the scale is ‖definition‖. Some gradients are what is left when larger terms cancel, and their scale is
that of the terms: one smaller than a rounding of the largest gradient, on whose scale it is zero; that of a
running maximum, on which y does not depend: the exponents' scale if that is larger; and that of softmax's s:
the scale of Σ v dv. The bound is derived for every case and tensor from the definition alone:

    bound = 8 (u + d + κ)
    u   one rounding of the result to its dtype: 2^-8 bfloat16, 2^-11 float16, 2^-24 float32, 2^-53 float64
    d   the error of the definition itself when it is run in float32 (float64: 0)
    κ   the change of the float64 definition when what an implementation may round is changed by a rounding:
        every input by u of float32 (float64); the operands of matrix products (keys, values, states, upstream
        gradients; never an exponent or a gate) by u of the dtype; and log-decays by u of float32 times their
        running sum to the next step over a chunk of 64, since that sum is what a parallel form stores

8 is for roundings that follow one another: operands, scores, solved systems, written states, in both
directions. A wrong index, sign, factor or a missing term changes results by much more than that, and
float32 shows it if half precision does not. Verdicts are remembered (kernels/verdicts.py), and ops refuse
what failed until it passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from riverrun.kernels import verdicts as store
from riverrun.ops import OPS, Op
from riverrun.recurrences.fold import fold
from riverrun.state import leaves, tree_map
from riverrun.testing import inputs
from riverrun.testing.inputs import Case, Size
from riverrun.testing.tolerance import UNIT

SAFETY, CHUNK = 8.0, 64
OPERANDS = {
    "outer": "qkvu", "mlstm": "qkv", "delta": "qkv", "dplr": "qkvab",
    "elman": "R", "lstm": "R", "gru": "R", "slstm": "R",
}  # fmt: skip  # arguments that enter matrix products
# log-decays, which parallel forms sum
DECAYS = {"outer": "g", "mlstm": "f", "delta": "g", "dplr": "g", "fastweight": "gm"}
# the state's running maximum and its exponents
MAXIMA = {"mlstm": (2, "i"), "softmax": (0, "s"), "slstm": (3, "x")}
DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),  # Numba widens both halves alike
    "cuda": (torch.float32, torch.bfloat16, torch.float16),
}
ODD = Size(K=19, V=21, D=37, N=5, P=11)
EVEN = Size(T=200, H=2, G=1, K=64, V=64, D=128, N=16, P=64)
LONG = Size(B=1, T=5000, H=1, V=4, D=8)
LONG_OPS = ("diagonal", "selective", "softmax")  # whose kernels cut time in pieces when it is long


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
    jobs: int = 1,
) -> list[Verdict]:
    """Examine `impls` (all) of `ops` (all) in `dtypes` on `device`; `progress` is given every verdict.

    Most of the time goes into compiling: on a GPU, `jobs` processes take an op and a dtype each.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind = torch.device(device).type
    if kind not in DTYPES:
        raise ValueError(f"the doctor examines {sorted(DTYPES)}, not '{device}'")
    unknown = set(ops or ()) - set(OPS)
    if unknown:
        raise ValueError(f"no ops {sorted(unknown)}; there are {sorted(OPS)}")
    if jobs < 1:
        raise ValueError(f"jobs must be at least 1, not {jobs}")
    patients = [(name, dtype) for name in ops or OPS for dtype in dtypes or DTYPES[kind]]
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
    patients: list[tuple[str, torch.dtype]], device: str, impls: list[str] | None, jobs: int
) -> Iterator[Verdict]:
    """The verdicts of all patients, in their order."""
    look = partial(examine, device=device, only=impls)
    if jobs == 1:
        for name, dtype in patients:
            yield from look(name, dtype)
        return
    # a process that has used a GPU cannot be forked
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as processes:
        for verdicts in processes.map(look, *zip(*patients, strict=True)):
            yield from verdicts


def cases(op: str, dtype: torch.dtype, device: str) -> Iterable[tuple[str, Case]]:
    """The cases an implementation must pass, each with a name."""
    half = dtype.itemsize == 2
    sizes = [(ODD, False), (ODD, True), (replace(ODD, T=1), False)]
    if torch.device(device).type == "cuda":
        sizes += [(EVEN, False), (EVEN, True)] + ([(LONG, False)] if op in LONG_OPS and not half else [])
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
                continue
            times[impl].append(seconds)
            for what, x in found.items():
                error, bound = distance(x.cpu(), truth[what], scales[what]), bounds[what]
                if impl not in worst or error * worst[impl][1] > worst[impl][0] * bound:
                    worst[impl] = error, bound, f"{what} in {which}"
    return [verdict(name, i, dtype, worst.get(i), cannot.get(i, ""), times[i]) for i in impls]


def verdict(op: str, impl: str, dtype: torch.dtype, worst: Any, why: str, times: list[float]) -> Verdict:
    first, best = (times[0], 1e3 * min(times)) if times else (0.0, 0.0)
    kind = str(dtype).removeprefix("torch.")
    if worst is None:
        return Verdict(op, impl, kind, 0.0, 0.0, "cannot", why, first, best)
    error, bound, where = worst
    return Verdict(op, impl, kind, error, bound, "pass" if error <= bound else "fail", where, first, best)


def definition(op: Op, case: Case, dtype: torch.dtype):
    """Results and gradients of the definition in float64 on the CPU; scale and bound of errors in each."""
    threads, wide = torch.get_num_threads(), torch.promote_types(dtype, torch.float32)
    torch.set_num_threads(1)  # more of them cost tensors this small more than they give
    exact = case.to(torch.float64)
    truth, _ = outcome(op, exact, None)
    # gradients are linear in the upstream ones, made smaller where float16 could not hold the result
    largest = max(float(x.abs().max()) for what, x in truth.items() if what.startswith("gradient"))
    gain = 2.0 ** -max(0, math.frexp(largest / 2**14)[1]) if dtype == torch.float16 else 1.0
    truth = {what: gain * x if what.startswith("gradient") else x for what, x in truth.items()}
    rounding = UNIT[dtype] if op.name in OPERANDS else 0.0
    moved, _ = outcome(op, perturbed(exact, dtype), None, rounding, gain)
    single = truth if wide == torch.float64 else outcome(op, case.to(wide), None, gain=gain)[0]
    torch.set_num_threads(threads)
    scales = {what: norm(x) for what, x in truth.items()}
    largest = max(scale for what, scale in scales.items() if what.startswith("gradient"))
    if op.name in MAXIMA:
        index, exponents = MAXIMA[op.name]
        maximum = f"gradient of state {index}"
        if maximum in scales:
            scales[maximum] = max(scales[maximum], scales[f"gradient of {exponents}"])
    if op.name == "softmax":
        terms = (exact.args[1] * truth["gradient of v"]).sum(-1)  # type: ignore[operator]
        scales["gradient of s"] = max(scales["gradient of s"], norm(terms))
    for what, scale in scales.items():
        if what.startswith("gradient") and scale < UNIT[wide] * largest:
            scales[what] = largest
    bounds = {}
    for what, x in truth.items():
        lost, change = distance(single[what], x, scales[what]), distance(moved[what], x, scales[what])
        # where the definition itself overflows in float32, an implementation gets no allowance for it
        bounds[what] = SAFETY * (UNIT[dtype] + (lost if lost < float("inf") else 0.0) + change)
    return truth, scales, bounds, gain


def perturbed(case: Case, dtype: torch.dtype) -> Case:
    """The case with its inputs changed as an implementation for `dtype` may round them."""
    wide, generator = UNIT[torch.promote_types(dtype, torch.float32)], torch.Generator().manual_seed(1)

    def change(x: Tensor, size: Any) -> Tensor:
        return x + size * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)

    args: list[Tensor | None] = []
    for name, x in zip(OPS[case.op].signature.names, case.args, strict=True):
        if x is None:
            args.append(None)
        elif name in DECAYS.get(case.op, ()):
            sums = torch.cat([part.abs().cumsum(1) for part in x.split(CHUNK, 1)], 1)
            sums = torch.maximum(sums, torch.cat([sums[:, 1:], sums[:, -1:]], 1))
            args.append(change(x, wide * sums).clamp(max=0))
        else:
            args.append(change(x, x * (UNIT[dtype] if name in OPERANDS.get(case.op, ()) else wide)))
    state_rounding = UNIT[dtype] if case.op in OPERANDS else wide
    axes = OPS[case.op].recurrence.state  # one number a sequence, "B", is a count and exact
    state = tree_map(lambda s, a: s if a == "B" else change(s, state_rounding * s), case.state, axes)
    return replace(case, args=tuple(args), state=state)


def outcome(
    op: Op, case: Case, impl: str | None, rounding: float = 0.0, gain: float = 1.0
) -> tuple[dict[str, Tensor], float]:
    """y, the final state and all gradients by name, and the seconds it took. `impl` None is the plain fold.

    Upstream gradients are drawn from a fixed seed and rounded to y's dtype; `rounding` changes them further,
    `gain` scales them.
    """
    args = tuple(None if x is None else x.detach().requires_grad_() for x in case.args)
    state = tree_map(lambda x: x.detach().requires_grad_(), case.state)
    start = time.perf_counter()
    if impl is None:
        y, last = fold(op.recurrence, args, state, case.reset)
    else:
        with store.ignored():
            y, last = op(*args, state=state, reset=case.reset, impl=impl)
    outputs = [x for x in (y, *leaves(last)) if x.requires_grad]  # a state may hold a count
    like = next(x.dtype for x in args if x is not None)
    upstream = [gain * weights(x, i, like, rounding) for i, x in enumerate(outputs)]
    wanted = {f"gradient of {n}": x for n, x in zip(op.signature.names, args, strict=True) if x is not None}
    wanted |= {f"gradient of state {i}": x for i, x in enumerate(leaves(state))}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    if y.device.type == "cuda":
        torch.cuda.synchronize(y.device)
    seconds = time.perf_counter() - start
    found = {"y": y, **{f"state {i}": x for i, x in enumerate(leaves(last))}}
    for (what, x), g in zip(wanted.items(), gradients, strict=True):
        found[what] = torch.zeros_like(x) if g is None else g
    return {what: x.detach() for what, x in found.items()}, seconds


def weights(x: Tensor, seed: int, dtype: torch.dtype, rounding: float) -> Tensor:
    """An upstream gradient for x: numbers that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(x.shape, generator=generator).bfloat16().double()
    if rounding:
        w = w * (1 + rounding * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))
    return w.to(x.device, x.dtype)


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.to(torch.complex128 if x.is_complex() else torch.float64)))


def distance(found: Tensor, true: Tensor, scale: float) -> float:
    """‖found - true‖ / scale; infinite where found is not finite, absolute where the scale is zero."""
    if found.shape != true.shape or not torch.isfinite(found).all():
        return float("inf")
    return norm(found.to(true.dtype) - true) / (scale or 1.0)
