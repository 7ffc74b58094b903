"""A language model: token embedding, a stack of pre-norm blocks (mixer, gated MLP), final norm, tied output.

    x = E[token]      x = x + mixer(norm(x))      x = x + mlp(norm(x))      logits = norm(x) Eᵀ

    tokens: (B, T) int64    logits: (B, T, vocabulary)    state: one mixer state a layer    reset: (B, T) bool

The same call trains (T = 4096), reads a prompt (T = 700) and decodes (T = 1). `reset` marks the first token
of a document: no mixer carries anything over it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.config import nearest
from riverrun.mixers import mixer_class, row
from riverrun.nn import GatedMLP, RMSNorm, wide
from riverrun.nn.check import settled
from riverrun.state import State, describe, leaves

from .pattern import layers

EMBEDDING_STD = 0.02  # GPT-2's: logits of the untrained tied model are small, so its loss is log(vocabulary)


@dataclass(frozen=True)
class LanguageConfig:
    """Sizes of a `LanguageModel`."""

    vocabulary: int
    width: int = 256
    depth: int = 4
    pattern: str = "gated_deltanet"  # "3 gated_deltanet + 1 attention", repeated to the depth
    mixers: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # mixer's name -> its constructor's arguments
    inner: int | None = None  # inner width of the MLP; None: 8/3 of the width
    tied: bool = True  # the output map is the embedding
    eps: float = 1e-6  # of the norms between layers


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). State: the mixer's."""

    def __init__(self, name: str, config: LanguageConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.width, config.eps)
        self.mixer = mixer_class(name)(config.width, **config.mixers.get(name, {}))
        self.mlp_norm = RMSNorm(config.width, config.eps)
        self.mlp = GatedMLP(config.width, config.inner)

    def forward(self, x: Tensor, state: State, reset: Tensor | None) -> tuple[Tensor, State]:
        y, state = self.mixer(self.mixer_norm(x), state, reset)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state


