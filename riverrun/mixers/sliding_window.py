"""Softmax attention over the last W steps: exact about the recent past, blind to the rest, of constant size.

    q, k, v = W x    y_t = Σ_{t - W < s ≤ t} softmax_s(q_tᵀ R(t - s) k_s / sqrt(K)) v_s    out = W_o y

Sources: Beltagy et al. 2020 (Longformer, arXiv:2004.05150) sec. 3.1, made causal as in Jiang et al. 2023
(Mistral 7B, arXiv:2310.06825) sec. 2; rotary positions and groups as in `attention`.
"""

from __future__ import annotations

from torch import Tensor, nn

from riverrun.nn import attend, carried, checked, heads
from riverrun.nn.attend import Cache, grouped, pairs


class SlidingWindow(nn.Module):
    """arXiv:2004.05150. State: (kv (B, 2·G, window - 1, K), start (B), filled (B)), as nn.attend explains.

    H query heads share G key/value heads; G = H unless given. A step sees itself and window - 1 before it.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        window: int = 256,
        base: float = 10_000.0,
    ):
        super().__init__()
        K, G = pairs(width, num_heads, window), grouped(num_heads, num_key_heads)
        self.width, self.num_heads, self.num_key_heads = width, num_heads, G
        self.window, self.base = window, base
        self.sizes = (width, G * K, G * K)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v]
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: Cache | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        cache = carried(self, x, state, reset, 3)
        q, k, v = self.inp(x).split(self.sizes, -1)
        q, k, v = heads(q, self.num_heads), heads(k, self.num_key_heads), heads(v, self.num_key_heads)
        y, cache = attend(q, k, v, cache, reset, self.window, self.base)
        return self.out(y.flatten(2)), cache
