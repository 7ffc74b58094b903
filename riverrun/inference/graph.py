"""One step on a GPU, recorded in a CUDA graph and replayed: one launch a token instead of hundreds.

    replay = Replay(model, state)             state of B sequences that have read something
    logits = replay(tokens)                   tokens (B, 1) -> (B, 1, V)
    replay.state                              the state after it

The first call runs the step as it is, which compiles what must be compiled, and records it; every further
call copies its input into the graph's memory and replays. The same kernels run on the same numbers, so the
results are those of the step itself on an input and a state without gaps in memory, to the last bit. Input,
output and state live in the graph's memory and the next call overwrites them: copy what must stay
(`riverrun.state.select` does).

A graph repeats what the GPU did and nothing of what Python did. That is right for ever if the step cannot
notice which step it is: the state keeps its shapes, and whatever of it lies on the CPU, where Python may have
looked, stays what it was. Both are checked when the step is recorded, and a step that waits for a number from
the GPU cannot be recorded at all. A cache that grows is given room for ROOM steps, and when they are taken,
for as many again: then the step is recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from riverrun.mixers import row
from riverrun.models.language import LanguageModel
from riverrun.state import State, describe, leaves, tree_map

Step = Callable[[Tensor, State], tuple[Tensor, State]]

ROOM = 1024  # steps: recording takes some 50 ms, and a cache that is copied once is read at each of them


def refusal(model: LanguageModel) -> str | None:
    """Why one step of `model` cannot be recorded, or None."""
    if not on_gpu(model.output):
        return f"CUDA graphs need a GPU, and the model is on '{model.output.device}'"
    tight = {name for name, mixer in mixers(model) if row(name).state == "grows" and not roomy(mixer)}
    if tight:
        return f"the state of {', '.join(sorted(tight))} grows with every token, and a graph has one size"
    why = {name: row(name).unrecorded for name in model.layers if row(name).unrecorded}
    return "; ".join(f"{name}: {reason}" for name, reason in why.items()) or None


def mixers(model: LanguageModel) -> list[tuple[str, Any]]:
    """Name and module of every layer's mixer."""
    return [(name, block.mixer) for name, block in zip(model.layers, model.blocks, strict=True)]


def roomy(mixer: Any) -> bool:
    """Whether its state, which grows, can be given room: `mixer.room(state, steps)`; `trimmed` undoes it."""
    return hasattr(mixer, "room")


