"""Small reshapes that many mixers share."""

from __future__ import annotations

import torch
from torch import Tensor


def heads(x: Tensor, n: int) -> Tensor:
    """(..., n·W) -> (..., n, W)."""
    return x.unflatten(-1, (n, -1))


def wide(x: Tensor) -> Tensor:
    """x in float32 or wider, for what must not be computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gates(x: Tensor, count: int, num_heads: int) -> Tensor:
    """(..., count·H·P) -> (..., count, H, P)."""
    return x.unflatten(-1, (count, num_heads, -1))
