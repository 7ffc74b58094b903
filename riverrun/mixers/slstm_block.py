"""xLSTM's block around sLSTM: gates that see a short convolution, and projections that stay inside heads.

    c = silu(conv(x))    i, f = B_i c, B_f c    z, o = B_z x, B_o x, each B block-diagonal by heads
    h = sLSTM(i, f, z, o; R, b)    y = norm(h)

There is no output matrix: the gated MLP that a model puts after every mixer is the block's own widening, 4/3
of the width in the paper. `slstm` is the plain layer, with full matrices before and after.
Source: Beck et al. 2024 (arXiv:2405.04517) fig. 10, and its code.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import HeadNorm, ShortConv, carried, checked, heads
from riverrun.nn.headwise import Headwise
from riverrun.nn.init import recurrent
from riverrun.state import State


class SLSTMBlock(nn.Module):
    """arXiv:2405.04517. State: ((h, s, n, m), each (B, H, P), conv (B, window - 1, width)), P = width / H."""

    @checked
    def __init__(self, width: int, num_heads: int = 4, window: int = 4, eps: float = 1e-5):
        super().__init__()
        self.width, self.num_heads = width, num_heads
        self.R, self.c = recurrent(4, width, num_heads)
        with torch.no_grad():  # remember at first, some longer than others
            self.c[1] += torch.linspace(3, 6, width).view_as(self.c[1])
        self.conv = ShortConv(width, window, bias=True)
        self.gates = Headwise(width, num_heads, 2)  # [i, f]
        self.values = Headwise(width, num_heads, 2)  # [z, o]
        self.norm = HeadNorm(width, eps)

    def forward(
        self, x: Tensor, state: tuple[State, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Tensor]]:
        cell, past = carried(self, x, state, reset, 2)
        c, past = self.conv(x, past, reset)
        p = torch.cat([self.gates(c), self.values(x)]).movedim(0, 2)
        h, cell = ops.slstm(heads(p, self.num_heads), self.R, self.c, state=cell, reset=reset)
        return self.norm(h), (cell, past)
