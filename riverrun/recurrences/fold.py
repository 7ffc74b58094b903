"""The meaning of every recurrence in this library: apply `step` to one time after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riverrun.state import State, tree_map


@dataclass(frozen=True)
class Recurrence:
    """A recurrence as data: `step` says what one time does, the rest says which arguments it takes.

    Axes are strings such as "B T H K". An argument whose axes begin with "B T" is a sequence, any other is
    the same at every time. "|" separates accepted forms, a trailing "?" marks an argument that may be None,
    and G divides H wherever both occur (grouped heads: head h reads group h // (H / G)).
    """

    name: str
    step: Callable[
        ..., tuple[State, Tensor]
    ]  # step(state, *arguments at one time) -> (state, y at that time)
    initial: Callable[..., State]  # initial(*arguments) -> the state before the first step
    args: dict[str, str]
    y: str
    state: Any  # axes of the state, nested as the state is
    like: str  # the argument whose dtype y takes
    complex: bool = False  # whether complex arguments are accepted

    def is_sequence(self, name: str) -> bool:
        return self.args[name].startswith("B T")


def clear(reset: Tensor, state: State, initial: State) -> State:
    """The state with the rows where `reset` (B) is set put back to `initial`."""
    return tree_map(lambda s, s0: torch.where(reset.view(-1, *[1] * (s.dim() - 1)), s0, s), state, initial)


def fold(recurrence: Recurrence, args: tuple[Any, ...], state: State = None, reset: Tensor | None = None):
    """Run a recurrence over axis 1: `reset_t` clears the state, then `state, y_t = step(state, *args_t)`.

    Returns (y (B, T, ...), the state after the last step). Any dtype; differentiable to any order by
    autograd.
    """
    sequence = [
        x is not None and recurrence.is_sequence(n) for x, n in zip(args, recurrence.args, strict=True)
    ]
    steps = next(x.shape[1] for x, s in zip(args, sequence, strict=True) if s)
    initial = recurrence.initial(*args) if state is None or reset is not None else None
    state = initial if state is None else state
    ys = []
    for t in range(steps):
        if reset is not None:
            state = clear(reset[:, t], state, initial)
        state, y = recurrence.step(state, *(x[:, t] if s else x for x, s in zip(args, sequence, strict=True)))
        ys.append(y)
    return torch.stack(ys, 1), state
