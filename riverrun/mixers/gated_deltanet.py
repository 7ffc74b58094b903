"""Gated DeltaNet: the delta rule with an input-dependent forget gate per head, and an output gate.

    q, k, v = silu(conv(W x))    q, k scaled to |q| = K^{-1/2}, |k| = 1
    β = σ(W_b x)    g = -A softplus(W_a x + c)
    S' = e^g S    S = S' + β k (v - S'ᵀ k)ᵀ    y = W_o (norm(Sᵀ q) ⊙ silu(W_z x))

Source: Yang, Kautz & Hatamizadeh 2025 (arXiv:2412.06464) eq. 10 and fig. 1; the Qwen3-Next layer's layout.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import GatedRMSNorm, ShortConv, carried, checked, head_width, heads, parts, unit, wide
from riverrun.nn.init import log_rate, step_size_bias
from riverrun.nn.signed import write_strength


class GatedDeltaNet(nn.Module):
    """arXiv:2412.06464. State: (S (B, H, K, V), conv (B, window - 1, 2·G·K + H·V)).

    H value heads of width V share G query/key heads of width K; K = V = width / H and G = H unless given.
    `negative_eigenvalues`: β = 2 σ(W_b x), see `riverrun.nn.signed`.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        key_width: int | None = None,
        value_width: int | None = None,
        window: int = 4,
        negative_eigenvalues: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        H, G = num_heads, num_key_heads or num_heads
        head_width(H, G, "num_key_heads", "num_heads")
        K, V = key_width or head_width(width, H), value_width or head_width(width, H)
        self.width, self.num_heads, self.num_key_heads, self.key_width = width, H, G, K
        self.negative_eigenvalues = negative_eigenvalues
        self.sizes = (2 * G * K + H * V, H * V, H, H)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, z, b, a]
        self.conv = ShortConv(self.sizes[0], window)
        self.log_rate, self.dt_bias = log_rate(H), step_size_bias(H)
        self.norm = GatedRMSNorm(H * V, V, eps, shared=True)
        self.out = nn.Linear(H * V, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, past = carried(self, x, state, reset, 2)
        qkv, z, b, a = parts(self.inp, x, self.sizes)
        qkv, past = self.conv(qkv, past, reset)
        n = self.num_key_heads * self.key_width
        q, k, v = qkv.split([n, n, qkv.shape[-1] - 2 * n], -1)
        q, k = (unit(heads(p, self.num_key_heads)) for p in (q, k))
        g = -wide(self.log_rate).exp() * F.softplus(wide(a) + wide(self.dt_bias))
        q, v = q * self.key_width**-0.5, heads(v, self.num_heads)
        beta = write_strength(b, self.negative_eigenvalues)
        y, S = ops.delta(q, k, v, beta, g, state=S, reset=reset)
        return self.out(self.norm(y.flatten(2), z)), (S, past)
