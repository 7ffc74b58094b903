"""minGRU: a GRU whose gate and candidate read the input only, which makes it a diagonal linear recurrence.

    z_t = σ(W_z x_t)    u_t = W_h x_t    h_t = (1 - z_t) ⊙ h_{t-1} + z_t ⊙ u_t    y = W_o h

Source: Feng et al. 2024 (arXiv:2410.01201) sec. 3.1. With `positive`, u = g(W_h x), where g(a) is a + 1/2 for
a ≥ 0 and σ(a) below: its appendix B.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import carried, checked, wide


class MinGRU(nn.Module):
    """arXiv:2410.01201. State: h (B, E) with E = expand · width."""

    @checked
    def __init__(self, width: int, expand: int = 1, positive: bool = False):
        super().__init__()
        self.width, self.positive = width, positive
        self.inp = nn.Linear(width, 2 * expand * width, bias=False)  # [u, z]
        self.out = nn.Linear(expand * width, width, bias=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = carried(self, x, state, reset)
        u, z = wide(self.inp(x)).chunk(2, -1)
        if self.positive:
            u = torch.where(u >= 0, u + 0.5, u.sigmoid())
        h, state = ops.diagonal((-z).sigmoid(), z.sigmoid() * u, state=state, reset=reset)
        return self.out(h.to(x.dtype)), state
