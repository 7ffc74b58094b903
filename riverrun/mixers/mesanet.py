"""MesaNet: reads the linear map that fits all that was written best, not the one that a rule has led to.

    q, k = silu(conv(W x)) scaled to length one    v = W_v x    β = σ(W_b x + c_b)    g = log σ(W_a x + c_a)
    H_t = e^{g_t} H_{t-1} + β_t k_t k_tᵀ    S_t = e^{g_t} S_{t-1} + β_t k_t v_tᵀ    Λ = diag(softplus(c) + ¼)
    y_t = S_tᵀ (H_t + Λ)^{-1} q_t    out = W_o norm(y)

S_tᵀ (H_t + Λ)^{-1} is the M with the least Σ_s β_s e^{g_{s+1} + ... + g_t} |M k_s - v_s|² + tr(M Λ Mᵀ).
Conjugate gradients solve the system, `iterations` of them; K make it exact.
Source: von Oswald et al. 2025 (arXiv:2506.05233); the layout of its code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import RMSNorm, ShortConv, carried, checked, fitting, head_width, heads, unit, wide
from riverrun.nn.init import inverse_softplus
from riverrun.nn.solve import solve
from riverrun.state import State

LEAST = 0.25  # of Λ


class MesaNet(nn.Module):
    """arXiv:2506.05233. State: (H and S (B, H, K, K), conv (B, window - 1, 2·width)) with K = width / H."""

    @checked
    def __init__(
        self, width: int, num_heads: int = 4, iterations: int = 30, window: int = 4, eps: float = 1e-5
    ):
        super().__init__()
        K = head_width(width, num_heads)
        self.width, self.num_heads, self.iterations = width, num_heads, iterations
        self.inp = nn.Linear(width, 3 * width, bias=False)  # [(q, k), v]
        self.conv = ShortConv(2 * width, window)
        self.rate = nn.Linear(width, 2 * num_heads)  # [a, b]
        self.ridge = nn.Parameter(inverse_softplus(self.inp.weight.new_full((num_heads, K), 1 - LEAST)))
        self.norm = RMSNorm(K, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[State, State, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        H, S, past = carried(self, x, state, reset, 3)
        H = fitting(self, H, x.shape[0], *self.ridge.shape, self.ridge.shape[1])
        qk, v = self.inp(x).split([2 * self.width, self.width], -1)
        qk, past = self.conv(qk, past, reset)
        q, k = (unit(wide(heads(p, self.num_heads))) for p in qk.chunk(2, -1))
        a, b = wide(self.rate(x)).chunk(2, -1)
        beta, g, ridge = b.sigmoid(), F.logsigmoid(a), F.softplus(wide(self.ridge)) + LEAST
        q, H = solve(q, k, beta, g, ridge, self.iterations, H, reset)
        y, S = ops.outer(q, beta[..., None] * k, heads(v, self.num_heads), g, state=S, reset=reset)
        return self.out(self.norm(y).flatten(2)), (H, S, past)
