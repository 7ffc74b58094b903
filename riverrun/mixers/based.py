"""Based's linear attention: softmax's exponential as its Taylor polynomial of second order.

    q, k, v = W x    φ(q)ᵀφ(k) = 1 + s + s²/2, s = qᵀk / sqrt(d), d = 16
    S_t = S_{t-1} + φ(k_t) [v_t, 1]ᵀ    [a_t, c_t] = S_tᵀ φ(q_t)    y = W_o (a_t / c_t)

Every term of c_t is ((s + 1)² + 1) / 2 ≥ 1/2, so the normaliser needs no eps.
Source: Arora et al. 2024 (arXiv:2402.18668) sec. 4, and its code. The paper's model alternates it with
attention in a window of 64 or 128 and with gated convolutions: in a pattern, "based + sliding_window".
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import carried, checked, head_width, heads, wide
from riverrun.nn.feature import taylor


class Based(nn.Module):
    """arXiv:2402.18668. State: S (B, H, F, V + 1) with V = width / H, F = 1 + d + d (d + 1) / 2."""

    @checked
    def __init__(self, width: int, num_heads: int = 4, feature_width: int = 16):
        super().__init__()
        head_width(width, num_heads)
        self.width, self.num_heads = width, num_heads
        self.sizes = (num_heads * feature_width, num_heads * feature_width, width)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v]
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = carried(self, x, state, reset)
        q, k, v = (heads(p, self.num_heads) for p in self.inp(x).split(self.sizes, -1))
        # sums of many positive terms leave half precision's range; the quotient is taken in a wider one
        v = F.pad(wide(v), (0, 1), value=1.0)
        y, state = ops.outer(taylor(q), taylor(k), v, state=state, reset=reset)
        y = y[..., :-1] / y[..., -1:].clamp(min=0.5)  # less than 1/2 is rounding
        return self.out(y.flatten(2).to(x.dtype)), state