class Replay:
    """A step `(x, state) -> (y, state)`, a model or a mixer, from `state` on. Its memory is one state more.

    `model` is whose state it is, if not the step's own. Raises ValueError, when first called, for a step that
    cannot be recorded.
    """

    def __init__(self, step: Step, state: State, model: Any = None):
        owner: Any = step if model is None else model
        self.layered = isinstance(owner, LanguageModel)
        self.mixers = [mixer for _, mixer in mixers(owner)] if self.layered else [owner]
        self.step, self.parts = step, []
        self.left = ROOM if any(map(roomy, self.mixers)) else None  # steps that there is room for
        self.graph: torch.cuda.CUDAGraph | None = None
        self.y: Any = None
        if state is not None:
            self.parts = [copied(mixer, s) for mixer, s in self.each(state)]

    def each(self, state: State) -> list[tuple[Any, State]]:
        """Every mixer and its state."""
        return list(zip(self.mixers, state if self.layered else (state,), strict=True))

    def whole(self, parts: list[State]) -> State:
        return tuple(parts) if self.layered else parts[0]

    @property
    def held(self) -> State:
        """What the graph reads and writes."""
        return self.whole(self.parts)

    @property
    def state(self) -> State:
        """The state after the last step."""
        if not self.parts:
            return None
        return self.whole([m.trimmed(s, self.left) if roomy(m) else s for m, s in self.each(self.held)])

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled("cuda"):  # its cast weights are gone when it ends, and a graph stays
            raise ValueError(
                "a step is not recorded under torch.autocast; convert the model: model.bfloat16()"
            )
        if not self.parts:  # what its state is like is known after a step
            y, after = self.step(x, None)
            self.parts = [copied(mixer, s) for mixer, s in self.each(after)]
            return y
        if self.left == 0:
            self.enlarge()
        if self.graph is None:
            y, after = self.step(x, self.held)
            after = tree_map(lambda old, new: old if new is old else owned(new), self.held, after)
            self.parts = [s for _, s in self.each(after)]
            self.count()
            self.record(x)
            return y
        self.x.copy_(x)
        self.graph.replay()
        self.count()
        return self.y

    def count(self) -> None:
        """A step that was taken has taken its room."""
        if self.left is not None:
            self.left -= 1

    def enlarge(self) -> None:
        """Caches move to larger ones, layer by layer, after the graph and its memory went."""
        self.graph, self.y = None, None
        for i, mixer in enumerate(self.mixers):
            if roomy(mixer):
                self.parts[i] = mixer.room(mixer.trimmed(self.parts[i], 0), ROOM)
        self.left = ROOM

    def record(self, x: Tensor) -> None:
        """Record the step that follows, without running it."""
        self.x, graph, pool = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # if it fails, the graph's would stay
                torch.cuda.graph(graph, pool, capture_error_mode="thread_local"),
            ):
                self.y, after = self.step(self.x, self.held)
                trouble = changes(self.held, after)
                if trouble is None:
                    overwrite(self.held, after)
        except RuntimeError as error:
            recover(x.device, pool)
            raise ValueError(
                "this step cannot be recorded in a CUDA graph: it waits for the GPU, or starts what a graph "
                f"cannot hold ({str(error).splitlines()[0]}). Run it without: graph=False"
            ) from error
        if trouble:
            raise ValueError(
                f"this step cannot be recorded in a CUDA graph: {trouble}. Run it without: graph=False"
            )
        self.graph = graph


def copied(mixer: Any, state: State) -> State:
    """The state of a mixer in memory of its own, with room for ROOM steps if it grows."""
    return mixer.room(state, ROOM) if roomy(mixer) else tree_map(owned, state)


def recover(device: torch.device, pool: Any) -> None:
    """After a recording that CUDA broke off. PyTorch goes on as if it still ran: no random number can be
    drawn on the GPU, and memory that several streams have used is not free again."""
    with suppress(RuntimeError):  # where only the step failed, the recording has ended as it should
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        torch.zeros(1, device=device)  # the end of any recording lets numbers be drawn again


def owned(x: Tensor) -> Tensor:
    """A copy in memory of its own, without gaps."""
    return x.detach().clone(memory_format=torch.contiguous_format)


def on_gpu(x: Tensor) -> bool:
    return x.device.type == "cuda"


def changes(before: State, after: State) -> str | None:
    """What of a state Python could notice after a step, or None."""
    if describe(before) != describe(after):
        return f"the state changes its shapes in it, from {describe(before)} to {describe(after)}"
    for a, b in zip(leaves(before), leaves(after), strict=True):
        if (a.dtype, a.device) != (b.dtype, b.device):
            return f"a part of the state changes from {a.dtype} on {a.device} to {b.dtype} on {b.device}"
        if not on_gpu(a) and not torch.equal(a, b):
            return "a part of the state that lies on the CPU changes in it"
    return None


def overwrite(state: State, new: State) -> None:
    """Copy the parts of `new` that are on the GPU into `state`, in few launches."""
    mine = {x.untyped_storage().data_ptr() for x in leaves(state)}
    groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
    for old, x in zip(leaves(state), leaves(new), strict=True):
        if x is old or not on_gpu(x):
            continue
        if x.untyped_storage().data_ptr() in mine:  # it may be overwritten before it is read
            x = x.clone()
        pair = groups.setdefault((x.dtype, x.is_contiguous()), ([], []))
        pair[0].append(old)
        pair[1].append(x)
    for olds, news in groups.values():
        torch._foreach_copy_(olds, news)
