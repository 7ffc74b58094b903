"""Short causal convolution, one filter a channel: a recurrence whose state is the last W - 1 inputs.

    y_t[d] = c[d] + Σ_{j<W} w[d, W-1-j] x_{t-j}[d]

    x, y: (B, T, D)    w: (D, W)    c: (D)    state: (B, W - 1, D)

The last column of w meets the newest input, which is the layout of a depthwise `nn.Conv1d` without its middle
axis. `short_conv_silu` is y σ(y) of the same y, as most mixers want it: one pass instead of two.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .fold import Recurrence


def step(past: Tensor, x: Tensor, w: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    window = torch.cat([past, x[:, None]], 1)
    y = torch.einsum("bwd,dw->bd", window, w)
    return window[:, 1:], y if c is None else y + c


def step_silu(past: Tensor, x: Tensor, w: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    past, y = step(past, x, w, c)
    return past, F.silu(y)


def initial(x: Tensor, w: Tensor, c: Tensor | None) -> Tensor:
    return x.new_zeros(x.shape[0], w.shape[1] - 1, x.shape[2])


short_conv = Recurrence(
    "short_conv", step, initial, {"x": "B T D", "w": "D W", "c": "D ?"}, y="B T D", state="B W-1 D", like="x"
)
short_conv_silu = replace(short_conv, name="short_conv_silu", step=step_silu)
