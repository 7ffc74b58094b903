"""What benchmarks share: interleaved timing, peak memory, and a line that says where numbers come from."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from riverrun import __version__


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


def resident_mib() -> float:
    """What this process has in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _child(pipe: Any, threads: int, measure: Callable[..., Any], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    pipe.send(measure(*args))


def alone(threads: int, measure: Callable[..., Any], *args: Any) -> Any:
    """Run in a process of its own, which starts with everything imported and nothing computed."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe()
    process = context.Process(target=_child, args=(its, threads, measure, args))
    process.start()
    its.close()
    try:
        return mine.recv()
    except EOFError:
        raise SystemExit(f"{measure.__name__}{args} on {threads} threads failed; see above") from None
    finally:
        process.join()


def provenance() -> str:
    """Date, machine, versions, threads and the command of this run."""
    others = (f"{n} {importlib.metadata.version(n)}" for n in ("torch", "numba", "llvmlite"))
    versions = " · ".join((f"riverrun {__version__}", *others))
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · {llvm.get_host_cpu_name()}, {platform.system()} · "
        f"Python {platform.python_version()} · {versions} · {torch.get_num_threads()} threads\n\n"
        f"    python {' '.join(sys.argv)}"
    )
