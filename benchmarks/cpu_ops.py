"""Every op on a CPU: compiled kernel, parallel PyTorch and step by step, in one run.

    python benchmarks/cpu_ops.py [--threads 2] [--only delta,outer] [--seconds 1]

Prints a table and, unless --only is given, writes benchmarks/results/cpu_ops.md. float32. Times are the best
of several repetitions taken in turns; in all of them what is freed stays with the process (glibc's mallopt:
no trimming, no mmap). The sequential form is timed on a sixteenth of T and multiplied by 16.
Memory is the growth of a process's peak over forward and backward. The first call, forward and backward of a
small case, is timed in a process of its own for each set of kernels, cold with an empty cache directory and
warm with the one the cold call filled.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from timing import alone, best, peak_mib, provenance, resident_mib

from riverrun import ops
from riverrun.state import leaves
from riverrun.testing.inputs import Size, make

SHORTER = 16
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of mallopt; see keep_memory
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
# an op and form of each set of kernels that compile together
FAMILIES = {
    ("outer", "head"): "outer, a decay a head or none",
    ("delta", "head"): "delta, the same",
    ("outer", "key"): "outer, a decay a key",
    ("delta", "key"): "delta, a decay a key",
    ("dplr", "key"): "dplr",
    ("mlstm", "head"): "mlstm",
    ("diagonal", "real"): "diagonal",
    ("selective", "real"): "selective",
    ("softmax", "head"): "softmax",
    ("short_conv", "bias"): "short_conv",
    ("lstm", "bias"): "elman, lstm, gru, slstm",
}
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


def first_call(op: str, form: str) -> None:
    """Print the seconds of a first call, forward and backward of a small case, in this process."""
    small = arguments(op, form, Size(B=1, T=8, G=1, H=1, K=16, V=16, P=16, D=16))
    start = time.perf_counter()
    both(op, "cpu", small)
    print(time.perf_counter() - start)


def memory(op: str, form: str, impl: str, size: Size) -> float:
    """MiB that forward and backward add to what their arguments and a small first call take."""
    both(op, impl, arguments(op, form, replace(size, T=32)))
    args = arguments(op, form, size)
    gc.collect()
    before = resident_mib()
    both(op, impl, args)
    return max(0.0, peak_mib() - before)


def keep_memory() -> None:
    """No memory goes back to the system, whose page faults are up to two thirds of a kernel's time: in whose
    turn they fall depends on what ran before."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(TRIM_THRESHOLD, -1)
        mallopt(MMAP_MAX, 0)


def timings(op: str, form: str, size: Size, seconds: float) -> dict[str, dict[str, float]]:
    """Seconds of "forward" and "both" for every implementation, taken in turns."""
    keep_memory()
    args, short = arguments(op, form, size), arguments(op, form, replace(size, T=size.T // SHORTER))
    times = {}
    for name, call in (("forward", forward), ("both", both)):
        impls = [i for i in ops.OPS[op].impls if i != "gpu"]
        calls = {i: partial(call, op, i, short if i == "sequential" else args) for i in impls}
        times[name] = best(calls, seconds)
        times[name]["sequential"] *= SHORTER
    return times


def rows(op: str, form: str, size: Size, seconds: float) -> list[str]:
    threads, table = torch.get_num_threads(), []
    times = alone(threads, timings, op, form, size, seconds)
    for impl in times["forward"]:
        columns = []
        for found in times.values():
            columns += [f"{found[impl] * 1e3:.2f}", f"{found[impl] / found['cpu']:.1f}"]
        mib = "" if impl == "sequential" else f"{alone(threads, memory, op, form, impl, size):.0f}"
        shape = (size.B, size.T, size.H, size.K if (op, form, MATRIX) in ROWS else size.P, size.D)
        table.append(f"| {op} | {form} | {shape} | {impl} | {' | '.join(columns)} | {mib} |")
    return table


def first_calls(names: list[str]) -> list[str]:
    table = ["| op | first call, cold s | from disk cache s |", "|---|---|---|"]
    for (op, form), family in FAMILIES.items():
        if op not in names:
            continue
        command = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "--first", op, form]
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache}
            cold, warm = (
                float(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
                for _ in range(2)
            )
        table.append(f"| {family} | {cold:.1f} | {warm:.2f} |")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--only", help="ops, separated by commas")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each group of timings")
    parser.add_argument("--first", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.first:
        first_call(*given.first)
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
    print("\n".join(new), flush=True)
    if not given.only:
        (Path(__file__).parent / "results" / "cpu_ops.md").write_text("\n".join(lines + new) + "\n")


if __name__ == "__main__":
    main()
