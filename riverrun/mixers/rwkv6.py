"""RWKV-6 (Finch): decays and token shifts that read the input, and a bonus for the current token.

    d_t = x_{t-1} - x_t    x^i = x + d ⊙ (λ_i + U_i tanh(V_i (x + d ⊙ μ))) for i in w, k, v, r, g
    r, k, v, g = W x^i    w_t = exp(-exp(c + U tanh(V x^w)))
    y_t = (S_{t-1} + (u ⊙ k_t) v_tᵀ)ᵀ r_t    S_t = diag(w_t) S_{t-1} + k_t v_tᵀ
    out = W_o (norm(y) ⊙ silu(g))

Source: Peng et al. 2024 (arXiv:2404.05892) sec. 4, with the ranks of its smaller models' code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from riverrun import ops
from riverrun.nn import HeadNorm, LowRank, carried, checked, fitting, head_width, heads, previous, wide


class RWKV6(nn.Module):
    """arXiv:2404.05892. State: (S (B, H, K, K), last x (B, width)) with K = width / H."""

    @checked
    def __init__(self, width: int, num_heads: int = 4, mix_rank: int = 32, decay_rank: int = 64):
        super().__init__()
        K = head_width(width, num_heads)
        ramp = torch.arange(width) / max(width - 1, 1)
        self.width, self.num_heads = width, num_heads
        self.mix = nn.Parameter((1 - ramp).repeat(6, 1))  # μ, and λ for [w, k, v, r, g]
        self.low = nn.Linear(width, 5 * mix_rank, bias=False)  # V_i
        self.high = nn.Parameter(torch.empty(5, mix_rank, width).uniform_(-0.01, 0.01))  # U_i
        self.r, self.k, self.v, self.gate = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.decay = LowRank(width, decay_rank, width, torch.tanh, bias=5 * ramp**0.7 - 6)
        self.bonus = nn.Parameter((1 - ramp).view(num_heads, K))  # u
        self.norm = HeadNorm(width, eps=1e-5 * K, bias=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, last = carried(self, x, state, reset, 2)
        H, last = self.num_heads, fitting(self, last, x.shape[0], self.width)
        d = previous(x, last, reset) - x
        low = heads(torch.tanh(self.low(torch.addcmul(x, d, self.mix[0]))), 5)
        mix = self.mix[1:] + torch.einsum("btir,ird->btid", low, self.high)
        xw, xk, xv, xr, xg = torch.addcmul(x[..., None, :], d[..., None, :], mix).unbind(-2)
        g = -wide(self.decay(xw)).exp()
        r, k, v, g = (heads(p, H) for p in (self.r(xr), self.k(xk), self.v(xv), g))
        y, S = ops.outer(r, k, v, g, self.bonus, state=S, reset=reset)
        return self.out(self.norm(y, F.silu(self.gate(xg)))), (S, x[:, -1])
