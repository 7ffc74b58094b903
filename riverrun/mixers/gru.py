"""GRU: one vector that is at once memory and output, with a gate to keep it and a gate to look away from it.

    r, u, z = W x_t + b    r = σ(r + R_r h + c_r)    u = σ(u + R_u h + c_u)    h = h_{t-1}
    y_t = h_t = u ⊙ h + (1 - u) ⊙ tanh(z + r ⊙ (R_z h + c_z))

Source: Cho et al. 2014 (arXiv:1406.1078) eq. 5-8, with r after the matrix; the layout of `torch.nn.GRU`,
whose two biases are kept so that weights move without arithmetic.
"""

from __future__ import annotations

from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import carried, checked
from riverrun.nn.init import recurrent
from riverrun.nn.shape import gates


class GRU(nn.Module):
    """arXiv:1406.1078. State: (h (B, H, P),) with P = width / H.

    H = 1 is the ordinary GRU. With more, R is block-diagonal, H times smaller: Pöppel et al. 2024.
    """

    @checked
    def __init__(self, width: int, num_heads: int = 1):
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.R, self.c = recurrent(3, width, num_heads)
        self.inp = nn.Linear(width, 3 * width)  # [r, u, z]

    def forward(
        self, x: Tensor, state: tuple[Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor]]:
        state = carried(self, x, state, reset)
        y, state = ops.gru(gates(self.inp(x), 3, self.num_heads), self.R, self.c, state=state, reset=reset)
        return y.flatten(2), state
