"""Token shift: what a layer reads is each step mixed with the one before it, in several ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from riverrun.ops import gpu

from .conv import previous
from .remade import mapped


def shifted(
    x: Tensor, mix: Tensor, last: Tensor | None, reset: Tensor | None, layers: Sequence[nn.Module],
    rows: Sequence[int],
) -> tuple[Tensor, ...]:  # fmt: skip
    """`layers[j]` of x + μ ⊙ (x_{t-1} - x), μ = mix[rows[j]], for each j.

    x: (B, T, D)    mix: (N, D)    last: (B, D), the step before the first; zeros for none and at a reset
    """
    if gpu is not None and gpu.shift.refuses(x) is None:
        return mapped(gpu.shift, (x, mix, last, reset), layers, rows)
    step = previous(x, last, reset) - x
    xs = torch.addcmul(x[..., None, :], step[..., None, :], mix).unbind(-2)
    return tuple(cast(Tensor, layer(xs[i])) for layer, i in zip(layers, rows, strict=True))
