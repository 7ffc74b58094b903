"""What RWKV-7's memory removes along and writes, from three projections. See `riverrun.mixers.rwkv7`."""

from __future__ import annotations

import math

from torch import Tensor

from riverrun.ops import gpu

from .norm import unit
from .shape import wide

Four = tuple[Tensor, Tensor, Tensor, Tensor]
DECAY = -math.exp(-0.5)


def removal(k: Tensor, w: Tensor, a: Tensor, xi: Tensor, alpha: Tensor, strength: float) -> Four:
    """(k ⊙ (1 + (σ(a) - 1) ⊙ α), -e^{-1/2} σ(w), -c σ(a) ⊙ κ, κ) with κ = (k ⊙ ξ) / |k ⊙ ξ|, c = strength.

    k, w, a and what is returned: (B, T, H, K)    ξ, α: (H, K)    log-decays are float32 or wider
    """
    if gpu is not None and gpu.removal.refuses(k, w, a) is None:
        return gpu.removal.removal(k, w, a, xi, alpha, DECAY, -strength, 1e-6)
    g = DECAY * wide(w).sigmoid()
    a = a.sigmoid()
    kappa = unit(k * xi)
    return k * (1 + (a - 1) * alpha), g, -strength * a * kappa, kappa
