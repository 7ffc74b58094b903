"""Mamba's recurrence with all that it reads of its input: what a mixer puts between its maps in and out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops

from .conv import ShortConv
from .init import step_size_bias
from .shape import wide


class SelectiveScan(nn.Module):
    """u = silu(conv u), [δ, B, C] = W u, dt = softplus(W_dt δ + c); h = e^{dt A} h + dt u Bᵀ, y = h C + D u.

    u, y: (B, T, E). State: (h (B, E, N), conv (B, window - 1, E)).
    Source: Gu & Dao 2023 (arXiv:2312.00752) algorithm 2.
    """

    def __init__(self, width: int, num_states: int, rank: int, window: int = 4):
        super().__init__()
        N, R = num_states, rank
        self.sizes = (R, N, N)
        self.conv = ShortConv(width, window, bias=True)
        self.dt_bc = nn.Linear(width, R + 2 * N, bias=False)  # [δ, B, C]
        self.dt = nn.Linear(R, width)
        nn.init.uniform_(self.dt.weight, -(R**-0.5), R**-0.5)
        self.dt.bias = step_size_bias(width)
        rates = torch.arange(1, N + 1, dtype=torch.get_default_dtype())
        self.log_rate = nn.Parameter(rates.log().repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))

    def forward(
        self,
        u: Tensor,
        h: Tensor | None = None,
        past: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        u, past = self.conv(u, past, reset)
        delta, B, C = self.dt_bc(u).split(self.sizes, -1)
        dt = F.softplus(wide(self.dt(delta)))
        y, h = ops.selective(u, dt, -wide(self.log_rate).exp(), B, C, state=h, reset=reset)
        return y + self.skip * u, (h, past)
