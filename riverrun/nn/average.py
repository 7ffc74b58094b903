"""Direct paths from earlier layers to later ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class WeightedAverage(nn.Module):
    """Σ_i w_i x_i over what `count` earlier layers gave, with learned weights that begin as their mean.

    Behrouz et al. 2024 (arXiv:2403.19888) feed every block such an average of all outputs before it.
    """

    def __init__(self, count: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((count,), 1 / count))

    def forward(self, xs: Sequence[Tensor]) -> Tensor:
        if len(xs) != len(self.weight):
            raise ValueError(f"{len(xs)} tensors for an average of {len(self.weight)}: one weight each")
        return sum((w * x for w, x in zip(self.weight, xs, strict=True)), torch.zeros_like(xs[0]))
