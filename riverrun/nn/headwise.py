"""Block-diagonal matrices: each head, or small group of channels, by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .check import head_width


class Headwise(nn.Module):
    """(..., width) -> (count, ..., width): `count` maps with `blocks` blocks on their matrices' diagonals."""

    def __init__(self, width: int, blocks: int, count: int, what: str = "blocks"):
        super().__init__()
        size = head_width(width, blocks, what)
        self.weight = nn.Parameter(torch.randn(count, blocks, size, size) * size**-0.5)  # [out, in] last

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(-1, (self.weight.shape[1], -1))
        return torch.einsum("...hi,ghoi->g...ho", x, self.weight).flatten(-2)
