"""Mamba's recurrence with all that it reads of its input: what a mixer puts between its maps in and out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.state import State

from .beyond import switches
from .conv import ShortConv
from .init import step_size_bias
from .shape import wide


class SelectiveScan(nn.Module):
    """u = silu(conv u), [δ, B, C] = W u, dt = softplus(W_dt δ + c); h = e^{dt A} h + dt u Bᵀ, y = h C + D u.

    u, y: (B, T, E). State: (h (B, E, N), conv (B, window - 1, E)).
    `negative_eigenvalues`: 2 e^{dt A} - 1 in place of e^{dt A}, see `signed`. `beyond`: what to do past the
    length of training, arguments of `beyond.Beyond`; h is then (h, position (B)).
    Source: Gu & Dao 2023 (arXiv:2312.00752) algorithm 2.
    """

    def __init__(
        self,
        width: int,
        num_states: int,
        rank: int,
        window: int = 4,
        negative_eigenvalues: bool = False,
        beyond: dict[str, Any] | None = None,
    ):
        super().__init__()
        N, R = num_states, rank
        self.sizes, self.negative_eigenvalues = (R, N, N), negative_eigenvalues
        self.conv = ShortConv(width, window, bias=True)
        self.dt_bc = nn.Linear(width, R + 2 * N, bias=False)  # [δ, B, C]
        self.dt = nn.Linear(R, width)
        nn.init.uniform_(self.dt.weight, -(R**-0.5), R**-0.5)
        self.dt.bias = step_size_bias(width)
        rates = torch.arange(1, N + 1, dtype=torch.get_default_dtype())
        self.log_rate = nn.Parameter(rates.log().repeat(width, 1))
        self.skip = nn.Parameter(torch.ones(width))
        self.beyond = switches(width, beyond)

    def forward(
        self, u: Tensor, h: State = None, past: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Tensor]]:
        u, past = self.conv(u, past, reset)
        delta, B, C = self.dt_bc(u).split(self.sizes, -1)
        dt, A = F.softplus(wide(self.dt(delta))), -wide(self.log_rate).exp()
        low = torch.full_like(A, -1) if self.negative_eigenvalues else None
        if self.beyond is None:
            y, h = ops.selective(u, dt, A, B, C, low, state=h, reset=reset)
        else:
            y, h = self.beyond.selective(u, dt, A, B, C, low, h, reset)
        return y + self.skip * u, (h, past)
