"""What a call allocates and launches, recorded once and repeated for other tensors of the same kind.

Between the launches of a small op Python takes longer than the GPU: inputs are described, plans made, kernels
looked up. All of it depends on dtypes, shapes, strides and alignment only. So the second call with arguments
of one kind is recorded, every operator of PyTorch and every `launch` in order, and calls after it go through
that list with their own tensors' addresses. A tensor is let go where it was last used.

The first call of a kind whose kernels there are not yet compiles all of them at once, and with them those of
the backward that will follow.

What is recorded must launch by `launch.launch` alone, and must not look at numbers: a call that reads one is
never repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from riverrun.kernels import library

from .launch import DEVICE, compile_together, recording

KINDS = 1024  # of functions' arguments that are remembered
EMPTY = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"}

Step = Callable[[list[Any], list[Any], Any], None]  # of tensors, addresses, both by place, and a stream
Call = tuple[Callable[..., Any], tuple[Any, ...]]

_kept: dict[tuple[Any, ...], Any] = {}  # None where arguments of the kind were seen once
_compiled: set[tuple[Any, ...]] = set()  # `sizes` of calls whose kernels there are


class Tape(TorchDispatchMode):
    """Records while it is entered. Every tensor, address and number that is launched with has a place."""

    def __init__(self, args: list[Any]) -> None:
        super().__init__()
        self.given = len(args)
        self.places = {id(x): n for n, x in enumerate(args)}
        self.addresses: list[Any] = [None] * len(args)  # what calls begin with: numbers are there already
        self.pieces: dict[int, dict[int, int]] = {}  # a buffer's place -> offset in it -> place
        self.used: dict[int, int] = {}  # a tensor's place -> the last step that needs it
        self.steps: list[Step] = []
        self.whole = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Asked by PyTorch, which else loads its compiler for this: two to six seconds."""
        return False

    def __enter__(self) -> Tape:
        recording.tape = self
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        recording.tape = None
        super().__exit__(*raised)

    def place(self, address: Any = None) -> int:
        self.addresses.append(address)
        return len(self.addresses) - 1

    def find(self, x: Tensor) -> int:
        """A tensor's place. What nothing recorded has made is no other call's."""
        n = self.places.get(id(x))
        if n is None:
            self.whole, n = False, 0
        self.used[n] = len(self.steps)
        return n

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not isinstance(out, Tensor):
            self.whole = False
            return out
        if func._schema.name in EMPTY:
            n = self.place()
            self.pieces[n] = {}
            step = make(n, out, self.pieces[n])
        else:
            flat, spec = tree_flatten((args, kwargs or {}))
            places = [self.find(x) if isinstance(x, Tensor) else None for x in flat]
            n = self.place()
            step = operate(n, func, flat, places, spec)
        self.places[id(out)] = n
        self.steps.append(step)
        return out

    def launched(self, again: Callable[[Any, tuple[Any, ...]], None], args: tuple[Any, ...]) -> None:
        """`again` launches on a stream with the addresses of other tensors."""
        get = itemgetter(*[self.argument(x) for x in args])
        self.steps.append(lambda tensors, addresses, stream: again(stream, get(addresses)))

    def argument(self, x: Any) -> int:
        if x is None or type(x) is int:
            return self.place(x)
        if isinstance(x, Tensor):
            return self.find(x)
        pieces = self.pieces[self.find(x.buffer)]
        offset = x.data_ptr() - x.buffer.data_ptr()
        if offset not in pieces:
            pieces[offset] = self.place()
        return pieces[offset]

    def finish(self, results: tuple[Any, ...]) -> Callable[..., tuple[Any, ...]] | None:
        """What repeats this with other arguments, or None if nothing can."""
        wanted = [self.place() if x is None else self.find(x) for x in results]
        if not self.whole:
            return None
        steps: list[Step] = []
        for at, step in enumerate(self.steps):
            over = [n for n, last in self.used.items() if last == at and n >= self.given]
            steps += [step, drop(over)] if over else [step]
        known = self.addresses

        def repeat(*args: Any) -> tuple[Any, ...]:
            tensors, addresses, stream = known.copy(), known.copy(), current()
            for n, x in enumerate(args):
                if isinstance(x, Tensor):
                    tensors[n], addresses[n] = x, address(x)
            for step in steps:
                step(tensors, addresses, stream)
            return tuple([tensors[n] for n in wanted])

        return repeat


