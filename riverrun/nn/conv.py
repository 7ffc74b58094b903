"""The short causal convolution that precedes many mixers, and its simplest case, the step before."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops


def previous(x: Tensor, past: Tensor | None, reset: Tensor | None) -> Tensor:
    """x (B, T, D) one step earlier: `past` (B, D) before the first step; zeros for no past and at a reset."""
    past = torch.zeros_like(x[:, 0]) if past is None else past.to(x.dtype)
    before = torch.cat([past[:, None], x[:, :-1]], 1)
    return before if reset is None else before.masked_fill(reset[..., None], 0)


class ShortConv(nn.Module):
    """Depthwise causal convolution over the last `window` steps, then SiLU.

    State: the last inputs (B, window - 1, D). The weight is (D, window) with the newest input last: a
    depthwise `nn.Conv1d` weight (D, 1, window), squeezed.
    """

    def __init__(self, width: int, window: int = 4, bias: bool = False, activation: bool = True):
        super().__init__()
        bound = window**-0.5  # that of nn.Conv1d, whose fan-in here is the window
        self.weight = nn.Parameter(torch.empty(width, window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None
        self.activation = activation

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        y, state = ops.short_conv(x, self.weight, self.bias, state=state, reset=reset)
        return F.silu(y) if self.activation else y, state
