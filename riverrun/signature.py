"""What an op accepts: its arguments bound, and everything about them checked before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from riverrun.recurrences.fold import Recurrence
from riverrun.state import State, describe, leaves

REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
REMEMBERED = 256  # shapes known to be right, so that decoding does not check the same ones at every token

Args = tuple[Any, ...]  # tensors, and None where an optional one was left out


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
        self.known: dict[Any, None] = {}

    def bind(self, args: Args, named: dict[str, Any]) -> Args:
        """Positional and named arguments in declared order, with None for the optional ones left out."""
        if named or len(args) != len(self.names):
            args = self.in_order(args, named)
        for name, x in zip(self.names, args, strict=True):
            if x is None and name not in self.optional:
                axes = self.recurrence.args[name]
                raise TypeError(f"op '{self.name}' needs the argument '{name}' with axes ({axes})")
        return args

    def in_order(self, args: Args, named: dict[str, Any]) -> Args:
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
        return tuple(given.get(name) for name in self.names)

    def check(self, args: Args, state: State, reset: Tensor | None) -> Any:
        """Raise TypeError or ValueError unless dtypes, devices and axes of everything agree.

        What is returned is equal for calls that agree in all of them, and None while a graph is compiled.
        """
        if torch.compiler.is_compiling():  # once a graph, on sizes that may be symbols
            self.examine(args, state, reset)
            return None
        if isinstance(state, tuple):
            every, nested = (*args, *leaves(state), reset), len(state)
        else:
            every, nested = (*args, state, reset), -1
        key = (nested, *[known_by(x) for x in every])
        if key not in self.known:
            self.examine(args, state, reset)
            if len(self.known) >= REMEMBERED:
                self.known.pop(next(iter(self.known)))
            self.known[key] = None
        return key

    def examine(self, args: Args, state: State, reset: Tensor | None) -> None:
        main = args[self.like]
        sizes: dict[str, int] = {}
        for name, x in zip(self.names, args, strict=True):
            if x is not None:
                self.check_tensor(name, x, main)
                if not any(fits(x.shape, form, sizes) for form in self.forms[name]):
                    raise ValueError(
                        f"op '{self.name}': {name} has shape {tuple(x.shape)}; accepted is "
                        f"({self.recurrence.args[name].rstrip(' ?')}) with {said(sizes)}"
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
            self.check_state(state, sizes, main)
        if reset is not None:
            self.check_reset(reset, (sizes["B"], sizes["T"]), main)

    def check_tensor(self, name: str, x: Any, main: Any) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"op '{self.name}': {name} is a {type(x).__name__}; it must be a tensor")
        if x.dtype not in self.dtypes:
            accepted = ", ".join(map(str, self.dtypes))
            raise TypeError(f"op '{self.name}': {name} is {x.dtype}; accepted are {accepted}")
        if isinstance(main, Tensor) and x.device != main.device:
            raise ValueError(
                f"op '{self.name}': {name} is on {x.device}, {self.recurrence.like} on {main.device}; "
                "move them to one device"
            )

    def check_state(self, state: State, sizes: dict[str, int], main: Tensor) -> None:
        expected = expand(self.recurrence.state, sizes)
        if shapes(state) != expected:
            raise ValueError(
                f"op '{self.name}': the state has shape {describe(state)}; it must be {expected} for "
                f"{said(sizes)}: a state continues only the model and the batch size that made it"
            )
        for x in leaves(state):
            self.check_tensor("the state", x, main)

    def check_reset(self, reset: Tensor, shape: tuple[int, int], main: Tensor) -> None:
        if not isinstance(reset, Tensor) or reset.dtype != torch.bool or tuple(reset.shape) != shape:
            given = (
                f"{reset.dtype} of shape {tuple(reset.shape)}" if isinstance(reset, Tensor) else repr(reset)
            )
            raise ValueError(f"op '{self.name}': reset is {given}; it must be bool of shape (B, T) = {shape}")
        if reset.device != main.device:
            raise ValueError(f"op '{self.name}': reset is on {reset.device}, the arguments on {main.device}")


def known_by(x: Any) -> Any:
    """What is checked of an argument."""
    return (x.shape, x.dtype, x.is_cpu or x.device) if isinstance(x, Tensor) else type(x)


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


def said(sizes: dict[str, int]) -> str:
    return ", ".join(f"{axis} = {size}" for axis, size in sizes.items()) or "no axis known yet"
