"""Liger attention: an attention layer's own weights as a gated recurrence, blended with a window of softmax.

    q, k, v = W x    g = log σ(pool(k)) / τ    q' = softmax(q), k' = softmax(k) over the channels of a head
    S_t = diag(e^{g_t}) S_{t-1} + k'_t v_tᵀ    y_t = w_1 attention in a window + w_2 S_tᵀ q'_t    out = W_o y

There is nothing to learn that `attention` has not: its weights load here by their names. pool takes the mean
of `pool` neighbouring channels, which then share a gate; the authors' code has 1.
Source: Lan et al. 2025 (arXiv:2503.01496); w_1 = w_2 = 1/2, τ = 16 and a window of 64 as in its code.
"""

from __future__ import annotations

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import NOT_NEGATIVE, attend, carried, checked, head_width, heads, wide
from riverrun.nn.attend import Cache, grouped, pairs


class Liger(nn.Module):
    """arXiv:2503.01496. State: (S (B, H, K, K), cache as in `sliding_window`) with K = width / H.

    H query heads share G key/value heads; G = H unless given. `blend` is (w_1, w_2).
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        window: int = 64,
        blend: Annotated[tuple[float, float], NOT_NEGATIVE] = (0.5, 0.5),
        pool: int = 1,
        temperature: float = 16.0,
        base: float = 10_000.0,
    ):
        super().__init__()
        K, G = pairs(width, num_heads, window), grouped(num_heads, num_key_heads)
        head_width(K, pool, "pool")
        self.width, self.num_heads, self.num_key_heads = width, num_heads, G
        self.window, self.blend, self.pool = window, blend, pool
        self.temperature, self.base = temperature, base
        self.sizes = (width, G * K, G * K)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v]
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Cache] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Cache]]:
        S, cache = carried(self, x, state, reset, 2)
        cache = carried(self, x, cache, reset, 3)
        q, k, v = self.inp(x).split(self.sizes, -1)
        q, k, v = heads(q, self.num_heads), heads(k, self.num_key_heads), heads(v, self.num_key_heads)
        near, cache = attend(q, k, v, cache, reset, self.window, self.base)
        k, v = (p.repeat_interleave(self.num_heads // self.num_key_heads, 2) for p in (k, v))
        g = F.logsigmoid(wide(self.pooled(k))) / self.temperature
        far, S = ops.outer(q.softmax(-1), k.softmax(-1), v, g, state=S, reset=reset)
        y = self.blend[0] * near + self.blend[1] * far
        return self.out(y.flatten(2)), (S, cache)

    def pooled(self, k: Tensor) -> Tensor:
        """k (..., K) with every `pool` channels replaced by their mean."""
        if self.pool == 1:
            return k
        parts = k.unflatten(-1, (-1, self.pool))
        return parts.mean(-1, keepdim=True).expand(parts.shape).flatten(-2)
