"""Short convolutions that precede many mixers: causal ones, the step before, and those that look around."""

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
        op = ops.short_conv_silu if self.activation else ops.short_conv
        return op(x, self.weight, self.bias, state=state, reset=reset)


class LocalConv(nn.Module):
    """Depthwise convolution over the neighbours of every token, on both sides or around it in a picture.

        y[r, s] = c + Σ_ij w[i, j] x[r + i - I/2, s + j - J/2]        halves rounded down; zeros outside

    x (B, T, D) is in row-major order with `columns` in a row, one row of any length if None; the last row may
    be incomplete. The weight is (D, I, J), I and J odd: a depthwise `nn.Conv2d` weight, squeezed.
    """

    def __init__(self, width: int, window: tuple[int, int] = (3, 3), bias: bool = True):
        super().__init__()
        if window[0] % 2 == 0 or window[1] % 2 == 0:
            raise ValueError(f"window = {window} of a convolution has no middle; accepted are odd sizes")
        bound = (window[0] * window[1]) ** -0.5  # that of nn.Conv2d, whose fan-in here is the window
        self.window = window
        self.weight = nn.Parameter(torch.empty(width, *window).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(width).uniform_(-bound, bound)) if bias else None

    def forward(self, x: Tensor, columns: int | None = None, reset: Tensor | None = None) -> Tensor:
        T = x.shape[1]
        columns = columns or T
        if reset is not None:
            return self.taps(x, columns, reset)
        picture = F.pad(x.mT, (0, -T % columns)).unflatten(2, (-1, columns))
        around = (self.window[0] // 2, self.window[1] // 2)
        y = F.conv2d(picture, self.weight[:, None], self.bias, padding=around, groups=x.shape[2])
        return y.flatten(2)[..., :T].mT

    def taps(self, x: Tensor, columns: int, reset: Tensor) -> Tensor:
        """The same, tap by tap: a neighbour counts if it is in the same document and in no other row."""
        T, (height, width) = x.shape[1], self.window
        time = torch.arange(T, device=x.device)
        column = (time - torch.where(reset, time, 0).cummax(1).values) % columns
        document, reach = reset.cumsum(1), height // 2 * columns + width // 2
        documents, padded = F.pad(document, (reach, reach), value=-1), F.pad(x, (0, 0, reach, reach))
        y = torch.zeros_like(x)
        for i in range(height):
            for j in range(width):
                aside = j - width // 2
                start = reach + (i - height // 2) * columns + aside
                seen = (documents[:, start : start + T] == document) & (0 <= column + aside)
                seen = (seen & (column + aside < columns))[..., None]
                y = y + padded[:, start : start + T] * seen * self.weight[:, i, j]
        return y if self.bias is None else y + self.bias
