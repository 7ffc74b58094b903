"""Kimi Delta Attention: the delta rule with a forget gate for every key channel, and an output gate.

    q, k, v = silu(conv(W x))    q, k scaled to |q| = K^{-1/2}, |k| = 1
    β = σ(W_b x)    g = -A softplus(U_f V_f x + c), A per head, c per channel
    S' = diag(e^g) S    S = S' + β k (v - S'ᵀ k)ᵀ    y = W_o (norm(Sᵀ q) ⊙ σ(U_z V_z x))

With a `lower_bound` b < 0, g = b σ(A (U_f V_f x + c)), in [b, 0]: nothing is forgotten at once.
Source: Kimi Team 2025 (Kimi Linear, arXiv:2510.26692); the layout of the published model's layer. The bounded
gate is that of later models as transformers has them (glm5_next and bailing_hybrid, b = -5), and "safe" in
flash-linear-attention; A begins as 1 there.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import Only, RMSNorm, ShortConv, carried, checked, head_width, heads, parts, unit, wide
from riverrun.nn.init import log_rate, step_size_bias
from riverrun.nn.signed import write_strength


class KDA(nn.Module):
    """arXiv:2510.26692. State: (S (B, H, K, K), conv (B, window - 1, 3·width)) with K = width / H.

    `rank` of V_f and V_z is K unless given. `lower_bound` of g: None for none.
    `negative_eigenvalues`: β = 2 σ(W_b x), see `riverrun.nn.signed`.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        rank: int | None = None,
        window: int = 4,
        lower_bound: Annotated[float | None, Only(lambda b: b < 0, "less than 0")] = None,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        K, H = head_width(width, num_heads), num_heads
        rank = rank or K
        self.width, self.num_heads, self.key_width = width, H, K
        self.lower_bound, self.negative_eigenvalues = lower_bound, negative_eigenvalues
        self.sizes = (3 * width, rank, rank, H)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [(q, k, v), V_f, V_z, b]
        self.conv = ShortConv(3 * width, window)
        self.decay = nn.Linear(rank, width, bias=False)
        self.log_rate = log_rate(H) if lower_bound is None else nn.Parameter(torch.zeros(H))
        self.dt_bias = step_size_bias(width)
        self.gate = nn.Linear(rank, width, bias=False)
        self.norm = RMSNorm(K, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, past = carried(self, x, state, reset, 2)
        qkv, f, z, b = parts(self.inp, x, self.sizes)
        qkv, past = self.conv(qkv, past, reset)
        q, k, v = (heads(p, self.num_heads) for p in qkv.chunk(3, -1))
        f, rate = wide(self.decay(f)) + wide(self.dt_bias), wide(self.log_rate).exp()[:, None]
        if self.lower_bound is None:  # all heads at once: traced, softplus takes its gradient for contiguous
            g = -rate * heads(F.softplus(f), self.num_heads)
        else:
            g = self.lower_bound * (rate * heads(f, self.num_heads)).sigmoid()
        beta = write_strength(b, self.negative_eigenvalues)
        y, S = ops.delta(unit(q) * self.key_width**-0.5, unit(k), v, beta, g, state=S, reset=reset)
        return self.out(self.norm(y).flatten(2) * self.gate(z).sigmoid()), (S, past)
