"""Mamba: a diagonal state space per channel whose step size, input map and output map depend on the input.

    u = silu(conv(W_u x))    dt = softplus(W_dt δ + c), [δ, B, C] = W u    A = -e^{log_rate}
    h = exp(dt A) ⊙ h + dt u Bᵀ    y = W_o ((h C + D ⊙ u) ⊙ silu(W_z x))

All but the maps in and out is `riverrun.nn.SelectiveScan`, which other mixers stand on too.
Source: Gu & Dao 2023 (arXiv:2312.00752) algorithm 2 and fig. 3.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.nn import SelectiveScan, carried, checked
from riverrun.state import State


class Mamba(nn.Module):
    """arXiv:2312.00752. State: (h (B, E, N), conv (B, window - 1, E)) with E = expand · width.

    `negative_eigenvalues`: h = (2 exp(dt A) - 1) ⊙ h + dt u Bᵀ, see `riverrun.nn.signed`. `beyond`: what to
    do past the length of training, arguments of `riverrun.nn.beyond.Beyond`; h is then (h, position (B)).
    """

    @checked
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
        E, self.width = expand * width, width
        self.inp = nn.Linear(width, 2 * E, bias=False)  # [u, z]
        rank = rank or -(-width // 16)
        self.scan = SelectiveScan(E, num_states, rank, window, negative_eigenvalues, beyond)
        self.out = nn.Linear(E, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[State, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Tensor]]:
        h, past = carried(self, x, state, reset, 2)
        u, z = self.inp(x).chunk(2, -1)
        y, state = self.scan(u, h, past, reset)
        return self.out(y * F.silu(z)), state
