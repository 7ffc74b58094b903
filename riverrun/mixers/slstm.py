"""sLSTM: the LSTM with exponential gates, a normaliser, and a recurrent matrix a head, so heads do not mix.

    i, f, z, o = W x_t + R h_{t-1} + c    s_t = σ(f) s_{t-1} + e^i tanh(z)    n_t = σ(f) n_{t-1} + e^i
    h_t = σ(o) ⊙ s_t / n_t    y = W_o norm(h)

Source: Beck et al. 2024 (xLSTM, arXiv:2405.04517) eq. 8-17, with σ for the forget gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import HeadNorm, carried, checked
from riverrun.nn.init import recurrent
from riverrun.nn.shape import gates


class SLSTM(nn.Module):
    """arXiv:2405.04517. State: (h, s, n, m), each (B, H, P), P = width / H; s and n are scaled by e^{-m}."""

    @checked
    def __init__(self, width: int, num_heads: int = 4, eps: float = 1e-6):
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.R, self.c = recurrent(4, width, num_heads)
        with torch.no_grad():
            self.c[1] += torch.linspace(3, 6, width).view_as(
                self.c[1]
            )  # remember at first, some longer than others
        self.inp = nn.Linear(width, 4 * width, bias=False)  # [i, f, z, o]
        self.norm = HeadNorm(width, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, ...] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        state = carried(self, x, state, reset)
        y, state = ops.slstm(gates(self.inp(x), 4, self.num_heads), self.R, self.c, state=state, reset=reset)
        return self.out(self.norm(y)), state
