"""Titans: attention for what is near, a deep memory that learns while it reads, and three ways to join them.

    memory  q, k, v = silu(conv(W u)), q and k of length one    M(u)_t = f(W_t; q_t)
            Z_t = η_t Z_{t-1} - θ_t ∇|f(k_t) - v_t|²/2    W_t = (1 - α_t) W_{t-1} + Z_t
            η, 1 - α = σ(W u + c)    θ = base · σ(W u + c)    f(x) = x + layer_norm(MLP(x))
    mag     memory as a gate: y = attention(x) over a window, out = W_o (norm(y) ⊙ silu(norm(M(x))))
    mal     memory as a layer: out = W_o norm(attention(norm(M(x))))
    mac     memory as context, in segments: h = f(W_c; silu(W x)) by what was learned before the segment,
            y = attention over the segment's (h_1, x_1, h_2, x_2, ...), out = W_o (norm(y) ⊙ silu(norm(M(y))))

Attention also sees `persistent` learned keys and values. ∇ is taken at the start of each chunk; mac's
segments are chunks. The h of a token stands just before it, so that no token sees a later one's.
Source: Behrouz, Zhong & Mirrokni 2025 (arXiv:2501.00663) eq. 8-15 and sec. 4.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.algorithms.fastweight import places
from riverrun.nn import NOT_NEGATIVE, GatedRMSNorm, RMSNorm, ShortConv, attend, carried, checked, heads, unit
from riverrun.nn.attend import pairs
from riverrun.nn.check import fitting
from riverrun.nn.memory import Memory, gate_map, gates
from riverrun.recurrences.memory import Rule
from riverrun.state import State

VARIANTS = ("mac", "mag", "mal")


class Titans(nn.Module):
    """arXiv:2501.00663. State: ((W, A, Z, count), conv (B, 3, 3·width), cache): W, A and Z each two matrices
    (B, H, K, E) and (B, H, E, K), E = expand · K; cache as in `sliding_window`, of twice the segment for mac.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        variant: str = "mac",
        memory: str = "mlp",
        window: int = 64,
        chunk: int = 64,
        persistent: Annotated[int, NOT_NEGATIVE] = 16,
        expand: int = 4,
        base: float = 0.1,
        eps: float = 1e-6,
    ):
        super().__init__()
        K = pairs(width, num_heads, window)
        if variant not in VARIANTS:
            raise ValueError(f"no variant '{variant}' of Titans; there are {VARIANTS}")
        self.width, self.num_heads, self.variant = width, num_heads, variant
        self.chunk, self.base = chunk, base
        self.window = 2 * chunk if variant == "mac" else window
        self.inp = nn.Linear(width, 3 * width, bias=False)  # [q, k, v] of attention
        self.always = nn.Parameter(torch.randn(2 * num_heads, persistent, K) * K**-0.5)
        self.query = nn.Linear(width, width, bias=False) if variant == "mac" else nn.Identity()
        self.learner = nn.Linear(width, 3 * width, bias=False)  # [q, k, v] of the memory
        rule = Rule(memory, momentum=True, chunk=chunk)
        self.gate = gate_map(rule, width, num_heads)  # [θ, 1 - α, η]
        self.conv = ShortConv(3 * width)
        self.memory = Memory(rule, num_heads, K, expand)
        self.inner_norm = RMSNorm(width, eps)
        self.norm = RMSNorm(width, eps) if variant == "mal" else GatedRMSNorm(width, eps=eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[State, Tensor, State] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Tensor, State]]:
        learned, past, cache = carried(self, x, state, reset, 3)
        if self.variant == "mac":
            return self.by_segment(x, (learned, past, cache), reset)
        m, learned, past = self.learn(x, learned, past, reset)
        y, cache = self.near(m if self.variant == "mal" else x, cache, reset)
        y = self.norm(y) if self.variant == "mal" else self.norm(y, m)
        return self.out(y), (learned, past, cache)

    def learn(
        self, u: Tensor, learned: State, past: State, reset: Tensor | None
    ) -> tuple[Tensor, State, Tensor]:
        qkv, past = self.conv(self.learner(u), past, reset)
        q, k, v = (heads(p, self.num_heads) for p in qkv.chunk(3, -1))
        found = gates(self.memory.rule, self.gate(u), self.base)
        m, learned = self.memory(unit(q), unit(k), v, found, learned, reset)
        return self.inner_norm(m.flatten(2)), learned, past

    def near(self, u: Tensor, cache: State, reset: Tensor | None) -> tuple[Tensor, State]:
        q, k, v = (heads(p, self.num_heads) for p in self.inp(u).chunk(3, -1))
        cache = carried(self, u, cache, reset, 3)
        y, cache = attend(q, k, v, cache, reset, self.window, always=self.always)
        return y.flatten(2), cache

    def by_segment(self, x: Tensor, state: tuple[State, ...], reset: Tensor | None):
        """mac: time is cut wherever a row of the batch begins a segment; between cuts, W_c stands still."""
        learned, past, cache = state
        used = fitting(self, carried(self, x, learned, reset, 4)[3], len(x))
        steps = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        begins = places(self.chunk, used, steps, reset) == 0
        q = unit(heads(F.silu(self.query(x)), self.num_heads))
        inner = begins.any(0).nonzero()[:, 0].tolist() if x.shape[1] > 1 else []  # one step waits for nothing
        cuts = [0, *(t for t in inner if t), x.shape[1]]
        ys = []
        for i, j in pairwise(cuts):
            flags = None if reset is None else reset[:, i:j]
            h = self.memory.recall(q[:, i:j], learned, None if flags is None else flags[:, 0]).flatten(2)
            context = torch.stack([h, x[:, i:j]], 2).flatten(1, 2)
            starts = torch.stack([begins[:, i:j], torch.zeros_like(begins[:, i:j])], 2).flatten(1)
            y, cache = self.near(context, cache, starts)
            m, learned, past = self.learn(y[:, 1::2], learned, past, flags)
            ys.append(self.norm(y[:, 1::2], m))
        return self.out(torch.cat(ys, 1)), (learned, past, cache)
