"""Norms, plain, gated and by head, computed in float32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.kernels.cpu import norm as cpu
from riverrun.kernels.library import watched
from riverrun.ops import gpu, is_forced

from .shape import wide

Bonus = tuple[Tensor, Tensor, Tensor, Tensor]
LARGE = 1 << 24  # numbers of training steps in which a GPU was busier than Python (benchmarks/NOTES.md)
SMALL = 16384  # numbers for which PyTorch's operators are as fast as a call of a kernel


def in_one_pass(x: Tensor) -> bool:
    """Whether the compiled norm runs x. In float64, and inside `ops.forced`, it is PyTorch's, which can be
    differentiated twice; a few steps are not worth a call."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > SMALL and not is_forced()


def in_one_kernel(x: Tensor) -> bool:
    """Whether a plain norm of x is our own on a GPU: PyTorch's where that is no slower, where somebody names
    implementations or watches operators (a compiler makes one kernel of it and its neighbours)."""
    if x.numel() < LARGE or is_forced() or watched():
        return False
    return gpu is not None and gpu.norm.refuses(x, None, x.shape[-1]) is None


class RMSNorm(nn.RMSNorm):
    """w ⊙ x / sqrt(mean(x²) + eps) over the last axis. Zhang & Sennrich 2019 (arXiv:1910.07467) eq. 4."""

    eps: float

    def __init__(self, width: int, eps: float = 1e-6):
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if gpu is not None and in_one_kernel(x):
            return gpu.norm.gated_rms_norm(x, None, self.weight, x.shape[-1], self.eps)
        if x.is_cuda and x.dtype == self.weight.dtype:  # whose own sums are float32
            return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)
        dtype, x, w = x.dtype, wide(x), wide(self.weight)
        if in_one_pass(x):
            return cpu.rms_norm(x, None, w, len(w), self.eps).to(dtype)
        return F.rms_norm(x, self.normalized_shape, w, self.eps).to(dtype)


class GatedRMSNorm(nn.Module):
    """RMS norm of each `group` of channels with a gate: w ⊙ norm(x) ⊙ silu(z), or w ⊙ norm(x ⊙ silu(z)).

    x, z: (..., width). `weight` is (width), or (group) shared by all groups when `shared`. `before` gates
    before the norm, as Mamba-2 does; Gated DeltaNet gates after it. With a `skip` (d, u), d (H) and u
    (..., H, P), x + d u stands for x. One kernel does it all, forward and backward.
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

    def forward(self, x: Tensor, z: Tensor, skip: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if gpu is not None and gpu.norm.refuses(x, z, self.group) is None:
            return gpu.norm.gated_rms_norm(x, z, self.weight, self.group, self.eps, self.before, skip)
        dtype, x, z, w = x.dtype, wide(x), wide(z), wide(self.weight)
        if skip is not None:
            skip = d, u = wide(skip[0]), wide(skip[1])
        if in_one_pass(x):
            return cpu.rms_norm(x, z, w, self.group, self.eps, self.before, skip).to(dtype)
        if skip is not None:
            x = torch.addcmul(x.view(u.shape), d[:, None], u).flatten(-2)
        gate = F.silu(z)
        if self.before:
            x = x * gate
        x = F.rms_norm(x.unflatten(-1, (-1, self.group)), (self.group,), eps=self.eps)
        x = (x * w.view(-1, self.group)).flatten(-2)
        return (x if self.before else x * gate).to(dtype)


class HeadNorm(nn.Module):
    """Layer norm of every head by itself, (..., H, P) -> (..., H·P), then a weight, and a bias, per channel.

    Elsewhere it is called multi-head layer norm, or group norm with H groups. `bonus` (r, k, v, ρ) adds
    RWKV's (Σ r ⊙ k ⊙ ρ) v, then the result is multiplied by `gate` (..., H·P); on a GPU in the same kernel.
    """

    def __init__(self, width: int, eps: float = 1e-6, bias: bool = False):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor, gate: Tensor | None = None, bonus: Bonus | None = None) -> Tensor:
        if gpu is not None and gpu.headnorm.refuses(x) is None:
            return gpu.headnorm.head_norm(x, self.weight, self.bias, gate, bonus, self.eps)
        y = F.layer_norm(wide(x), x.shape[-1:], eps=self.eps).flatten(-2) * wide(self.weight)
        y = (y if self.bias is None else y + wide(self.bias)).to(x.dtype)
        if bonus is not None:
            r, k, v, rho = bonus
            y = y + ((r * k * rho).sum(-1, keepdim=True) * v).flatten(-2)
        return y if gate is None else y * gate


def unit(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last axis: keys of length one, and no gradient that explodes at zero."""
    if gpu is not None and x.dim() > 1 and gpu.norm.refuses(x, x, x.shape[-1]) is None:
        return gpu.norm.unit(x, eps)
    return (wide(x) * torch.rsqrt(wide(x).square().sum(-1, keepdim=True) + eps)).to(x.dtype)
