"""VSSD: Mamba-2 without order. Each token weighs what it writes; all of it is one state, which all read.

    [z, u, dt] = W x    [x', B, C] = silu(conv(u))    m = A softplus(dt + c)
    S = Σ_s m_s B_s x'_sᵀ    y_t = Sᵀ C_t + D x'_t    out = W_o (norm(y) ⊙ z)

The convolution looks around every token, in a picture in both dimensions; without it tokens may be permuted.
Source: Shi et al. 2024 (arXiv:2407.18559); the layout of its code, whose norm is a layer norm and whose
gate z is linear.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.nn import LocalConv, checked, head_width, heads, parts, pooled, whole, wide
from riverrun.nn.init import log_rate, step_size_bias


class VSSD(nn.Module):
    """arXiv:2407.18559. State: none, it sees both ways. G groups share B and C among H / G heads each.

    `columns`: how many tokens make a row of a picture; None for sequences.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        num_states: int = 64,
        num_groups: int = 1,
        expand: int = 2,
        window: int = 3,
        columns: int | None = None,
    ):
        super().__init__()
        E, H, G, N = expand * width, num_heads, num_groups, num_states
        head_width(E, H)
        head_width(H, G, "num_groups", "num_heads")
        self.width, self.num_heads, self.num_groups, self.columns = width, H, G, columns
        self.sizes, self.inner = (E, E + 2 * G * N, H), (E, G * N, G * N)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [z, (x, B, C), dt]
        self.conv = LocalConv(self.sizes[1], (window, window))
        self.log_rate, self.dt_bias = log_rate(H), step_size_bias(H)
        self.skip = nn.Parameter(torch.ones(H))
        self.norm = nn.LayerNorm(E)
        self.out = nn.Linear(E, width, bias=False)

    def forward(
        self, x: Tensor, state: None = None, reset: Tensor | None = None, columns: int | None = None
    ) -> tuple[Tensor, None]:
        whole(self, x, state, reset)
        z, u, dt = parts(self.inp, x, self.sizes)
        u = F.silu(self.conv(u, columns or self.columns, reset))
        u, B, C = u.split(self.inner, -1)
        u, B, C = heads(u, self.num_heads), heads(B, self.num_groups), heads(C, self.num_groups)
        weight = wide(self.log_rate).exp() * F.softplus(wide(dt) + wide(self.dt_bias))
        y = pooled(C, B, weight[..., None] * u, reset).to(u.dtype) + self.skip[:, None] * u
        return self.out(self.norm(y.flatten(2)) * z), None
