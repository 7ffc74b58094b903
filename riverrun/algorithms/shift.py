"""The short convolution as W shifted products, all times at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from riverrun.recurrences import short_conv as _short_conv


def short_conv(
    x: Tensor, w: Tensor, c: Tensor | None, state: Tensor | None = None, reset: Tensor | None = None
):
    """A reset cuts the taps that would reach across it and what the state keeps from before it."""
    T, W = x.shape[1], w.shape[1]
    past = torch.cat([_short_conv.initial(x, w, c) if state is None else state, x], 1)
    segment = None
    if reset is not None:  # number of resets so far; the incoming inputs stand before all of them
        segment = F.pad(reset.long().cumsum(1), (W - 1, 0))[..., None]
    y = torch.zeros_like(x)
    for j in range(W):
        tap = past[:, j : j + T]
        if segment is not None:
            tap = tap * (segment[:, j : j + T] == segment[:, W - 1 :])
        y = y + tap * w[:, j]
    tail = past[:, T:]
    if segment is not None:
        tail = tail * (segment[:, T:] == segment[:, -1:])
    return y if c is None else y + c, tail


def short_conv_silu(
    x: Tensor, w: Tensor, c: Tensor | None, state: Tensor | None = None, reset: Tensor | None = None
):
    y, tail = short_conv(x, w, c, state, reset)
    return F.silu(y), tail
