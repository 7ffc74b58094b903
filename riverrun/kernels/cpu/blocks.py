"""How kernels cut work into tasks: from the shapes alone, so that sums come out the same on any number of
threads."""

from __future__ import annotations

from functools import reduce

import numba
import torch
from torch import Tensor

from .threads import parallel

TASKS = 8  # wanted at the least, for a few threads to share evenly
LANES = 16  # channels below which a task leaves vector registers empty


def block_size(width: int, rows: int, limit: int) -> int:
    """Channels a task where `rows` independent rows of `width` channels are to be shared out: a multiple of
    LANES."""
    size = width * rows // TASKS // LANES * LANES
    return min(max(size, LANES), limit)


def same_dtype(*xs: Tensor | None) -> list[Tensor | None]:
    """All in the widest dtype among them: a kernel is compiled for one dtype at a time."""
    dtype = reduce(torch.promote_types, [x.dtype for x in xs if x is not None])
    return [x if x is None else x.to(dtype) for x in xs]


@parallel
def add_parts(parts, out):
    """out (n) = Σ_p parts (p, n), in the order of p."""
    P, n = parts.shape
    pieces = (n + 4095) // 4096
    for piece in numba.prange(pieces):
        lo, hi = piece * 4096, min(piece * 4096 + 4096, n)
        for i in range(lo, hi):
            out[i] = parts[0, i]
        for p in range(1, P):
            for i in range(lo, hi):
                out[i] += parts[p, i]
