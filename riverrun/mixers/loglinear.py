"""Log-linear attention, on Mamba-2: a memory for each power of two of distances, weighed by each token.

    [z, u, dt, l] = W x    [x', B, C] = silu(conv(u))
    dt = softplus(dt + c)    g = -A dt    λ = softplus(Λ ⊙ l)
    y_t = Σ_{s ≤ t} λ_t[level(t, s)] e^{g_{s+1} + … + g_t} (C_tᵀB_s) dt_s x'_s + D x'_t
    out = W_o norm(y ⊙ silu(z))

level(t, s) is the number of bits of t XOR s: 0 for the token itself, one more when the distance doubles.
With λ = 1 it is Mamba-2. Time and memory grow with the number of levels, of which T tokens use log T.
Source: Guo et al. 2025 (arXiv:2506.04761); the layer as in flash-linear-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.nn import (
    GatedRMSNorm,
    ShortConv,
    carried,
    checked,
    fitting,
    head_width,
    heads,
    parts,
    positions,
    scaled,
    wide,
)
from riverrun.nn.fenwick import fenwick
from riverrun.nn.init import log_rate, step_size_bias


class LogLinear(nn.Module):
    """arXiv:2506.04761. State: (S (B, L - 1, H, N, P), conv (B, window - 1, H·P + 2·G·N), position (B)).

    P = expand · width / H, L = num_levels, N = num_states; G groups share B and C among H / G heads each.
    A document begins a new tree, empty as after a reset, every 2^{L-1} tokens: take L for the longest.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        num_states: int = 64,
        num_groups: int = 1,
        num_levels: int = 15,
        expand: int = 2,
        window: int = 4,
    ):
        super().__init__()
        E, H, G, N, L = expand * width, num_heads, num_groups, num_states, num_levels
        head_width(E, H)
        head_width(H, G, "num_groups", "num_heads")
        if not 2 <= L <= 32:
            raise ValueError(
                f"num_levels = {L}; accepted are 2 to 32, for documents of 2^{{num_levels - 1}} tokens"
            )
        self.width, self.num_heads, self.num_groups, self.num_levels = width, H, G, L
        self.sizes, self.inner = (E, E + 2 * G * N, H, H * L), (E, G * N, G * N)
        self.state_shape = (L - 1, H, N, E // H)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [z, (x, B, C), dt, l]
        self.conv = ShortConv(self.sizes[1], window, bias=True)
        self.log_rate, self.dt_bias = log_rate(H), step_size_bias(H)
        self.levels = nn.Parameter(torch.ones(H, L))  # Λ
        self.skip = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(E, E // G, 1e-5, before=True)
        self.out = nn.Linear(E, width, bias=False)

    def forward(
        self,
        x: Tensor,
        state: tuple[Tensor, Tensor, Tensor] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        S, past, start = carried(self, x, state, reset, 3)
        S, start = fitting(self, S, x.shape[0], *self.state_shape), fitting(self, start, x.shape[0])
        position, start = positions(x, start, reset)
        z, u, dt, level = parts(self.inp, x, self.sizes)
        u, past = self.conv(u, past, reset)
        u, B, C = u.split(self.inner, -1)
        u, B, C = heads(u, self.num_heads), heads(B, self.num_groups), heads(C, self.num_groups)
        dt = F.softplus(wide(dt) + wide(self.dt_bias))
        g = -wide(self.log_rate).exp() * dt
        weight = F.softplus(wide(self.levels) * wide(heads(level, self.num_heads)))
        y, S = fenwick(C, B, scaled(u, dt), g, weight, position, S)
        y = y.to(u.dtype) + self.skip[:, None] * u
        return self.out(self.norm(y.flatten(2), z)), (S, past, start)
