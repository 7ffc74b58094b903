"""LaCT: a large memory that moves once in a large chunk, and window attention for what is near.

    q, k, v = W x    a_t = softmax attention of q, k, v over the last `window` steps
    q', k' = silu(s ⊙ (q, k) + o), of length one    v' = silu(v)    η = softplus(W_l x + c), one a matrix
    f(x) = (silu(x W_1) ⊙ x W_3) W_2    y_t = f(q'_t)    A = Σ η ∇ f(k')·v' over the chunk, whose end moves f:
    W ← n(W + orthogonal(A)), where n makes each unit's weights as long as at first
    out = W_o (a + norm(y) ⊙ silu(W_s x))

The order of tokens in a chunk does not matter to the memory; the window, at least as long as the chunk if
nothing is to be missed, sees it. Source: Zhang et al. 2025 (arXiv:2505.23884) sec. 3 and 4.2, and its code
for language. Of its options, norms of q and k, positions in q' and k' and momentum over chunks are missing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.nn import RMSNorm, attend, carried, checked, head_width, heads, unit, wide
from riverrun.nn.attend import Cache, pairs
from riverrun.nn.init import inverse_softplus
from riverrun.nn.memory import Memory
from riverrun.recurrences.memory import Rule
from riverrun.state import State


class LaCT(nn.Module):
    """arXiv:2505.23884. State: (((W_1, W_2, W_3), A, (), count), cache): W_1, W_3 (B, M, P, E), W_2 (B, M, E,
    P) and A alike, for M memories of width P = width / M, E = expand · P; cache as in `sliding_window`.

    `muon` orthogonalises the step; without it the plain gradient is added.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_memories: int = 1,
        window: int = 2048,
        chunk: int = 2048,
        expand: int = 2,
        muon: bool = True,
        base: float = 0.001,
        eps: float = 1e-6,
    ):
        super().__init__()
        pairs(width, num_heads, window)
        P = head_width(width, num_memories, "num_memories")
        self.width, self.num_heads, self.num_memories, self.window = width, num_heads, num_memories, window
        self.inp = nn.Linear(width, 3 * width, bias=False)  # [q, k, v]
        self.gate = nn.Linear(width, 4 * num_memories)  # [η of each matrix, s]
        with torch.no_grad():
            self.gate.bias[: 3 * num_memories] = inverse_softplus(torch.tensor(base))
        self.stretch = nn.Parameter(torch.stack([torch.ones(2 * width), torch.zeros(2 * width)]))
        rule = Rule("swiglu", "dot", "muon" if muon else "norm", chunk=chunk)
        self.memory = Memory(rule, num_memories, P, expand, residual=False)
        self.norm = RMSNorm(P, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[State, Cache] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Cache]]:
        learned, cache = carried(self, x, state, reset, 2)
        qkv, M = self.inp(x), self.num_memories
        q, k, v = (heads(p, self.num_heads) for p in qkv.chunk(3, -1))
        near, cache = attend(q, k, v, carried(self, x, cache, reset, 3), reset, self.window)
        qk, v = qkv.split([2 * self.width, self.width], -1)
        q, k = (heads(p, M) for p in F.silu(qk * self.stretch[0] + self.stretch[1]).chunk(2, -1))
        lr, scale = self.gate(x).split([3 * M, M], -1)
        gates = {"lr": F.softplus(wide(lr)).unflatten(-1, (M, 3))}
        far, learned = self.memory(unit(q), unit(k), heads(F.silu(v), M), gates, learned, reset)
        far = self.norm(far) * F.silu(scale)[..., None]
        return self.out(near.flatten(2) + far.flatten(2)), (learned, cache)
