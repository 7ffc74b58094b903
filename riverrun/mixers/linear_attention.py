"""Linear attention: a product of positive features for softmax's kernel, so the past sums into a matrix.

    q, k, v = W x    φ(u) = elu(u) + 1    S_t = S_{t-1} + φ(k_t) [v_t, 1]ᵀ    [a_t, c_t] = S_tᵀ φ(q_t)
    y = W_o (a_t / c_t)

Source: Katharopoulos et al. 2020 (arXiv:2006.16236) eq. 7 and 18-20. The normaliser is one more value column.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import carried, checked, head_width, heads, wide
from riverrun.nn.feature import positive


class LinearAttention(nn.Module):
    """arXiv:2006.16236. State: S (B, H, K, K + 1) with K = width / H."""

    @checked
    def __init__(self, width: int, num_heads: int = 4, eps: float = 1e-6):
        super().__init__()
        head_width(width, num_heads)
        self.width, self.num_heads, self.eps = width, num_heads, eps
        self.inp = nn.Linear(width, 3 * width, bias=False)  # [q, k, v]
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = carried(self, x, state, reset)
        q, k, v = (heads(p, self.num_heads) for p in self.inp(x).chunk(3, -1))
        # sums of many positive terms leave half precision's range; the quotient is taken in a wider one
        v = F.pad(wide(v), (0, 1), value=1.0)
        y, state = ops.outer(positive(q), positive(k), v, state=state, reset=reset)
        y = y[..., :-1] / (y[..., -1:] + self.eps)
        return self.out(y.flatten(2).to(q.dtype)), state
