"""Positions along several axes, for memories that have no order of their own.

Source: Qin et al. 2024 (LightNet, arXiv:2405.21022), MD-TPE and MD-LRPE, as in the first author's code: sums
of one axis after another in xmixers, [x cos, x sin] with each axis's share of the angles in xopes
(github.com/Doraemonzzz). The paper's own equations were not at hand.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from riverrun import ops

from .shape import wide

Sizes = tuple[int, ...]  # of all axes but the first, whose size follows from the number of tokens


def places(position: Tensor, sizes: Sizes) -> Tensor:
    """(B, T, 1 + n): coordinates of positions (B, T) in row-major order on a grid (any, *sizes)."""
    found = []
    for size in reversed(sizes):
        found.append(position % size)
        position = position // size
    return torch.stack([position, *reversed(found)], -1)


def lrpe(x: Tensor, place: Tensor, base: float = 10_000.0) -> Tensor:
    """(B, T, H, 2K): [x cos α, x sin α] for x (B, T, H, K), so that qᵀk turns with the distance, key by key.

    place (B, T, n): of n axes each has K / n of the keys, rounded up, with α = base^{-2 i n / K} times the
    coordinate. A key's decay is that of its two halves: with decays, too, only distances matter.
    """
    each = -(-x.shape[-1] // place.shape[-1])
    rate = base ** (-2 / each * torch.arange(each, dtype=torch.float64, device=x.device))
    angle = (place[..., None] * rate).flatten(-2)[..., None, : x.shape[-1]]
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.cat([x * angle.cos().to(dtype), x * angle.sin().to(dtype)], -1).to(x.dtype)


class TPE(nn.Module):
    """Toeplitz positions: Σ_axes c ⊙ Σ_{s ≤ t} λ^{t-s} ⊙ x_s, leaky sums along the axes, to be added to x."""

    def __init__(self, width: int, axes: int = 1):
        super().__init__()
        self.decay = nn.Parameter(torch.randn(axes, width))  # λ = σ(decay)
        self.weight = nn.Parameter(torch.full((axes, width), 0.1))  # c

    def along(
        self, axis: int, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One axis's sum for x (B, T, D), and its state (B, D)."""
        x, decay = wide(x), wide(self.decay[axis]).sigmoid()
        h, state = ops.diagonal(decay.expand_as(x), x, state=state, reset=reset)
        return wide(self.weight[axis]) * h, state

    def forward(self, x: Tensor, sizes: Sizes) -> Tensor:
        """The sum over all axes of a grid, x (B, T, D) in row-major order; an incomplete end reads zeros."""
        B, T, D = x.shape
        cells = math.prod(sizes)
        grid = torch.cat([x, x.new_zeros(B, -T % cells, D)], 1).unflatten(1, (-1, *sizes))
        total = torch.zeros_like(grid, dtype=wide(x[:1, :1]).dtype)
        for axis in range(1 + len(sizes)):
            rows = grid.movedim(axis + 1, -2)
            y, _ = self.along(axis, rows.flatten(0, -3))
            total = total + y.view(rows.shape).movedim(-2, axis + 1)
        return total.flatten(1, -2)[:, :T].to(x.dtype)
