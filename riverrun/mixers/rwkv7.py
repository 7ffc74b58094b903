"""RWKV-7: a delta rule that removes along one key and writes along another, with decay and rate per channel.

    d_t = x_{t-1} - x_t    x^i = x + μ_i ⊙ d for i in r, w, k, v, a, g
    r, k, v = W x^r, W x^k, W x^v    w = exp(-e^{-1/2} σ(c_w + U tanh(V x^w)))    a = σ(c_a + U V x^a)
    κ = (k ⊙ ξ) / |k ⊙ ξ|    k' = k ⊙ (1 + (a - 1) ⊙ α)    S_t = (diag(w_t) - c (a ⊙ κ) κᵀ) S_{t-1} + k' vᵀ
    y_t = norm(S_tᵀ r_t) + (r ⊙ ρ ⊙ k')ᵀ1 v    out = W_o (y ⊙ U σ(V x^g))

c = 1, unless the eigenvalues of the transition shall fill [-1, 1]. They are those of diag(w) - c u uᵀ, where
u = √a ⊙ κ is no longer than one, so none is below min w - c, and w ≥ e^{-e^{-1/2}} = 0.545: c = 1 has
negative ones already, down to -0.455; 1.545 is the largest c for which none leaves [-1, 1].
Source: Peng et al. 2025 (arXiv:2503.14456) sec. 4. This is the paper's first layer. Later ones take
v + (v_1 - v) ⊙ σ(c_v + U V x^v) for v, where v_1 is the first layer's. A mixer sees its own input only, so
`riverrun.models.rwkv7` gives those layers a `value_rank` and calls `in_stack`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import HeadNorm, LowRank, carried, checked, fitting, head_width, heads, removal, shifted


class RWKV7(nn.Module):
    """arXiv:2503.14456. State: (S (B, H, K, K), last x (B, width)) with K = width / H.

    `negative_eigenvalues`: c = 1 + e^{-e^{-1/2}}.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        decay_rank: int = 64,
        rate_rank: int = 64,
        gate_rank: int = 128,
        negative_eigenvalues: bool = False,
        value_rank: int | None = None,
    ):
        super().__init__()
        K = head_width(width, num_heads)
        ramp = torch.arange(width) / max(width - 1, 1)
        self.width, self.num_heads = width, num_heads
        self.strength = 1 + math.exp(-math.exp(-0.5)) if negative_eigenvalues else 1
        self.mix = nn.Parameter((1 - ramp).repeat(6, 1))  # μ for [r, w, k, v, a, g]
        self.r, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.decay = LowRank(width, decay_rank, width, torch.tanh, bias=6 * ramp.sqrt() - 5.5)
        self.rate = LowRank(width, rate_rank, width, bias=torch.zeros(width))
        self.gate = LowRank(width, gate_rank, width, torch.sigmoid)
        self.value = None if value_rank is None else LowRank(width, value_rank, width, bias=torch.ones(width))
        self.removal = nn.Parameter(torch.full((width,), 0.85))  # ξ
        self.replacement = nn.Parameter(torch.ones(width))  # α
        self.bonus = nn.Parameter(torch.full((num_heads, K), 0.1))  # ρ
        self.norm = HeadNorm(width, eps=1e-5 * K, bias=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return self.in_stack(x, state, reset)[:2]

    def in_stack(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor] | None,
        reset: Tensor | None,
        first: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """y, the state, and v (B, T, width), which is `first` for the later layers of a stack."""
        if (self.value is None) != (first is None):
            raise ValueError("RWKV7: the first layer's v is for layers with a value_rank, and they need it")
        S, last = carried(self, x, state, reset, 2)
        H, last = self.num_heads, fitting(self, last, x.shape[0], self.width)
        maps, rows = [self.r, self.decay.inp, self.k, self.v, self.rate.inp, self.gate.inp], [*range(6)]
        if self.value is not None:
            maps, rows = [*maps, self.value.inp], [*rows, 3]
        r, w, k, v, a, gate, *low = shifted(x, self.mix, last, reset, maps, rows)
        if self.value is not None and first is not None:
            v = torch.lerp(v, first, self.value.onward(low[0]).sigmoid())
        values = v
        w, a = self.decay.onward(w), self.rate.onward(a)
        r, k, v, w, a, xi, alpha = (heads(p, H) for p in (r, k, v, w, a, self.removal, self.replacement))
        k, g, e, kappa = removal(k, w, a, xi, alpha, self.strength)
        y, S = ops.dplr(r, k, v, g, e, kappa, state=S, reset=reset)
        y = self.norm(y, self.gate.onward(gate), (r, k, v, self.bonus))
        return self.out(y), (S, x[:, -1]), values
