"""Mamba-2: a state space with one decay a head, which makes it linear attention with a forget gate.

    [z, u, dt] = W x    [x', B, C] = silu(conv(u))    dt = clamp(softplus(dt + c))    g = -A dt
    S_t = e^{g_t} S_{t-1} + B_t (dt_t x'_t)ᵀ    y_t = S_tᵀ C_t + D x'_t    out = W_o norm(y ⊙ silu(z))

Source: Dao & Gu 2024 (arXiv:2405.21060) sec. 7 and fig. 6; the layout of its code, whose norm is after the
gate.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import (
    NOT_NEGATIVE,
    GatedRMSNorm,
    ShortConv,
    carried,
    checked,
    head_width,
    heads,
    parts,
    scaled,
    wide,
)
from riverrun.nn.beyond import switches
from riverrun.nn.init import log_rate, step_size_bias


class Mamba2(nn.Module):
    """arXiv:2405.21060. State: (S (B, H, N, P), conv (B, window - 1, H·P + 2·G·N)) with P = expand · width /
    H.

    G groups share B and C among H / G heads each. `step_limits` bounds dt, for any T alike. The norm is taken
    over each of `num_norm_groups` parts, G unless given. `beyond`: what to do past the length of training,
    arguments of `riverrun.nn.beyond.Beyond`, whose state is then in the place of S.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        num_states: int = 64,
        num_groups: int = 1,
        expand: int = 2,
        window: int = 4,
        step_limits: Annotated[tuple[float, float], NOT_NEGATIVE] = (0.0, math.inf),
        num_norm_groups: int | None = None,
        beyond: dict[str, Any] | None = None,
    ):
        super().__init__()
        E, H, G, N = expand * width, num_heads, num_groups, num_states
        head_width(E, H)
        head_width(H, G, "num_groups", "num_heads")
        self.width, self.num_heads, self.num_groups, self.step_limits = width, H, G, step_limits
        self.sizes, self.inner = (E, E + 2 * G * N, H), (E, G * N, G * N)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [z, (x, B, C), dt]
        self.conv = ShortConv(self.sizes[1], window, bias=True)
        self.log_rate, self.dt_bias = log_rate(H), step_size_bias(H)
        self.skip = nn.Parameter(torch.ones(H))
        self.norm = GatedRMSNorm(E, head_width(E, num_norm_groups or G, "num_norm_groups"), 1e-5, before=True)
        self.beyond = switches(H, beyond)
        self.out = nn.Linear(E, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, past = carried(self, x, state, reset, 2)
        z, u, dt = parts(self.inp, x, self.sizes)
        u, past = self.conv(u, past, reset)
        u, B, C = u.split(self.inner, -1)
        u, B, C = heads(u, self.num_heads), heads(B, self.num_groups), heads(C, self.num_groups)
        dt = F.softplus(wide(dt) + wide(self.dt_bias)).clamp(*self.step_limits)
        rate = wide(self.log_rate).exp()
        if self.beyond is None:
            y, S = ops.outer(C, B, scaled(u, dt), -rate * dt, state=S, reset=reset)
        else:
            y, S = self.beyond.outer(C, B, u, dt, rate, S, reset)
        return self.out(self.norm(y.flatten(2), z, (self.skip, u))), (S, past)
