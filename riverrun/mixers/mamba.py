"""Mamba: a diagonal state space per channel whose step size, input map and output map depend on the input.

    u = silu(conv(W_u x))    dt = softplus(W_dt δ + c), [δ, B, C] = W u    A = -e^{log_rate}
    h = exp(dt A) ⊙ h + dt u Bᵀ    y = W_o ((h C + D ⊙ u) ⊙ silu(W_z x))

Source: Gu & Dao 2023 (arXiv:2312.00752) algorithm 2 and fig. 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import ShortConv, carried, fitting, wide
from riverrun.nn.beyond import switches
from riverrun.nn.init import step_size_bias
from riverrun.nn.signed import signed_selective


class Mamba(nn.Module):
    """arXiv:2312.00752. State: (h (B, E, N), conv (B, window - 1, E)) with E = expand · width.

    `negative_eigenvalues`: h = (2 exp(dt A) - 1) ⊙ h + dt u Bᵀ, see `riverrun.nn.signed`. `beyond`: what to
    do past the length of training, arguments of `riverrun.nn.beyond.Beyond`; h is then (h, position (B)).
    """

    def __init__(
        self,
        width: int,
        num_states: int = 16,
        expand: int = 2,
        window: int = 4,
        rank: int | None = None,
        negative_eigenvalues: bool = False,
        beyond: dict[str, Any] | None = None,
    ):
        super().__init__()
        E, N, R = expand * width, num_states, rank or -(-width // 16)
        self.width, self.sizes, self.negative_eigenvalues = width, (R, N, N), negative_eigenvalues
        self.inp = nn.Linear(width, 2 * E, bias=False)  # [u, z]
        self.conv = ShortConv(E, window, bias=True)
        self.dt_bc = nn.Linear(E, R + 2 * N, bias=False)  # [δ, B, C]
        self.dt = nn.Linear(R, E)
        nn.init.uniform_(self.dt.weight, -(R**-0.5), R**-0.5)
        self.dt.bias = step_size_bias(E)
        rates = torch.arange(1, N + 1, dtype=torch.get_default_dtype())
        self.log_rate = nn.Parameter(rates.log().repeat(E, 1))
        self.skip = nn.Parameter(torch.ones(E))
        self.beyond = switches(E, beyond)
        self.out = nn.Linear(E, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, past = carried(self, x, state, reset, 2)
        u, z = self.inp(x).chunk(2, -1)
        u, past = self.conv(u, past, reset)
        delta, B, C = self.dt_bc(u).split(self.sizes, -1)
        dt = F.softplus(wide(self.dt(delta)))
        A = -wide(self.log_rate).exp()
        op = signed_selective if self.negative_eigenvalues else ops.selective
        if self.beyond is None:
            h = fitting(self, h, x.shape[0], *A.shape)
            y, h = op(u, dt, A, B, C, state=h, reset=reset)
        else:
            y, h = self.beyond.selective(op, u, dt, A, B, C, h, reset)
        return self.out((y + self.skip * u) * F.silu(z)), (h, past)
