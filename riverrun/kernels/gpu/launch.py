"""Where these kernels run, and how matrix memories launch them.

They run on CUDA devices, or on the CPU under Triton's interpreter (TRITON_INTERPRET=1), for tests. A launch
through Triton binds every argument by name, hashes its properties and asks the driver about every pointer;
that takes longer than a small kernel. So a compiled kernel is kept under what it depends on (dtypes, which
arguments are None, constants, launch parameters) and launched with bare addresses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"

_kept: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: tuple[Any, ...],
    warps: int, stages: int = 1, wgmma: bool = True,
) -> None:  # fmt: skip
    """kernel[grid](*args, *constants): args are tensors, integers or None, constants known when compiling.

    `wgmma` says whether it may use Hopper's own matrix instructions.
    """
    values, kinds, aligned = [], [], True
    for x in args:
        if x is None or type(x) is int:
            values.append(x)
            kinds.append(None if x is None else (x == 1, x % 16 == 0, x >> 31 == 0))  # as Triton specialises
        else:
            address = x.data_ptr()
            aligned = aligned and address % 16 == 0
            values.append(address)
            kinds.append(x.dtype)
    if DEVICE == "cpu":
        kernel[grid](*args, *constants, num_warps=warps, num_stages=stages)
        return
    device = torch.cuda.current_device()
    key = (id(kernel), device, constants, warps, stages, wgmma, *kinds)
    kept = _kept.get(key) if aligned else None
    if kept is None:
        with instructions(wgmma):
            compiled = kernel[grid](*args, *constants, num_warps=warps, num_stages=stages)
        if aligned:
            _kept[key] = compiled
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    kept.run(x, y, z, stream, kept.function, kept.packed_metadata, None, None, None, *values, *constants)


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
