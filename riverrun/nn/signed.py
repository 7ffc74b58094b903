"""Transitions with eigenvalues in [-1, 1] instead of [0, 1], which let one layer track parity.

    delta rule    I - β k kᵀ with |k| = 1 has the eigenvalue 1 - β along k: β in [0, 2], not [0, 1]
    Mamba         2 exp(dt A) - 1 for exp(dt A); the input term stays dt B x

Source: Grazzi et al. 2025 (arXiv:2411.12537), and its code for the input term of Mamba.
"""

from __future__ import annotations

import torch
from torch import Tensor

from riverrun import ops

from .shape import wide


def write_strength(b: Tensor, negative: bool) -> Tensor:
    """β of a delta rule from what is projected: σ(b), or 2 σ(b) for eigenvalues in [-1, 1]."""
    return 2 * b.sigmoid() if negative else b.sigmoid()


def signed_selective(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ops.selective` with the transition 2 exp(dt A) - 1, through `ops.diagonal`: T × E × N is stored."""
    a = torch.add(A.new_tensor(-1.0), (dt[..., None] * A).exp(), alpha=2)  # fewer passes over T × E × N
    b = torch.einsum("bte,btn->bten", dt * x, wide(B))
    start = None if state is None else state.flatten(1)
    h, last = ops.diagonal(a.flatten(2), b.flatten(2), state=start, reset=reset)
    y = torch.einsum("bten,btn->bte", h.unflatten(2, A.shape), wide(C))
    return y.to(x.dtype), last.unflatten(1, A.shape)
