"""Where these kernels run, and how matrix memories launch them.

They run on CUDA devices, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), for tests. A launch
through Triton binds every argument by name, hashes its properties and asks the driver about every pointer;
that takes longer than a small kernel. So a compiled kernel is kept under what it depends on (dtypes, which
arguments are None, constants, launch parameters) and launched with bare addresses.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import _disable_current_modes

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"

_kept: dict[tuple[Any, ...], Any] = {}


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up. Triton's own, which kernels can call as well, takes 2 µs."""
    return -(-n // d)


def power_of_2(n: int) -> int:
    """The least power of two that is not less than n; instead of Triton's for the same reason."""
    return 1 << max(0, n - 1).bit_length()


class Recording(threading.local):
    """What happens to this thread's launches: a `tape.Tape` may record them, or they wait to be compiled."""

    tape: Any = None
    waiting: list[tuple[Any, ...]] | None = None


recording = Recording()


class Piece:
    """A part of a buffer: what kernels need to know of a tensor, made in a tenth of the time."""

    __slots__ = ("address", "buffer", "dtype")

    def __init__(self, address: int, dtype: torch.dtype, buffer: torch.Tensor) -> None:
        self.address, self.dtype, self.buffer = address, dtype, buffer

    def data_ptr(self) -> int:
        return self.address


def scratch(device: torch.device, *wanted: tuple[Any, ...] | None) -> list[Any]:
    """Room that only kernels see, in one allocation: for each (dtype, *shape) something to launch with."""
    if DEVICE == "cpu":
        return [None if w is None else torch.empty(w[1:], dtype=w[0], device=device) for w in wanted]
    sizes = [0 if w is None else cdiv(math.prod(w[1:]) * w[0].itemsize, 256) * 256 for w in wanted]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
    at, pieces = buffer.data_ptr(), []
    for w, size in zip(wanted, sizes, strict=True):
        pieces.append(None if w is None else Piece(at, w[0], buffer))
        at += size
    return pieces


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: tuple[Any, ...],
    warps: int, stages: int = 1, wgmma: bool = True, registers: int | None = None,
) -> None:  # fmt: skip
    """kernel[grid](*args, *constants): args are tensors, integers or None, constants known when compiling.

    `wgmma` says whether it may use Hopper's own matrix instructions, `registers` how many a thread may take.
    """
    tape = recording.tape
    if DEVICE == "cpu":
        with _disable_current_modes():  # a tape is not for what the interpreter does
            kernel[grid](*args, *constants)
        if tape is not None:
            tape.launched(lambda stream, values: kernel[grid](*values, *constants), args)
        return
    values = [x if x is None or type(x) is int else x.data_ptr() for x in args]
    kinds = [kind(x, value) for x, value in zip(args, values)]
    device = torch._C._cuda_getDevice()
    key = (id(kernel), device, constants, warps, stages, wgmma, registers, *kinds)
    kept, blocks = _kept.get(key), (*grid, 1, 1)[:3]
    if recording.waiting is not None:
        if kept is None:
            recording.waiting.append((kernel, grid, args, constants, warps, stages, wgmma, registers))
        return
    if kept is None:
        with instructions(wgmma):
            compiled = kernel[grid](*args, *constants, num_warps=warps, num_stages=stages, maxnreg=registers)
        call, before = _kept[key] = direct(compiled)
    else:
        call, before = kept
        call(*blocks, torch._C._cuda_getCurrentRawStream(device), *before, *values, *constants)
    if tape is not None:
        tape.launched(lambda stream, values: call(*blocks, stream, *before, *values, *constants), args)


def compile_together(*calls: tuple[Callable[..., Any], tuple[Any, ...]]) -> None:
    """Compile and load what these functions of these arguments would launch, all at once; nothing runs."""
    if DEVICE == "cpu":
        return
    recording.waiting = waiting = []
    try:
        for function, args in calls:
            function(*args)
    finally:
        recording.waiting = None
    for fast in (True, False):  # one setting of `instructions` at a time
        some = [w for w in waiting if w[6] == fast]
        if len(some) > 1:
            threads = min(len(some), os.cpu_count() or 1)
            with instructions(fast), ThreadPoolExecutor(threads) as pool:
                with triton.AsyncCompileMode(pool):
                    found = [
                        kernel.run(
                            *given, *constants, grid=grid, warmup=True,
                            num_warps=warps, num_stages=stages, maxnreg=registers,
                        )
                        for kernel, grid, given, constants, warps, stages, _, registers in some
                    ]  # fmt: skip
                once = {id(one): one for one in found}.values()
                list(pool.map(load, once, repeat(torch._C._cuda_getDevice())))


def load(compiled: Any, device: int) -> None:
    """What Triton leaves to the first launch: a C compiler takes a third of a second for each kernel's."""
    torch.cuda.set_device(device)  # of this thread
    getattr(compiled, "result", lambda: compiled)().run  # noqa: B018


def direct(compiled: Any) -> tuple[Any, tuple[Any, ...]]:
    """What to call to launch, and what goes between the stream and the kernel's own arguments."""
    run = compiled.run
    hooks = (compiled.packed_metadata, None, None, None)
    if triton.__version__.startswith("3.6.") and run.global_scratch_size == run.profile_scratch_size == 0:
        options = (run.launch_cooperative_grid, run.launch_pdl, None, None)  # no scratch memory
        return run.launch, (compiled.function, *options, *hooks)
    return run, (compiled.function, *hooks)


def kind(x: Any, value: int | None) -> Any:
    """What of an argument a kernel is compiled for: its type, and whether 16 divides it or its address."""
    if x is None:
        return None
    if type(x) is int:
        return x == 1, x % 16 == 0, x >> 31 == 0
    return x.dtype if value & 15 == 0 else (x.dtype,)


@contextmanager
def instructions(wgmma: bool) -> Iterator[None]:
    """Inside, a kernel that is compiled uses Hopper's own matrix instructions only if `wgmma`.

    Triton reads the variable when it compiles and keeps it in the key of its cache on disk, but not in that
    of the process: launches that differ in it must differ in a compile-time argument or in `num_stages` too.
    """
    before = os.environ.get("DISABLE_MMA_V3")
    if not wgmma:
        os.environ["DISABLE_MMA_V3"] = "1"
    try:
        yield
    finally:
        if not wgmma:
            os.environ.pop("DISABLE_MMA_V3")
            if before is not None:
                os.environ["DISABLE_MMA_V3"] = before
