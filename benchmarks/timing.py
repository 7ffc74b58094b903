"""What benchmarks share: interleaved timing, peak memory, and a line that says where numbers come from."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime

import llvmlite.binding as llvm
import torch


def best(
    calls: dict[str, Callable[[], object]], seconds: float = 2.0, repetitions: int = 30
) -> dict[str, float]:
    """Seconds of the fastest of several calls of each, taken in turns so that a busy machine slows all alike.

    Every call is made once untimed; then in turns until `repetitions` or, all together, `seconds` are
    reached.
    """
    for call in calls.values():
        call()
    found = dict.fromkeys(calls, float("inf"))
    end = time.perf_counter() + seconds
    for repetition in range(repetitions):
        if repetition > 2 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            found[name] = min(found[name], time.perf_counter() - start)
    return found


def peak_mib() -> float:
    """The most memory this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def provenance() -> str:
    """Date, machine, versions, threads and the command of this run."""
    versions = " · ".join(
        f"{n} {importlib.metadata.version(n)}" for n in ("riverrun", "torch", "numba", "llvmlite")
    )
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · {llvm.get_host_cpu_name()}, {platform.system()} · "
        f"Python {platform.python_version()} · {versions} · {torch.get_num_threads()} threads\n\n"
        f"    python {' '.join(sys.argv)}"
    )
