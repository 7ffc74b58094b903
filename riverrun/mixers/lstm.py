"""LSTM: a cell that keeps, writes and shows by three gates, which read the input and the last output.

    i, f, z, o = W x_t + b + R h_{t-1} + c
    s_t = σ(f) ⊙ s_{t-1} + σ(i) ⊙ tanh(z)    y_t = h_t = σ(o) ⊙ tanh(s_t)

Source: Hochreiter & Schmidhuber 1997 with the forget gate of Gers et al. 2000; the layout of `torch.nn.LSTM`,
whose two biases are kept so that weights move without arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import carried, checked
from riverrun.nn.init import recurrent
from riverrun.nn.shape import gates


class LSTM(nn.Module):
    """Hochreiter & Schmidhuber 1997. State: (h (B, H, P), s (B, H, P)) with P = width / H.

    H = 1 is the ordinary LSTM. With more, R is block-diagonal, H times smaller: Pöppel et al. 2024.
    """

    @checked
    def __init__(self, width: int, num_heads: int = 1):
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.R, self.c = recurrent(4, width, num_heads)
        self.inp = nn.Linear(width, 4 * width)  # [i, f, z, o]
        with torch.no_grad():
            self.inp.bias[width : 2 * width] += 1  # remember at first: Jozefowicz et al. 2015

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        state = carried(self, x, state, reset)
        y, state = ops.lstm(gates(self.inp(x), 4, self.num_heads), self.R, self.c, state=state, reset=reset)
        return y.flatten(2), state
