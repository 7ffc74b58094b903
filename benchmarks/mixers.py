"""Every mixer of the table at one width: time, decoding, memory, parameters, and its cost beside its op.

    python benchmarks/mixers.py                        writes benchmarks/results/mixers.md
    python benchmarks/mixers.py --quick                a quarter of the length, less often; writes nothing
    python benchmarks/mixers.py --only mamba,s5        prints these rows, writes nothing

Width 256, otherwise as built by name, one sequence of 1,024 steps, float32. Forward + backward gives
gradients to the input and all parameters, in ms per 1,000 tokens. The op is what the mixer stands on, run
forward + backward on what one call of the mixer gave it; the ratio is that of the two, timed in turns.
Decoding goes on one step at a time from the state after the sequence, in steps a second. Bytes are those of
one sequence's state. Each row is measured in a process of its own, on one thread, on all, and on a GPU if
there is one; for a GPU all rows are run before, as many at once as there are cores, so that kernels are on
disk. On a CPU a ratio above 3 needs a reason in the mixer's row of the table; on a GPU these sizes take as
long as their launches. A row that fails is named at the end, and the exit code is then 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from timing import alone, best, provenance
from torch import Tensor

from riverrun import ops
from riverrun.mixers import MIXERS, build, row
from riverrun.state import nbytes

WIDTH, STEPS, DECODED, ALLOWED = 256, 1024, 20, 3.0
RESULTS = Path(__file__).parent / "results" / "mixers.md"
COLUMNS = (
    "mixer", "op", "parameters", "state, bytes", "forward + backward, ms", "its op, ms", "ratio",
    "decoding, steps / s",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n|---|---|{'---:|' * (len(COLUMNS) - 2)}"


@dataclass(frozen=True)
class Setting:
    """Where and how long one row is measured."""

    threads: int
    device: str = "cpu"
    steps: int = STEPS
    seconds: float = 2.0

    @property
    def title(self) -> str:
        if self.device != "cpu":  # asked in another process: this one forks, which CUDA once in use forbids
            return alone(1, torch.cuda.get_device_name)
        return f"{self.threads} thread{'s' if self.threads > 1 else ''}"


@dataclass(frozen=True)
class Found:
    """One row; times in seconds for the whole sequence, and for DECODED steps."""

    parameters: int
    state: int | None
    both: float
    op: float | None
    decoding: float | None


def recorded(op: str, call: Callable[[], Any]) -> list[tuple[ops.Op, tuple, dict[str, Any]]]:
    """What `call` asks of the op of this name."""
    found, real = [], ops.Op.__call__

    def noted(self: ops.Op, *args: Any, **named: Any) -> Any:
        if self.name == op:
            found.append((self, args, named))
        return real(self, *args, **named)

    ops.Op.__call__ = noted
    try:
        call()
    finally:
        ops.Op.__call__ = real
    return found


def fresh(x: Any) -> Any:
    """A tensor of numbers, also inside tuples, as one of its own with a gradient; anything else as it is."""
    if isinstance(x, tuple):
        return tuple(fresh(part) for part in x)
    if not isinstance(x, Tensor) or not (x.is_floating_point() or x.is_complex()):
        return x
    return x.detach().clone().requires_grad_()


def differentiate(y: Tensor, wanted: list[Tensor]) -> None:
    torch.autograd.grad(y, [w for w in wanted if w.requires_grad], torch.ones_like(y), allow_unused=True)


def measure(name: str, setting: Setting) -> Found | str:
    """One row, or what went wrong."""
    try:
        return measured(name, setting)
    except Exception as error:  # whatever it is, the other rows are worth having
        return f"{type(error).__name__}: {error}".splitlines()[0]


def measured(name: str, setting: Setting) -> Found:
    torch.manual_seed(0)
    mixer, about = build(name, WIDTH).to(setting.device), row(name)
    x = torch.randn(1, setting.steps, WIDTH, device=setting.device, requires_grad=True)
    wanted = [x, *mixer.parameters()]
    finish = torch.cuda.synchronize if setting.device != "cpu" else lambda: None
    calls = recorded(about.op, lambda: mixer(x)) if about.op else []
    inputs = [(op, fresh(args), {k: fresh(v) for k, v in named.items()}) for op, args, named in calls]

    def both() -> None:
        differentiate(mixer(x)[0], wanted)
        finish()

    def op_alone() -> None:
        for op, args, named in inputs:
            y, _ = op(*args, **named)
            differentiate(y, [a for a in (*args, *named.values()) if isinstance(a, Tensor)])
        finish()

    taken = best({"both": both} | ({"op": op_alone} if inputs else {}), setting.seconds)
    with torch.no_grad():
        state = mixer(x)[1] if about.state != "none" else None
        decoding = None
        if about.causal and state is not None:
            decoding = best({"decoding": partial(decode, mixer, x, state, finish)}, setting.seconds / 2)
    size = None if state is None else nbytes(state)
    count = sum(p.numel() for p in mixer.parameters())
    return Found(count, size, taken["both"], taken.get("op"), decoding and decoding["decoding"])


@torch.no_grad()
def decode(mixer: torch.nn.Module, x: Tensor, state: Any, finish: Callable[[], None]) -> None:
    """DECODED steps, one after another."""
    for t in range(DECODED):
        _, state = mixer(x[:, t : t + 1], state)
    finish()


def compiled(names: list[str], setting: Setting) -> None:
    """Run every row once, many at a time. What fails here fails again where it is reported."""
    context, short = get_context("spawn"), replace(setting, seconds=0.0)
    with ProcessPoolExecutor(os.cpu_count(), context, torch.set_num_threads, (1,)) as pool:
        wait([pool.submit(measure, name, short) for name in names])


def line(name: str, found: Found, setting: Setting) -> str:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    per = 1e6 / setting.steps
    ratio = None if found.op is None else found.both / found.op
    flag = " ⚠" if unexplained(name, found, setting) else ""
    speed = None if found.decoding is None else DECODED / found.decoding
    columns = (
        name, row(name).op, f"{found.parameters:,}", number(found.state, ","), f"{found.both * per:.2f}",
        number(found.op and found.op * per, ".2f"), number(ratio, ".1f") + flag, number(speed, ",.0f"),
    )  # fmt: skip
    return f"| {' | '.join(columns)} |"


def unexplained(name: str, found: Found, setting: Setting) -> bool:
    if setting.device != "cpu" or found.op is None:
        return False
    return found.both / found.op > ALLOWED and not row(name).slow


def report(names: list[str], settings: list[Setting], failed: list[str]) -> Iterator[str]:
    yield "# Mixers\n"
    yield f"{provenance()}\n\n{(__doc__ or '').split(chr(10) * 2)[2].strip()}"
    flagged: dict[str, None] = {}
    for setting in settings:
        if setting.device != "cpu":
            compiled(names, setting)
        yield f"\n## {setting.title}\n\n{HEAD}"
        for name in names:
            try:
                found = alone(setting.threads, measure, name, setting)
            except SystemExit as crash:
                found = str(crash)
            if isinstance(found, str):
                failed.append(f"{name} ({setting.device}, {setting.threads} threads): {found}")
                yield f"| {name} | failed: {found} | | | | | | |"
            else:
                flagged |= {name: None} if unexplained(name, found, setting) else {}
                yield line(name, found, setting)
    reasons = [f"- {name}: {row(name).slow}" for name in names if row(name).slow]
    if reasons:
        yield "\nWhy some take more than three times as long as their op:\n\n" + "\n".join(reasons)
    if flagged:
        yield f"\n⚠ above {ALLOWED:.0f} without a reason in the table: {', '.join(flagged)}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="mixers, separated by commas")
    parser.add_argument("--threads", type=int, nargs="*", help="one and all, unless given")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="both, where there is a GPU, unless given")
    parser.add_argument("--quick", action="store_true")
    given = parser.parse_args()
    names = given.only.split(",") if given.only else list(MIXERS)
    size = dict(steps=STEPS // 4, seconds=0.2) if given.quick else {}
    settings = [Setting(n, **size) for n in given.threads or sorted({1, os.cpu_count() or 1})]
    if given.device == "cuda":
        settings = []
    if given.device != "cpu" and torch.cuda.device_count():  # which leaves the driver to the rows' processes
        settings.append(Setting(1, "cuda", **size))
    lines, failed = [], []
    for text in report([name for name in names if row(name)], settings, failed):
        print(text, flush=True)
        lines.append(text)
    if not (given.only or given.quick or given.threads or given.device):
        RESULTS.write_text("\n".join(lines) + "\n")
        print(f"\nwritten to {RESULTS}")
    if failed:
        sys.exit("failed:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
