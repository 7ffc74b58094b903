"""The gated feed-forward layer between mixers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.ops import gpu

from .remade import mapped


class GatedMLP(nn.Module):
    """SwiGLU: W_out (silu(W_gate x) ⊙ W_up x). Shazeer 2020 (arXiv:2002.05202) eq. 6.

    `inner` defaults to 8/3 of the width rounded up to a multiple of 64: the parameters of a plain MLP of 4
    times the width.
    """

    def __init__(self, width: int, inner: int | None = None):
        super().__init__()
        inner = inner or -(-8 * width // 3 // 64) * 64
        self.inp = nn.Linear(width, 2 * inner, bias=False)  # [gate, up]
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.inp(x)
        if gpu is not None and gpu.swiglu.refuses(both) is None:
            return mapped(gpu.swiglu, (both,), [self.out], [0])[0]
        gate, up = both.chunk(2, -1)
        return self.out(F.silu(gate) * up)
