"""RetNet: linear attention whose heads forget at rates of their own, with keys that know where they stand.

    q, k, v, z = W x    γ_h = 1 - 2^{-5-h}
    S_t = γ_h S_{t-1} + (R(t) k_t) v_tᵀ    y_t = S_tᵀ R(t) q_t / sqrt(K)    out = W_o (norm(y) ⊙ silu(z))

Source: Sun et al. 2023 (arXiv:2307.08621) eq. 5-8. The norm is per head and cancels the paper's other
scalings; it has a weight, which the paper's has not. R is the paper's rotation with halves for pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import GatedRMSNorm, carried, checked, fitting, head_width, heads, positions, rotate


class RetNet(nn.Module):
    """arXiv:2307.08621. State: (S (B, H, K, V), position (B)); K = width / H, V = expand · K."""

    @checked
    def __init__(
        self, width: int, num_heads: int = 4, expand: int = 2, base: float = 10_000.0, eps: float = 1e-6
    ):
        super().__init__()
        K = head_width(width, num_heads)
        if K % 2:
            raise ValueError(f"heads of width {K} have no pairs to turn; width / num_heads must be even")
        self.width, self.num_heads, self.key_width, self.base = width, num_heads, K, base
        self.sizes = (width, width, expand * width, expand * width)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, z]
        self.norm = GatedRMSNorm(expand * width, expand * K, eps, shared=True)
        self.out = nn.Linear(expand * width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, start = carried(self, x, state, reset, 2)
        start = fitting(self, start, x.shape[0])
        q, k, v, z = self.inp(x).split(self.sizes, -1)
        position, start = positions(x, start, reset)
        q, k = (rotate(heads(p, self.num_heads), position, self.base) for p in (q, k))
        gamma = 1 - 2.0 ** -(5 + torch.arange(self.num_heads, dtype=torch.float64, device=x.device))
        g = gamma.log().to(torch.promote_types(x.dtype, torch.float32)).expand(*x.shape[:2], -1)
        y, S = ops.outer(q * self.key_width**-0.5, k, heads(v, self.num_heads), g, state=S, reset=reset)
        return self.out(self.norm(y.flatten(2), z)), (S, start)
