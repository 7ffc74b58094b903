"""Norms, plain, gated and by head, computed in float32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.ops import gpu

from .shape import wide


class RMSNorm(nn.RMSNorm):
    """w ⊙ x / sqrt(mean(x²) + eps) over the last axis. Zhang & Sennrich 2019 (arXiv:1910.07467) eq. 4."""

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype:  # whose own sums are float32
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        return F.rms_norm(wide(x), self.normalized_shape, wide(self.weight), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMS norm of each `group` of channels with a gate: w ⊙ norm(x) ⊙ silu(z), or w ⊙ norm(x ⊙ silu(z)).

    x, z: (..., width). `weight` is (width), or (group) shared by all groups when `shared`. `before` gates
    before the norm, as Mamba-2 does; Gated DeltaNet gates after it. On a GPU one kernel does it all.
    """

    def __init__(
        self,
        width: int,
        group: int | None = None,
        eps: float = 1e-6,
        before: bool = False,
        shared: bool = False,
    ):
        super().__init__()
        self.group, self.eps, self.before = group or width, eps, before
        self.weight = nn.Parameter(torch.ones(self.group if shared else width))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        if gpu is not None and gpu.norm.refuses(x, z, self.group) is None:
            return gpu.norm.gated_rms_norm(x, z, self.weight, self.group, self.eps, self.before)
        dtype, x, gate = x.dtype, wide(x), F.silu(wide(z))
        if self.before:
            x = x * gate
        x = F.rms_norm(x.unflatten(-1, (-1, self.group)), (self.group,), eps=self.eps)
        x = x * wide(self.weight).view(-1, self.group)
        x = x.flatten(-2)
        return (x if self.before else x * gate).to(dtype)


class HeadNorm(nn.Module):
    """Layer norm of every head by itself, (..., H, P) -> (..., H·P), then a weight, and a bias, per channel.

    Elsewhere it is called multi-head layer norm, or group norm with H groups.
    """

    def __init__(self, width: int, eps: float = 1e-6, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(wide(x), x.shape[-1:], eps=self.eps).flatten(-2) * wide(self.weight)
        return (y if self.bias is None else y + wide(self.bias)).to(x.dtype)


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last axis: keys of length one, and no gradient that explodes at zero."""
    if gpu is not None and x.dim() > 1 and gpu.norm.refuses(x, x, x.shape[-1]) is None:
        return gpu.norm.unit(x, eps)
    return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) + eps)).to(x.dtype)
