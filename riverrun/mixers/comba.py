"""Comba: the delta rule as a closed loop, with feedback of its own strength from the state and to the output.

    q, k, v = silu(conv(W x))    k' = k / |k|    q' = (q - D d k) / |q - D d k| K^{-1/2}    d = σ(c_d)
    β = σ(W_b x)    g = -A softplus(W_a x + c)
    S_t = (e^g I - β d k' k'ᵀ) S_{t-1} + β k' vᵀ    y = W_o (norm(Sᵀ q') ⊙ σ(W_z x))

Gated DeltaNet removes what it reads after forgetting, with the strength e^g β; here it is β d. The authors'
layer also scales d k' to length one, which takes d back from the state; that is left out.
Source: Hu et al. 2025 (arXiv:2506.02475), scalar plus low rank; the layout of its code, with D = 1 at first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import RMSNorm, ShortConv, carried, checked, head_width, heads, parts, unit, wide
from riverrun.nn.init import log_rate, step_size_bias


class Comba(nn.Module):
    """arXiv:2506.02475. State: (S (B, H, K, V), conv (B, window - 1, 2·H·K + H·V)).

    K = key_width and V = value_width are width / H unless given.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        key_width: int | None = None,
        value_width: int | None = None,
        window: int = 4,
        eps: float = 1e-5,
    ):
        super().__init__()
        H = num_heads
        K, V = key_width or head_width(width, H), value_width or head_width(width, H)
        self.width, self.num_heads, self.key_width = width, H, K
        self.inner, self.sizes = (H * K, H * K, H * V), (2 * H * K + H * V, H * V, H, H)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [(q, k, v), z, b, a]
        self.conv = ShortConv(self.sizes[0], window)
        self.log_rate, self.dt_bias = log_rate(H), step_size_bias(H)
        self.feedback, self.correction = nn.Parameter(torch.ones(H)), nn.Parameter(torch.ones(H))  # c_d, D
        self.norm = RMSNorm(V, eps)
        self.out = nn.Linear(H * V, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, past = carried(self, x, state, reset, 2)
        qkv, z, b, a = parts(self.inp, x, self.sizes)
        qkv, past = self.conv(qkv, past, reset)
        q, k, v = (heads(p, self.num_heads) for p in qkv.split(self.inner, -1))
        d = self.feedback.sigmoid()[:, None]
        q, k = unit(q - self.correction[:, None] * d * k) * self.key_width**-0.5, unit(k)
        beta = b.sigmoid()[..., None]
        g = -wide(self.log_rate).exp() * F.softplus(wide(a) + wide(self.dt_bias))
        g = g[..., None].expand(k.shape)
        y, S = ops.dplr(q, beta * k, v, g, -beta * d * k, k, state=S, reset=reset)
        return self.out(self.norm(y).flatten(2) * z.sigmoid()), (S, past)
