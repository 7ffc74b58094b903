"""Softmax attention, causal, with rotary positions and grouped queries: it forgets nothing and grows.

    q, k, v = W x    y_t = Σ_{s ≤ t} softmax_s(q_tᵀ R(t - s) k_s / sqrt(K)) v_s    out = W_o y

Sources: Vaswani et al. 2017 (arXiv:1706.03762) eq. 1; Su et al. 2021 (arXiv:2104.09864); Ainslie et al. 2023
(arXiv:2305.13245) for the groups. The layout is Llama's: heads of width K = width / H, halves of K as pairs.
"""

from __future__ import annotations

from torch import Tensor, nn

from riverrun.nn import attend, carried, checked, heads
from riverrun.nn.attend import Cache, grouped, pairs, room, trimmed


class Attention(nn.Module):
    """arXiv:1706.03762. State: (kv (B, 2·G, n, K), start (B), filled (B)) after n steps, as nn.attend
    explains.

    H query heads share G key/value heads; G = H unless given. With gradients, and in compiled code, every
    call copies the state; otherwise a step is appended in place.
    """

    room, trimmed = staticmethod(room), staticmethod(trimmed)  # for steps that are recorded

    @checked
    def __init__(
        self, width: int, num_heads: int = 4, num_key_heads: int | None = None, base: float = 10_000.0
    ):
        super().__init__()
        K, G = pairs(width, num_heads), grouped(num_heads, num_key_heads)
        self.width, self.num_heads, self.num_key_heads, self.base = width, num_heads, G, base
        self.sizes = (width, G * K, G * K)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v]
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: Cache | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Cache]:
        cache = carried(self, x, state, reset, 3)
        q, k, v = self.inp(x).split(self.sizes, -1)
        q, k, v = heads(q, self.num_heads), heads(k, self.num_key_heads), heads(v, self.num_key_heads)
        y, state = attend(q, k, v, cache, reset, base=self.base)
        return self.out(y.flatten(2)), state
