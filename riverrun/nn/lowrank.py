"""A matrix of low rank with something between its factors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class LowRank(nn.Module):
    """U f(V x) + b, with V (rank, width) and U (out, rank): few parameters for what needs little freedom."""

    def __init__(
        self,
        width: int,
        rank: int,
        out: int,
        activation: Callable[[Tensor], Tensor] = nn.Identity(),  # noqa: B008
        bias: Tensor | None = None,
    ):
        super().__init__()
        self.inp, self.activation = nn.Linear(width, rank, bias=False), activation
        self.out = nn.Linear(rank, out, bias=bias is not None)
        if bias is not None:
            with torch.no_grad():
                self.out.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.onward(self.inp(x))

    def onward(self, low: Tensor) -> Tensor:
        """From V x on."""
        return self.out(self.activation(low))
