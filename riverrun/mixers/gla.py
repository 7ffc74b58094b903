"""Gated linear attention: every key channel of the memory forgets by a gate that reads the input.

    q, k, v, z = W x    g = log σ(U_2 U_1 x + c) / τ
    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ    y_t = S_tᵀ q_t / sqrt(K)    out = W_o (norm(y) ⊙ silu(z))

Source: Yang et al. 2024 (arXiv:2312.06635) sec. 4.4, with its low rank 16 and τ = 16, and K = V / 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import GatedRMSNorm, carried, checked, head_width, heads, wide


class GLA(nn.Module):
    """arXiv:2312.06635. State: S (B, H, K, V) with V = width / H, K = key_width, V / 2 unless given."""

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        key_width: int | None = None,
        rank: int = 16,
        temperature: float = 16.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        V = head_width(width, num_heads)
        K = key_width or -(-V // 2)
        self.width, self.num_heads, self.key_width, self.temperature = width, num_heads, K, temperature
        self.sizes = (num_heads * K, num_heads * K, width, width, rank)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, z, U_1]
        self.decay = nn.Linear(rank, num_heads * K)
        self.norm = GatedRMSNorm(width, V, eps, shared=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = carried(self, x, state, reset)
        q, k, v, z, low = self.inp(x).split(self.sizes, -1)
        g = F.logsigmoid(wide(self.decay(low))) / self.temperature
        q, k, v, g = (heads(p, self.num_heads) for p in (q * self.key_width**-0.5, k, v, g))
        y, state = ops.outer(q, k, v, g, state=state, reset=reset)
        return self.out(self.norm(y.flatten(2), z)), state
