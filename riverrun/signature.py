"""What an op accepts: its arguments bound, and their axes, dtypes, devices, state and reset checked before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from riverrun.recurrences.fold import Recurrence
from riverrun.state import State, describe

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)


class Signature:
    """The arguments of a recurrence, parsed once: for each its accepted forms as tuples of axes."""

    def __init__(self, recurrence: Recurrence):
        self.recurrence, self.name, self.names = recurrence, recurrence.name, tuple(recurrence.args)
        self.optional = {n for n, axes in recurrence.args.items() if axes.endswith("?")}
        self.forms = {
            n: [tuple(form.split()) for form in axes.rstrip(" ?").split("|")]
            for n, axes in recurrence.args.items()
        }
        self.like = self.names.index(recurrence.like)
        self.dtypes = REAL + COMPLEX if recurrence.complex else REAL

    def bind(self, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Tensor | None, ...]:
        """Positional and named arguments in declared order, with None for the optional ones left out."""
        if len(args) > len(self.names):
            raise TypeError(
                f"op '{self.name}' takes {len(self.names)} arguments {self.names}, {len(args)} were given"
            )
        given = dict(zip(self.names, args, strict=False))
        for name, value in named.items():
            if name in given or name not in self.names:
                trouble = "was given twice" if name in given else "is not an argument"
                raise TypeError(f"op '{self.name}': '{name}' {trouble}; it takes {self.names}")
            given[name] = value
        for name in self.names:
            if given.get(name) is None and name not in self.optional:
                raise TypeError(
                    f"op '{self.name}' needs the argument '{name}' with axes ({self.recurrence.args[name]})"
                )
        return tuple(given.get(name) for name in self.names)

    def check(self, args: tuple[Tensor | None, ...], state: State, reset: Tensor | None) -> None:
        """Raise TypeError or ValueError unless dtypes, devices and axes of everything agree."""
        main = args[self.like]
        sizes: dict[str, int] = {}
        for name, x in zip(self.names, args, strict=True):
            if x is None:
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"op '{self.name}': {name} is a {type(x).__name__}; it must be a tensor")
            if x.dtype not in self.dtypes:
                raise TypeError(
                    f"op '{self.name}': {name} is {x.dtype}; accepted are {[str(d) for d in self.dtypes]}"
                )
            if x.device != main.device:
                raise ValueError(
                    f"op '{self.name}': {name} is on {x.device}, {self.recurrence.like} on {main.device}"
                )
            if not any(fits(x.shape, form, sizes) for form in self.forms[name]):
                raise ValueError(
                    f"op '{self.name}': {name} has shape {tuple(x.shape)}; accepted is "
                    f"({self.recurrence.args[name].rstrip(' ?')}) with {known(sizes)}"
                )
        if sizes["T"] == 0 or sizes["B"] == 0:
            raise ValueError(
                f"op '{self.name}': B = {sizes['B']} and T = {sizes['T']}; both must be at least 1"
            )
        if "G" in sizes and "H" in sizes and sizes["H"] % sizes["G"]:
            raise ValueError(
                f"op '{self.name}': {sizes['G']} q/k heads do not divide {sizes['H']} value heads"
            )
        if state is not None:
            self.check_state(state, self.recurrence.state, sizes, main)
        if reset is not None and (
            reset.dtype != torch.bool or tuple(reset.shape) != (sizes["B"], sizes["T"])
        ):
            raise ValueError(
                f"op '{self.name}': reset is {reset.dtype} of shape {tuple(reset.shape)}; "
                f"it must be bool of shape (B, T) = ({sizes['B']}, {sizes['T']})"
            )
        if reset is not None and reset.device != main.device:
            raise ValueError(
                f"op '{self.name}': reset is on {reset.device}, {self.recurrence.like} on {main.device}"
            )

    def check_state(self, state: State, axes: Any, sizes: dict[str, int], main: Tensor) -> None:
        expected = expand(axes, sizes)
        if shapes(state) != expected:
            raise ValueError(
                f"op '{self.name}': the state has shape {describe(state)}; it must be {expected} for {known(sizes)}: "
                "a state continues only the model, the batch size and the heads that made it"
            )
        for x in state if isinstance(state, tuple) else (state,):
            if x.device != main.device:
                raise ValueError(
                    f"op '{self.name}': the state is on {x.device}, the arguments on {main.device}"
                )
            if x.dtype not in self.dtypes:
                raise TypeError(f"op '{self.name}': the state is {x.dtype}; it must be floating point")


def fits(shape: torch.Size, form: tuple[str, ...], sizes: dict[str, int]) -> bool:
    """Whether a shape has these axes; if it does, axes seen for the first time get their sizes."""
    if len(shape) != len(form):
        return False
    found: dict[str, int] = {}
    for size, axis in zip(shape, form, strict=True):
        expected = int(axis) if axis.isdigit() else sizes.get(axis, found.get(axis, size))
        if size != expected:
            return False
        if not axis.isdigit():
            found[axis] = size
    sizes.update(found)
    return True


def expand(axes: Any, sizes: dict[str, int]) -> Any:
    """The sizes of (nested) axes; "W-1" is the one arithmetic there is."""
    if isinstance(axes, tuple):
        return tuple(expand(a, sizes) for a in axes)
    return tuple(sizes[a.removesuffix("-1")] - a.endswith("-1") for a in axes.split())


def shapes(state: State) -> Any:
    if isinstance(state, tuple):
        return tuple(shapes(s) for s in state)
    return None if state is None else tuple(state.shape)


def known(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} = {size}" for axis, size in sizes.items()) or "no axis known yet"
