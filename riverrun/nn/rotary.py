"""Rotary positions that count from the start of each document.

    q_t' = R(p_t) q_t    k_t' = R(p_t) k_t    q_t'ᵀ k_s' depends on p_t - p_s only
    R(p) turns the pair (x_i, x_{i + K/2}) by the angle p · base^{-2 i / K}

Source: Su et al. 2021 (RoFormer, arXiv:2104.09864) eq. 14-15, with halves for pairs as in Llama's code.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from riverrun.ops import gpu


def positions(x: Tensor, start: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, T) positions for x (B, T, ...), and the next (B). `start` (B) is the first; a reset is 0."""
    steps = torch.arange(x.shape[1], device=x.device)
    found = steps.expand(x.shape[:2]) if start is None else start[:, None] + steps
    if reset is not None:
        last = steps.where(reset, -1).cummax(1).values
        found = torch.where(last < 0, found, steps - last)
    return found, found[:, -1] + 1


def rotate(x: Tensor, position: Tensor, base: float = 10_000.0) -> Tensor:
    """x (B, T, H, K), K even, turned by R(position), position (B, T)."""
    return turned(x, *angles(x, position, base))


def rotate_all(xs: Sequence[Tensor], position: Tensor, base: float) -> Sequence[Tensor]:
    """Each x turned: as one tensor, or on a GPU one by one, which copies nothing."""
    if gpu is not None and gpu.rotary.refuses(xs[0]) is None:
        cos, sin = angles(xs[0], position, base)
        return [turned(x, cos, sin) for x in xs]
    return rotate(torch.cat(list(xs), 2), position, base).split([x.shape[2] for x in xs], 2)


def angles(x: Tensor, position: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, 1, K/2) for x, in float32 or wider.

    Angles are float64: in float32 the first pair at position 10⁶ would be off by 0.03 radians.
    """
    half = x.shape[-1] // 2
    rate = base ** -(torch.arange(half, dtype=torch.float64, device=x.device) / half)
    angle = position[..., None, None] * rate
    dtype = torch.promote_types(x.dtype, torch.float32)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    if gpu is not None and gpu.rotary.refuses(x) is None:
        return gpu.rotary.rotate(x, *(angle[:, :, 0].expand(*x.shape[:2], half) for angle in (cos, sin)))
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
