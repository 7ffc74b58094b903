"""DeltaProduct: several delta-rule steps a token, so that its transition is a product of reflections.

    q, k_j, v_j = silu(conv(W x))    |q| = K^{-1/2}, |k_j| = 1 by scaling    β_j = 2 σ(W_j x)    j = 1 ... n
    S ← e^g S    then, for each j: S ← S + β_j k_j (v_j - Sᵀ k_j)ᵀ    y = W_o norm(Sᵀ q)
    gated: g = -A softplus(W_a x + c), else 0; and y = W_o (norm(Sᵀ q) ⊙ silu(W_z x))

n = 1 is DeltaNet, or Gated DeltaNet. The op runs on n times as many steps: the decay and a reset come with
the first of a token, the read with its last.
Source: Siems et al. 2025 (arXiv:2502.10297); the layout of its code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import (
    GatedRMSNorm,
    RMSNorm,
    ShortConv,
    carried,
    checked,
    head_width,
    heads,
    parts,
    unit,
    wide,
)
from riverrun.nn.init import log_rate, step_size_bias
from riverrun.nn.signed import write_strength
from riverrun.nn.steps import among


class DeltaProduct(nn.Module):
    """arXiv:2502.10297. State: (S (B, H, K, V), conv (B, window - 1, H·K + n·H·(K + V))) with n = num_steps.

    K = V = width / H unless given. `negative_eigenvalues=False`: β_j = σ(W_j x), see `riverrun.nn.signed`.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_steps: int = 2,
        gated: bool = True,
        key_width: int | None = None,
        value_width: int | None = None,
        window: int = 4,
        negative_eigenvalues: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        H, n = num_heads, num_steps
        K, V = key_width or head_width(width, H), value_width or head_width(width, H)
        self.width, self.num_heads, self.num_steps, self.key_width = width, H, n, K
        self.gated, self.negative_eigenvalues = gated, negative_eigenvalues
        self.inner = (H * K, n * H * K, n * H * V)
        self.sizes = (sum(self.inner), H * V, n * H, H) if gated else (sum(self.inner), 0, n * H, 0)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [(q, k_1 ... k_n, v_1 ... v_n), z, b, a]
        self.conv = ShortConv(self.sizes[0], window)
        if gated:
            self.log_rate, self.dt_bias = log_rate(H), step_size_bias(H)
        self.norm = GatedRMSNorm(H * V, V, eps, shared=True) if gated else RMSNorm(V, eps)
        self.out = nn.Linear(H * V, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, past = carried(self, x, state, reset, 2)
        n, H, (B, T, _) = self.num_steps, self.num_heads, x.shape
        qkv, z, b, a = parts(self.inp, x, self.sizes)
        qkv, past = self.conv(qkv, past, reset)
        q, k, v = qkv.split(self.inner, -1)
        q = (unit(heads(q, H)) * self.key_width**-0.5).repeat_interleave(n, 1)
        k, v, b = (p.reshape(B, T * n, H, -1) for p in (k, v, b))
        beta, g = write_strength(b[..., 0], self.negative_eigenvalues), None
        if self.gated:
            g = -wide(self.log_rate).exp() * F.softplus(wide(a) + wide(self.dt_bias))
            g = among(g[:, :, None], n)
        flags = None if reset is None else among(reset[:, :, None], n)
        y, S = ops.delta(q, unit(k), v, beta, g, state=S, reset=flags)
        y = y[:, n - 1 :: n]
        y = self.norm(y.flatten(2), z) if self.gated else self.norm(y).flatten(2)
        return self.out(y), (S, past)