def make(n: int, x: Tensor, pieces: dict[int, int]) -> Step:
    size, stride, dtype, device = x.shape, x.stride(), x.dtype, x.device

    def step(tensors: list[Any], addresses: list[Any], stream: Any) -> None:
        x = tensors[n] = torch.empty_strided(size, stride, dtype=dtype, device=device)
        at = addresses[n] = address(x)
        for offset, piece in pieces.items():
            addresses[piece] = at + offset

    return step


def operate(n: int, func: Any, flat: list[Any], places: list[int | None], spec: Any) -> Step:
    fixed = [x if place is None else None for x, place in zip(flat, places)]

    def step(tensors: list[Any], addresses: list[Any], stream: Any) -> None:
        given = [x if place is None else tensors[place] for x, place in zip(fixed, places)]
        args, kwargs = tree_unflatten(given, spec)
        x = tensors[n] = func(*args, **kwargs)
        addresses[n] = address(x)

    return step


def drop(places: list[int]) -> Step:
    def step(tensors: list[Any], addresses: list[Any], stream: Any) -> None:
        for n in places:
            tensors[n] = None

    return step


def address(x: Tensor) -> Any:
    """What a launch takes for a tensor; the interpreter takes the tensor itself."""
    return x if DEVICE == "cpu" else x.data_ptr()


def current() -> Any:
    return None if DEVICE == "cpu" else torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())


def kind(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.shape, x.stride(), x.dtype, x.data_ptr() & 15
    return x


def sizes(x: Any) -> Any:
    """Of `kind`, what makes other kernels: not batch and time, which may be new with every call."""
    return (x.shape[2:], x.dtype) if isinstance(x, Tensor) else x


def repeated(
    function: Callable[..., tuple[Any, ...]], following: Callable[..., list[Call]] = lambda *args: []
) -> Callable[..., tuple[Any, ...]]:
    """`function` of tensors, None and flags, recorded at the second call with arguments of one kind.

    `following(*args)` are calls of other functions whose kernels this one's first call compiles as well.
    """

    @wraps(function)
    def call(*args: Any) -> tuple[Any, ...]:
        device = 0 if DEVICE == "cpu" else torch._C._cuda_getDevice()
        key = (function, device, args[0].device, *map(kind, args))
        repeat = _kept.get(key)
        if repeat is not None:
            return repeat(*args)
        if key in _kept:  # seen once
            aliases = [x.detach() if isinstance(x, Tensor) else x for x in args]  # one may be given twice
            with Tape(aliases) as tape:
                results = function(*aliases)
            _kept[key] = tape.finish(results) or function
            return results
        if len(_kept) == KINDS:
            _kept.clear()
        family = (function, device, *map(sizes, args))
        if family not in _compiled:
            _compiled.add(family)
            compile_together((function, args), *following(*args))
        _kept[key] = None
        return function(*args)

    return call


def define(
    name: str, inputs: str, outputs: int, saved: int, forward: Callable[..., Any],
    backward: Callable[..., Any], fake: Callable[..., tuple[Any, ...]],
) -> Callable[..., tuple[Any, ...]]:  # fmt: skip
    """`library.define` with `repeated` calls."""

    def following(*args: Any) -> list[Call]:
        """If anything is saved, the backward that this will lead to, of the first output alone."""
        if not args[-1]:
            return []
        made = fake(*args)
        return [(backward, (*args[:-1], *made, torch.empty_like(made[0]), *[None] * (outputs - 1)))]

    return library.define(
        name, inputs, outputs, saved, DEVICE, repeated(forward, following), repeated(backward), fake
    )
