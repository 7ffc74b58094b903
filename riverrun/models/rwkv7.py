"""RWKV-7 as published: a stack whose later layers mix the first layer's values into theirs.

    x = norm(E[token])
    x = x + time(norm(x), v_1)    v_1 (B, T, width): the first layer's v, see `riverrun.mixers.rwkv7`
    x = x + W_v relu(W_k (u + μ ⊙ (u_{t-1} - u)))², u = norm(x)    norms are layer norms
    logits = W norm(x)

    tokens: (B, T) int64    logits: (B, T, vocabulary)    reset: (B, T) bool
    state: for each layer ((S (B, H, K, K), last x (B, width)), last u (B, width))

The same call trains, reads a prompt and decodes, as `LanguageModel`'s does; that one has rwkv7 among its
mixers too, each layer as if it were the first, between norms and MLPs like everybody's.
Source: Peng et al. 2025 (arXiv:2503.14456) sec. 4, with the layout of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.mixers.rwkv7 import RWKV7
from riverrun.nn import carried, fitting, shifted, wide
from riverrun.nn.check import settled
from riverrun.state import State


@dataclass(frozen=True)
class RWKV7Config:
    """Sizes of an `RWKV7Model`."""

    vocabulary: int
    width: int = 256
    depth: int = 4
    num_heads: int = 4
    inner: int | None = None  # of the channel mix; None: four times the width
    decay_rank: int = 64
    rate_rank: int = 64
    value_rank: int = 32
    gate_rank: int = 128
    eps: float = 1e-5


class ChannelMix(nn.Module):
    """W_v relu(W_k (u + μ ⊙ (u_{t-1} - u)))². State: last u (B, width)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.width = width
        self.mix = nn.Parameter(1 - torch.arange(width) / max(width - 1, 1))
        self.key, self.out = nn.Linear(width, inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor, last: State, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        last = fitting(self, carried(self, u, last, reset), u.shape[0], self.width)
        (key,) = shifted(u, self.mix[None], last, reset, [self.key], [0])
        return self.out(F.relu(key).square()), u[:, -1]


class RWKV7Block(nn.Module):
    """x + time(norm(x)), then x + channel(norm(x)); all but the first take the first one's values."""

    def __init__(self, config: RWKV7Config, first: bool):
        super().__init__()
        c = config
        self.time_norm, self.channel_norm = (nn.LayerNorm(c.width, c.eps) for _ in range(2))
        rank = None if first else c.value_rank
        self.time = RWKV7(c.width, c.num_heads, c.decay_rank, c.rate_rank, c.gate_rank, value_rank=rank)
        self.channel = ChannelMix(c.width, c.inner or 4 * c.width)

    def forward(
        self, x: Tensor, state: State, reset: Tensor | None, values: Tensor | None
    ) -> tuple[Tensor, State, Tensor]:
        time, channel = (None, None) if state is None else state
        y, time, own = self.time.in_stack(self.time_norm(x), time, reset, values)
        x = x + y
        y, channel = self.channel(self.channel_norm(x), channel, reset)
        return x + y, (time, channel), own


class RWKV7Model(nn.Module):
    """arXiv:2503.14456, embedding to logits. State: a tuple with one entry a layer, see above."""

    def __init__(self, config: RWKV7Config):
        super().__init__()
        settled(RWKV7Config.__init__, vars(config), "the model")
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.first_norm, self.norm = (nn.LayerNorm(config.width, config.eps) for _ in range(2))
        self.blocks = nn.ModuleList([RWKV7Block(config, i == 0) for i in range(config.depth)])
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    @property
    def output(self) -> Tensor:
        """The output map (vocabulary, width)."""
        return self.head.weight

    def hidden(
        self, tokens: Tensor, state: State = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The normed activations (B, T, width) that `output` maps to logits, and the state: for losses."""
        if state is not None and (not isinstance(state, tuple) or len(state) != len(self.blocks)):
            raise ValueError(f"the state must be of {len(self.blocks)} layers; it is another model's")
        x, after, values = self.first_norm(self.embedding(tokens)), [], None
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, end, own = block(x, before, reset, values)
            values = own if values is None else values
            after.append(end)
        return self.norm(x), tuple(after)

    def forward(
        self, tokens: Tensor, state: State = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, T, vocabulary), in float32 or wider, for the token after each; and the last state."""
        x, state = self.hidden(tokens, state, reset)
        return wide(self.head(x)), state
