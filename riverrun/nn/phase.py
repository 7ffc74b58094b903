"""Rotations whose speed is data: a complex diagonal state, as Mamba-3 has it, on a real recurrence.

    θ_t = θ_{t-1} + ω_t mod 2π        (R(θ) x)_{2i, 2i+1} = the pair (x_{2i}, x_{2i+1}) turned by θ_i

Turning k_s by θ_s and q_t by θ_t is the same as turning the state by ω_t at every step: only θ_t - θ_s is
ever seen, so a reset need not clear θ.
Source: Lahoti et al. 2026 (arXiv:2603.15569), whose pairs are neighbours.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def phases(rate: Tensor, start: Tensor | None) -> Tensor:
    """θ (B, T, ...) for ω = rate (B, T, ...), from θ_0 = start (B, ...) on or 0; summed in float64."""
    angle = rate.double().cumsum(1)
    if start is not None:
        angle = angle + start[:, None].double()
    return angle.remainder(2 * math.pi).to(rate.dtype)


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """x (..., N) with its first A pairs turned by angle (..., A), A ≤ N / 2."""
    turned, rest = x.split([2 * angle.shape[-1], x.shape[-1] - 2 * angle.shape[-1]], -1)
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned.flatten(-2), rest], -1)
