"""What a mixer asks of its settings before it is built, and of its input before it computes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Annotated, Any, NamedTuple, ParamSpec, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

from riverrun.config import nearest, spell, typed
from riverrun.state import State, describe

P = ParamSpec("P")


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


def head_width(width: int, num_heads: int, what: str = "num_heads", of: str = "the width") -> int:
    """width / num_heads. Raises ValueError unless both are positive and that is a whole number."""
    if width < 1:
        raise ValueError(f"{of} is {width}; it must be at least 1")
    if num_heads < 1 or width % num_heads:
        divisors = [n for n in range(1, width + 1) if width % n == 0]
        raise ValueError(f"{what} = {num_heads} does not divide {of} {width}; accepted are {divisors}")
    return width // num_heads


class Only(NamedTuple):
    """Which numbers a setting may be: `base: Annotated[float, Only(lambda x: x > 1, "more than 1")]`."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Only(lambda x: 0 < x < math.inf, "greater than 0")
NOT_NEGATIVE = Only(lambda x: x >= 0, "0 or greater")
FRACTION = Only(lambda x: 0 <= x < 1, "at least 0 and less than 1")


def checked(init: Callable[P, None]) -> Callable[P, None]:
    """An `__init__` that refuses what `settled` refuses, before it runs."""
    signature = inspect.signature(init)

    @wraps(init)
    def made(*args: P.args, **given: P.kwargs) -> None:
        what = type(args[0]).__name__
        known(given, [*signature.parameters][1:], what)
        bound = signature.bind(*args, **given)
        own = [*bound.arguments][1:]
        bound.arguments.update(settled(init, {name: bound.arguments[name] for name in own}, what))
        init(*bound.args, **bound.kwargs)

    return made


def known(given: Iterable[str], accepted: list[str], what: str) -> None:
    """Raise ValueError, with the nearest one, for a name that is not among the accepted."""
    for name in given:
        if name not in accepted:
            raise ValueError(f"{what} takes no argument '{name}'; {nearest(name, accepted)}")


def settled(init: Callable[..., None], given: dict[str, Any], what: str) -> dict[str, Any]:
    """`given` with each value turned into what the annotations of an `__init__` say.

    Numbers must be positive, unless an `Only` in the annotation says otherwise. Raises ValueError that names
    the argument, what was given and what is accepted.
    """
    hints, defaults = get_type_hints(init, include_extras=True), inspect.signature(init).parameters
    found = {}
    for name, value in given.items():
        kind, only = hints.get(name, Any), POSITIVE
        if get_origin(kind) is Annotated:
            kind, only = get_args(kind)
        try:
            new = typed(kind, value, name)
            numbers = [x for x in (new if isinstance(new, tuple) else (new,)) if type(x) in (int, float)]
            if not all(map(only.holds, numbers)):
                raise ValueError(f"{name} is {value!r}; it must be {spell(kind)}, {only.words}")
        except ValueError as error:
            default = defaults[name].default
            usual = "" if default is inspect.Parameter.empty else f"; unless given it is {default!r}"
            raise ValueError(f"{what}: {error}{usual}") from None
        found[name] = new
    return found
