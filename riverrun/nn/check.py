"""What a mixer asks of its input before it computes."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from riverrun.state import State, describe


def carried(mixer: nn.Module, x: Tensor, state: State, reset: Tensor | None, parts: int = 1) -> Any:
    """The state to start from, as `parts` parts that are None at the beginning; one part is the state itself.

    Raises ValueError and TypeError for an x, a state or a reset that `mixer` cannot take. What is inside the
    parts is checked by those who read them.
    """
    name, width = type(mixer).__name__, mixer.width
    if x.dim() != 3 or x.shape[2] != width or 0 in x.shape:
        raise ValueError(
            f"{name}: x has shape {tuple(x.shape)}; accepted is (B, T, {width}) with B and T ≥ 1"
        )
    dtype = next(mixer.parameters()).dtype
    if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"{name}: x is {x.dtype}, the weights are {dtype}; convert one or use torch.autocast")
    if reset is not None and (reset.dtype != torch.bool or reset.shape != x.shape[:2]):
        raise ValueError(
            f"{name}: reset is {reset.dtype} of shape {tuple(reset.shape)}; it must be bool of shape "
            f"(B, T) = {tuple(x.shape[:2])}"
        )
    if parts == 1:
        return state
    if state is None:
        return (None,) * parts
    if not isinstance(state, tuple) or len(state) != parts or any(part is None for part in state):
        raise ValueError(
            f"{name}: the state is {describe(state)}; it must be None or the {parts} parts that an earlier "
            "call of this mixer returned"
        )
    return state


def whole(mixer: nn.Module, x: Tensor, state: State, reset: Tensor | None) -> None:
    """What `carried` checks, for a mixer that sees the whole of x at once and so keeps no state.

    Raises ValueError for a state that is given.
    """
    carried(mixer, x, None, reset)
    if state is not None:
        raise ValueError(
            f"{type(mixer).__name__}: a state was given, {describe(state)}; this mixer reads the whole of x, "
            "before and after each token, and cannot continue: leave state=None"
        )


def fitting(mixer: nn.Module, part: State, *shape: int) -> State:
    """A part of the state that the mixer itself reads, None or of this shape. Raises ValueError otherwise."""
    if part is not None and (not isinstance(part, Tensor) or part.shape != shape):
        raise ValueError(
            f"{type(mixer).__name__}: the state has a part of shape {describe(part)}; it must be {shape}: "
            "a state continues only the mixer and the batch size that made it"
        )
    return part


def head_width(width: int, num_heads: int, what: str = "num_heads") -> int:
    """width / num_heads. Raises ValueError unless that is a positive whole number."""
    if num_heads < 1 or width % num_heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        raise ValueError(f"{what} = {num_heads} does not divide the width {width}; accepted are {divisors}")
    return width // num_heads


def accepts(cls: type, given: Iterable[str], what: str) -> None:
    """Raise ValueError, with the nearest one, for a name that is no argument of cls after its first."""
    accepted = list(inspect.signature(cls).parameters)[1:]
    for name in given:
        if name not in accepted:
            near = get_close_matches(name, accepted, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {accepted}"
            raise ValueError(f"{what} takes no argument '{name}'; {hint}")
