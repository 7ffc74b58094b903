"""Every op on a CPU: compiled kernel, parallel PyTorch and step by step, in one run.

    python benchmarks/cpu_ops.py [--threads 2] [--only delta,outer] [--seconds 2]

Prints a table and, unless --only is given, writes benchmarks/results/cpu_ops.md. float32. Times are the best
of several repetitions taken in turns. The sequential form is timed on a sixteenth of T and multiplied by 16.
Memory is the growth of a process's peak over forward and backward; the first call (forward and backward of a
small case) is timed in a process of its own, cold with an empty cache directory and warm with the one the
cold call filled.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from timing import best, peak_mib, provenance

from riverrun import ops
from riverrun.state import leaves
from riverrun.testing.inputs import Size, make

SHORTER = 16
MATRIX = [Size(B=4, T=1024, G=4, H=4, K=64, V=64), Size(B=1, T=8192, G=8, H=8, K=64, V=64)]
CHANNELS = [Size(B=4, T=1024, H=4, V=64, D=256, N=16, P=64), Size(B=1, T=8192, H=8, V=64, D=512, N=16, P=64)]
ROWS = [
    *((op, form, MATRIX) for op in ("outer", "delta") for form in ("none", "head", "key")),
    ("outer", "key bonus", MATRIX),
    ("mlstm", "head", MATRIX),
    ("dplr", "key", MATRIX),
    ("diagonal", "real", CHANNELS),
    ("selective", "real", CHANNELS),
    ("softmax", "head", CHANNELS),
    ("short_conv", "bias", CHANNELS),
    *((op, "bias", CHANNELS) for op in ("elman", "lstm", "gru", "slstm")),
]
HEAD = (
    "| op | form | (B, T, H, K or P, D) | impl | forward ms | ratio | forward + backward ms | ratio | MiB |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def arguments(op: str, form: str, size: Size) -> list[torch.Tensor | None]:
    args = make(op, form, size, state=False, reset=False).to(torch.float32).args
    return [x if x is None else x.requires_grad_() for x in args]


def forward(op: str, impl: str, args: list[torch.Tensor | None]) -> None:
    with torch.no_grad():
        ops.OPS[op](*args, impl=impl)


def both(op: str, impl: str, args: list[torch.Tensor | None]) -> None:
    y, state = ops.OPS[op](*args, impl=impl)
    loss = y.sum() + sum(x.sum() for x in leaves(state))
    torch.autograd.grad(loss, [x for x in args if x is not None])


def child(op: str, form: str, impl: str, shape: str) -> None:
    """In a process of its own: seconds of the first call, and MiB that both passes of `shape` add."""
    small = arguments(op, form, Size(B=1, T=8, G=1, H=1, K=16, V=16, P=16, D=16))
    start = time.perf_counter()
    both(op, impl, small)
    first, mib = time.perf_counter() - start, 0.0
    if shape:
        args = arguments(op, form, Size(**json.loads(shape)))
        before = peak_mib()
        both(op, impl, args)
        mib = peak_mib() - before
    print(json.dumps([first, mib]))


def ask(op: str, form: str, impl: str, size: Size | None, cache: str | None = None) -> tuple[float, float]:
    shape = json.dumps(vars(size)) if size else ""
    environment = {**os.environ, **({"NUMBA_CACHE_DIR": cache} if cache else {})}
    command = [
        sys.executable,
        __file__,
        "--threads",
        str(torch.get_num_threads()),
        "--child",
        op,
        form,
        impl,
        shape,
    ]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    first, mib = json.loads(answer.stdout.splitlines()[-1])
    return first, mib


def rows(op: str, form: str, size: Size, seconds: float) -> list[str]:
    impls, args = ops.OPS[op].impls, arguments(op, form, size)
    short = arguments(op, form, replace(size, T=size.T // SHORTER))
    times = {}
    for name, call in (("forward", forward), ("both", both)):
        calls = {i: partial(call, op, i, short if i == "sequential" else args) for i in impls if i != "gpu"}
        times[name] = best(calls, seconds)
        times[name]["sequential"] *= SHORTER
    table = []
    for impl in times["forward"]:
        columns = []
        for name in times:
            columns += [f"{times[name][impl] * 1e3:.2f}", f"{times[name][impl] / times[name]['cpu']:.1f}"]
        mib = "" if impl == "sequential" else f"{ask(op, form, impl, size)[1]:.0f}"
        shape = (size.B, size.T, size.H, size.K if (op, form, MATRIX) in ROWS else size.P, size.D)
        table.append(f"| {op} | {form} | {shape} | {impl} | {' | '.join(columns)} | {mib} |")
    return table


def first_calls(names: list[str]) -> list[str]:
    table = ["| op | first call, cold s | from disk cache s |", "|---|---|---|"]
    for op in names:
        form = next(f for o, f, _ in ROWS if o == op)
        with tempfile.TemporaryDirectory() as cache:
            cold, warm = (ask(op, form, "cpu", None, cache)[0] for _ in range(2))
        table.append(f"| {op} | {cold:.1f} | {warm:.2f} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="ops, separated by commas")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each group of timings")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.child:
        child(*given.child)
        return
    wanted = given.only.split(",") if given.only else list(dict.fromkeys(op for op, _, _ in ROWS))
    lines = ["# Ops on a CPU", "", provenance(), "", __doc__.split("\n\n")[2], "", HEAD]
    print("\n".join(lines), flush=True)
    for op, form, sizes in ROWS:
        for size in sizes if op in wanted else ():
            new = rows(op, form, size, given.seconds)
            print("\n".join(new), flush=True)
            lines += new
    new = ["", *first_calls(wanted)]
    print("\n".join(new))
    if not given.only:
        (Path(__file__).parent / "results" / "cpu_ops.md").write_text("\n".join(lines + new) + "\n")


if __name__ == "__main__":
    main()
