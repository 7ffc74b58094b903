"""HGRN2: a gated linear RNN with its state expanded to a matrix; the key is what the forget gate lets go.

    q = silu(W_q x)    f = l + (1 - l) σ(W_f x)    i = W_i x
    S_t = diag(f_t) S_{t-1} + (1 - f_t) i_tᵀ    y_t = S_tᵀ q_t    out = W_o norm(y)

Source: Qin et al. 2024 (arXiv:2404.07904) sec. 3. The lower bound l, which the paper learns so that it rises
from layer to layer, is a constant of each layer here: a mixer does not see the others.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import FRACTION, RMSNorm, carried, checked, head_width, heads, wide


class HGRN2(nn.Module):
    """arXiv:2404.07904. State: S (B, H, K, K) with K = width / H. `lower_bound` l in [0, 1) of the forget
    gates."""

    @checked
    def __init__(
        self, width: int, num_heads: int = 4, lower_bound: Annotated[float, FRACTION] = 0.0, eps: float = 1e-6
    ):
        super().__init__()
        head_width(width, num_heads)
        self.width, self.num_heads, self.lower_bound = width, num_heads, lower_bound
        self.inp = nn.Linear(width, 3 * width, bias=False)  # [q, f, i]
        self.norm = RMSNorm(width, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = carried(self, x, state, reset)
        q, f, i = (heads(p, self.num_heads) for p in self.inp(x).chunk(3, -1))
        f, bound = wide(f), self.lower_bound
        g, k = F.logsigmoid(f), (1 - bound) * (-f).sigmoid()  # 1 - f without cancellation
        if bound:
            g = torch.logaddexp(g + math.log1p(-bound), torch.full_like(g, math.log(bound)))
        y, state = ops.outer(F.silu(q), k, i, g, state=state, reset=reset)
        return self.out(self.norm(y.flatten(2))), state
