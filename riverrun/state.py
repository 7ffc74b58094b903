"""Functions on states. A state is a tensor, None, or a tuple of states, batch axis first.

Nothing else in the library knows how states are nested; mixers and models build them, and these functions
pick rows, move, measure, save and restore any of them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from riverrun import disk

State = Any  # Tensor | None | tuple[State, ...]; recursive, so a type checker gets no more than this


def tree_map(f: Callable[..., Any], state: State, *others: State) -> State:
    """Apply `f` to every tensor of `state` (and those at the same places of `others`); None stays."""
    if state is None:
        return None
    if isinstance(state, tuple):
        return tuple(tree_map(f, s, *rest) for s, *rest in zip(state, *others, strict=True))
    return f(state, *others)


def leaves(state: State) -> Iterator[Tensor]:
    """Every tensor of a state, left to right."""
    if isinstance(state, tuple):
        for part in state:
            yield from leaves(part)
    elif state is not None:
        yield state


def select(state: State, rows: Tensor | list[int] | slice) -> State:
    """The sequences `rows` of a batched state: picked, repeated or reordered, in memory of their own."""
    if isinstance(rows, slice):
        return tree_map(lambda x: x[rows].clone(), state)
    return tree_map(lambda x: x.index_select(0, torch.as_tensor(rows, device=x.device)), state)


def detach(state: State) -> State:
    """The same values, cut from the graph that made them: the boundary of truncated back-propagation."""
    return tree_map(Tensor.detach, state)


def to(state: State, *args: Any, **kwargs: Any) -> State:
    """Every tensor moved as `Tensor.to(*args, **kwargs)` moves one; a dtype reaches floating tensors only."""

    def move(x: Tensor) -> Tensor:
        moved = x.to(*args, **kwargs)
        return moved if x.is_floating_point() or x.is_complex() else moved.to(x.dtype)

    return tree_map(move, state)


def nbytes(state: State) -> int:
    """Bytes of a state: what one batch of sequences costs to remember."""
    return sum(x.numel() * x.element_size() for x in leaves(state))


def describe(state: State) -> str:
    """The shapes of a state in its own nesting, for error messages: `((2, 4, 16, 16), None)`."""
    if isinstance(state, tuple):
        return "(" + ", ".join(describe(s) for s in state) + ("," if len(state) == 1 else "") + ")"
    return "None" if state is None else str(tuple(state.shape))


def flatten(state: State) -> tuple[dict[str, Tensor], Any]:
    """A state as named tensors and a JSON skeleton that `unflatten` rebuilds it from."""
    tensors: dict[str, Tensor] = {}

    def skeleton(part: State) -> Any:
        if isinstance(part, tuple):
            return [skeleton(p) for p in part]
        if part is None:
            return None
        tensors[str(len(tensors))] = part.detach().contiguous().clone()
        return str(len(tensors) - 1)

    return tensors, skeleton(state)


def unflatten(tensors: dict[str, Tensor], skeleton: Any) -> State:
    """The inverse of `flatten`."""
    if isinstance(skeleton, list):
        return tuple(unflatten(tensors, s) for s in skeleton)
    return None if skeleton is None else tensors[skeleton]


def save(state: State, path: str | Path, **metadata: str) -> None:
    """Write a state to one safetensors file, with `metadata` beside it; what was there stays until it is
    whole. Raises OSError when it cannot be."""
    tensors, skeleton = flatten(state)
    data = safetensors.torch.save(tensors, {**metadata, "skeleton": json.dumps(skeleton)})
    try:
        disk.replace(path, data)
    except OSError as error:
        said = f"the state could not be written to {path}: {error.strerror or error}"
        raise OSError(error.errno, said) from error


def load(path: str | Path) -> tuple[State, dict[str, str]]:
    """Read a state and its metadata. Raises ValueError when the file is damaged or is not a state."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no state file {path}")
    try:
        with safe_open(str(path), framework="pt") as f:
            metadata = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own type, not exported by name
        raise ValueError(
            f"{path} is not a readable state file ({error}); it may be truncated or damaged"
        ) from error
    if "skeleton" not in metadata:
        raise ValueError(f"{path} holds tensors but no state: it was not written by riverrun.state.save")
    return unflatten(tensors, json.loads(metadata.pop("skeleton"))), metadata
