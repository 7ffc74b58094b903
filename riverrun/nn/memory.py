"""The weights that a test-time memory begins with, and the op that lets them learn."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.recurrences.memory import BOUNDED, Rule, net, through
from riverrun.recurrences.retention import weights
from riverrun.state import State, describe

from .shape import wide

SHAPES = {"lr": torch.sigmoid, "g": F.logsigmoid, "m": F.logsigmoid, "bound": F.softplus}


def taken(rule: Rule) -> list[str]:
    """The gates of a rule that forgets, in the order in which `gate_map` gives them."""
    return ["lr", "g", *(["m"] if rule.momentum else []), *(["bound"] if rule.loss in BOUNDED else [])]


def gate_map(rule: Rule, width: int, num_heads: int) -> nn.Linear:
    """What all gates are made of, one number a head for each; it begins by forgetting 2 % a token."""
    gate = nn.Linear(width, len(taken(rule)) * num_heads)
    with torch.no_grad():
        gate.bias[num_heads : 2 * num_heads] += 4
    return gate


def gates(rule: Rule, u: Tensor, base: float) -> dict[str, Tensor]:
    """η = base · σ(u), e^g and e^m = σ(u), δ = softplus(u), each with its own part of u, by `gate_map`."""
    names = taken(rule)
    parts = zip(names, wide(u).chunk(len(names), -1), strict=True)
    found = {name: SHAPES[name](part) for name, part in parts}
    return found | {"lr": base * found["lr"]}


class Memory(nn.Module):
    """One small network per head, whose weights begin as parameters and go on as state.

    Axes of W_i and of the state: `riverrun.recurrences.fastweight`. `expand` is the width inside over the
    head's; `residual` makes it x + layer_norm(z); `bias` gives a linear or mlp memory its biases.
    """

    def __init__(
        self,
        rule: Rule,
        num_heads: int,
        head_width: int,
        expand: int = 4,
        residual: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        K, E = head_width, expand * head_width
        sizes = {"K": K, "V": K, "E": E, "I": K + bias, "J": E + bias}
        self.rule, self.op = rule, ops.test_time(rule)
        for name, axes in rule.shapes.items():
            rows, columns = (sizes[axis] for axis in axes.split())
            W = torch.randn(num_heads, rows, columns) * rows**-0.5
            if rows in (K + 1, E + 1) and bias:
                W[:, -1] = 0
            self.register_parameter(name, nn.Parameter(W))
        start = torch.stack([torch.ones(num_heads, K), torch.zeros(num_heads, K)])
        self.norm = nn.Parameter(start) if residual else None

    @property
    def first(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.rule.shapes}

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: dict[str, Tensor],
        state: State,
        reset: Tensor | None,
    ) -> tuple[Tensor, State]:
        """y (B, T, H, K) and the state. `gates`: lr, and those of g, m and bound that the rule takes."""
        named: dict[str, Any] = {**self.first, **gates, "norm": self.norm}
        return self.op(q, k, v, state=state, reset=reset, **named)

    def recall(self, q: Tensor, state: State, forget: Tensor | None) -> Tensor:
        """f(q) for q (B, t, H, K) by W_c, the weights at the start of the chunk, without learning.

        Rows where `forget` (B) is set are read from the first weights. All of q is taken to lie in one chunk.
        """
        W = weights(self.rule, tuple(wide(w).expand(len(q), *w.shape) for w in self.first.values()))
        if state is not None and describe(state[0]) != describe(W):
            raise ValueError(
                f"the state's weights are {describe(state[0])}; they must be {describe(W)}: a state "
                "continues only the mixer and the batch size that made it"
            )
        if state is not None and forget is None:
            W = state[0]
        elif state is not None and forget is not None:
            W = tuple(
                torch.where(forget[:, None, None, None], new, old)
                for new, old in zip(W, state[0], strict=True)
            )
        norm = None if self.norm is None else wide(self.norm)
        y = net(self.rule.memory, wide(q).transpose(1, 2), through(W), norm)
        return y.transpose(1, 2).to(q.dtype)
