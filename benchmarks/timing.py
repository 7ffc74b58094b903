"""What benchmarks share: interleaved timing, peak memory, and a line that says where numbers come from."""

from __future__ import annotations

import gc
import importlib.metadata
import multiprocessing
import platform
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import torch

from riverrun import __version__

LONG = 5  # seconds, of a run that is not repeated


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
        return _received(mine, measure, args)
    finally:
        process.join()


@dataclass
class Found:
    """The fastest of several runs in a process, and the growth of its peak of memory, in MiB."""

    seconds: float
    mebibytes: float


def _serve(
    pipe: Any, threads: int, prepare: Callable[..., Callable[[], object]], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    run = prepare(*args)
    gc.collect()
    before = resident_mib()
    pipe.send(None)
    while True:
        seconds, found, begun = pipe.recv(), list[float](), time.perf_counter()
        while len(found) < 2 or time.perf_counter() - begun < seconds:
            start = time.perf_counter()
            run()
            found.append(time.perf_counter() - start)
            if found[0] > LONG:
                break
        pipe.send(Found(min(found), max(0.0, peak_mib() - before)))


def in_turns(*measured: tuple[Any, ...], seconds: float, turns: int = 4) -> list[Found]:
    """Run each (threads, prepare, *args) in a process of its own, in turns, for `seconds` in all.

    `prepare(*args)` returns what is run, after it has run once. A machine is not equally fast at all times:
    in turns it is so for all alike. A run that takes more than `LONG` seconds is not repeated.
    """
    context, children = multiprocessing.get_context("fork"), []
    found: list[Found | None] = [None] * len(measured)
    try:
        for threads, prepare, *args in measured:
            mine, its = context.Pipe()
            process = context.Process(target=_serve, args=(its, threads, prepare, tuple(args)))
            children.append((mine, process, prepare, args))
            process.start()
            its.close()
            _received(mine, prepare, args)
        for _ in range(turns):
            for i, (pipe, _, prepare, args) in enumerate(children):
                before = found[i]
                if before is None or before.seconds <= LONG:
                    pipe.send(seconds / turns)
                    now = _received(pipe, prepare, args)
                    least = now.seconds if before is None else min(before.seconds, now.seconds)
                    found[i] = Found(least, now.mebibytes)
    finally:
        for _, process, _, _ in children:
            process.terminate()
            process.join()
    return [x for x in found if x is not None]


def _received(pipe: Any, measure: Callable[..., Any], args: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        raise SystemExit(f"{measure.__name__}{tuple(args)} failed; see above") from None


def provenance() -> str:
    """Date, machine, versions, threads and the command of this run."""
    others = (f"{n} {importlib.metadata.version(n)}" for n in ("torch", "numba", "llvmlite"))
    versions = " · ".join((f"riverrun {__version__}", *others))
    return (
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC · {llvm.get_host_cpu_name()}, {platform.system()} · "
        f"Python {platform.python_version()} · {versions} · {torch.get_num_threads()} threads\n\n"
        f"    python {' '.join(sys.argv)}"
    )
