"""Feature maps whose products are kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def positive(u: Tensor) -> Tensor:
    """elu(u) + 1, without its kernel, whose compiled backward fails on strided inputs (PyTorch 2.13)."""
    return F.relu(u) + u.clamp(max=0).exp()


def taylor(u: Tensor) -> Tensor:
    """φ(u) (..., 1 + d + d (d + 1) / 2) for u (..., d): φ(q)ᵀφ(k) = 1 + s + s²/2 with s = qᵀk / sqrt(d).

    Arora et al. 2024 (Based, arXiv:2402.18668) sec. 4, with each product u_i u_j, i < j, once and not
    twice. Entries are picked by products with 0/1 matrices, whose gradients need no atomic additions.
    """
    d = u.shape[-1]
    i, j = torch.triu_indices(d, d, device=u.device)
    one_hot = torch.eye(d, dtype=u.dtype, device=u.device)
    scale = u.new_full(i.shape, d**-0.5).masked_fill(i == j, (2 * d) ** -0.5)
    pairs = (u @ (one_hot[:, i] * scale)) * (u @ one_hot[:, j])
    return torch.cat([torch.ones_like(u[..., :1]), u * d**-0.25, pairs], -1)