class LanguageModel(nn.Module):
    """A stack of `config.depth` blocks over a vocabulary. State: a tuple with one mixer state a layer."""

    def __init__(self, config: LanguageConfig):
        super().__init__()
        self.config, self.layers = config, planned(config)
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        blocks = [Block(name, config) for name in self.layers]
        self.blocks = nn.ModuleList(blocks)
        self.norm = RMSNorm(config.width, config.eps)
        self.head = None if config.tied else nn.Linear(config.width, config.vocabulary, bias=False)
        self.initialise()
        self.like = tuple(one_step(block.mixer, config.width) for block in blocks)

    @torch.no_grad()
    def initialise(self) -> None:
        """Small embeddings; maps into the residual stream scaled so that depth does not raise its variance.

        The rest (rates, step sizes, projections inwards) keeps what mixers and layers give it.
        """
        nn.init.normal_(self.embedding.weight, std=EMBEDDING_STD)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=EMBEDDING_STD)
        for block in self.blocks:
            for layer in (block.mixer, block.mlp):
                out = getattr(layer, "out", None)  # the name of every mixer's last map
                if isinstance(out, nn.Linear):
                    out.weight.mul_((2 * self.config.depth) ** -0.5)

    @property
    def output(self) -> Tensor:
        """The output map (vocabulary, width)."""
        return self.embedding.weight if self.head is None else self.head.weight

    @property
    def grows(self) -> list[str]:
        """The mixers of this model whose state grows with every token; empty when its memory is constant."""
        return sorted({name for name in self.layers if row(name).state == "grows"})

    @property
    def prefix(self) -> int:
        """How many tokens at the start of a document some mixer reads as a whole: each sees the later ones,
        so that to predict those is no test."""
        return max(getattr(block.mixer, "prefix", 0) for block in self.blocks)

    def hidden(
        self, tokens: Tensor, state: State = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """The normed activations (B, T, width) that `output` maps to logits, and the state: for losses."""
        self.check(tokens, state, reset)
        x, after = self.embedding(tokens), []
        for block, before in zip(self.blocks, state or [None] * len(self.blocks), strict=True):
            x, s = block(x, before, reset)
            after.append(s)
        return self.norm(x), tuple(after)

    def forward(
        self, tokens: Tensor, state: State = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Logits (B, T, vocabulary), in float32 or wider, for the token after each; and the last state."""
        x, state = self.hidden(tokens, state, reset)
        return wide(F.linear(x, self.output)), state

    def check(self, tokens: Tensor, state: State, reset: Tensor | None) -> None:
        """Raise TypeError or ValueError unless tokens, state and reset fit this model."""
        if tokens.dtype != torch.int64:
            raise TypeError(f"tokens are {tokens.dtype}; they must be torch.int64: tokens.long()")
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}; it must be (B, T) with B and T at least 1"
            )
        if tokens.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = tokens.aminmax()  # on a GPU this would wait for the device at every call
            if low < 0 or high >= self.config.vocabulary:
                raise ValueError(
                    f"tokens lie in {int(low)}..{int(high)}; this model's vocabulary is "
                    f"0..{self.config.vocabulary - 1}"
                )
        if reset is not None and (reset.dtype != torch.bool or reset.shape != tokens.shape):
            raise ValueError(
                f"reset is {reset.dtype} of shape {tuple(reset.shape)}; it must be bool of the tokens' shape "
                f"{tuple(tokens.shape)}"
            )
        if state is not None:
            self.check_state(state, tokens.shape[0])

    def check_state(self, state: State, batch: int) -> None:
        """Raise ValueError unless `state` is one of this model's for `batch` sequences."""
        if not isinstance(state, tuple) or len(state) != len(self.layers):
            given = f"{len(state)} layers" if isinstance(state, tuple) else type(state).__name__
            raise ValueError(
                f"the state has {given}, the model {len(self.layers)} layers: it is another model's"
            )
        for i, (name, given, like) in enumerate(zip(self.layers, state, self.like, strict=True)):
            if not same(given, like, exact=row(name).state == "constant"):
                raise ValueError(
                    f"the state of layer {i} ({name}) has shapes {describe(given)}, this model's have "
                    f"{describe(like)} for one sequence: it is another model's"
                )
            for x in leaves(given):
                if x.shape[0] != batch:
                    raise ValueError(
                        f"the state is of {x.shape[0]} sequences, the tokens of {batch}: a state continues "
                        "just the sequences that made it; riverrun.state.select picks or repeats some"
                    )


def planned(config: LanguageConfig) -> list[str]:
    """The mixer's name for each layer. Raises ValueError unless the sizes are sizes, and mixers and pattern
    fit each other; what a mixer takes, it says itself."""
    settled(LanguageConfig.__init__, vars(config), "the model")
    found = layers(config.pattern, config.depth)
    for name, args in config.mixers.items():
        if name not in found:
            raise ValueError(
                f"arguments are given for the mixer '{name}', which is not in the pattern; "
                f"{nearest(name, dict.fromkeys(found))}"
            )
        if "width" in args:
            raise ValueError(
                f"the arguments of the mixer '{name}' have a width, {args['width']!r}; it is the "
                "model's: set the width there"
            )
    return found


@torch.no_grad()
def one_step(mixer: nn.Module, width: int) -> State:
    """The state after one step of one sequence: what states of this mixer look like. Compiles nothing."""
    with ops.forced(**dict.fromkeys(ops.OPS, "sequential")):
        return mixer(torch.zeros(1, 1, width), None, None)[1]


def same(state: State, like: State, exact: bool) -> bool:
    """Whether two states are nested alike, with equal ranks and, if `exact`, equal sizes past the batch."""
    if isinstance(like, tuple):
        return (
            isinstance(state, tuple)
            and len(state) == len(like)
            and all(same(s, x, exact) for s, x in zip(state, like, strict=True))
        )
    if not isinstance(state, Tensor) or like is None:
        return state is like
    return state.dim() == like.dim() and (not exact or state.shape[1:] == like.shape[1:])
