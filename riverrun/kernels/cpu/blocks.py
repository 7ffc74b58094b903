"""How kernels cut work into tasks: from the shapes alone, so that sums come out the same on any number of
threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numba
import torch
from torch import Tensor

from .team import divided
from .threads import FASTMATH, array, in_threads

TASKS = 8  # wanted at the least, for a few threads to share evenly
LANES = 16  # channels below which a task leaves vector registers empty
PIECE = 4096  # sums a task
SMALL = 16384  # numbers that are dealt with sooner than a second thread wakes up

# a kernel does tasks first, first + step, ... of a number it knows from its arguments
kernel = numba.njit(fastmath=FASTMATH, cache=True, error_model="numpy", nogil=True, no_cfunc_wrapper=True)


def spread(f: Callable[..., None], tasks: int, work: int, *args: Any) -> None:
    """Call the kernel f on threads so that each of `tasks` is done once; `work` counts the numbers handled.

    Tensors go in as arrays.
    """
    given = (array(x) if x is None or isinstance(x, Tensor) else x for x in args)
    in_threads(f, tasks if work > SMALL else 1, *given)


def block_size(width: int, rows: int, limit: int) -> int:
    """Channels a task where `rows` independent rows of `width` channels are to be shared out: a multiple of
    LANES."""
    size = width * rows // TASKS // LANES * LANES
    return min(max(size, LANES), limit)


def rows(x: Tensor) -> tuple[Tensor, int]:
    """x (..., D) as (rows, R), and the column at which it begins in them: a part of a wider tensor, such as
    `split` gives, is read where it stands. Only what does not lie in rows is copied."""
    if x.is_contiguous():
        return x.view(-1, x.shape[-1]), 0
    x = x.reshape(-1, x.shape[-1])
    if x.is_contiguous():
        return x, 0
    (count, width), stride, start = x.shape, x.stride(0), x.storage_offset()
    at = start % stride if stride else 0
    inside = start - at + count * stride <= x.untyped_storage().nbytes() // x.element_size()
    if x.stride(1) == 1 and at + width <= stride and inside:
        return x.as_strided((count, stride), (stride, 1), start - at), at
    return x.contiguous(), 0


def same_dtype(*xs: Tensor | None) -> list[Tensor | None]:
    """All in the widest dtype among them: a kernel is compiled for one dtype at a time."""
    if len({x.dtype for x in xs if x is not None}) == 1:
        return list(xs)
    dtype = reduce(torch.promote_types, [x.dtype for x in xs if x is not None])
    return [x if x is None else x.to(dtype) for x in xs]


@kernel
def _add_parts(first, step, parts, out):
    if divided(first, step):
        return
    P, n = parts.shape
    for piece in range(first, (n + PIECE - 1) // PIECE, step):
        lo, hi = piece * PIECE, min(piece * PIECE + PIECE, n)
        for i in range(lo, hi):
            out[i] = parts[0, i]
        for p in range(1, P):
            for i in range(lo, hi):
                out[i] += parts[p, i]


def add_parts(parts: Tensor) -> Tensor:
    """Σ_p parts (p, ...), in the order of p."""
    out = parts.new_empty(parts.shape[1:])
    spread(_add_parts, -(-out.numel() // PIECE), parts.numel(), parts.flatten(1), out.view(-1))
    return out
