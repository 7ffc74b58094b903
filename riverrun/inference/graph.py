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
the GPU cannot be recorded at all. Attention whose cache grows is refused for its shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from riverrun.mixers import row
from riverrun.models.language import LanguageModel
from riverrun.state import State, describe, leaves, tree_map

Step = Callable[[Tensor, State], tuple[Tensor, State]]


def refusal(model: LanguageModel) -> str | None:
    """Why one step of `model` cannot be recorded, or None."""
    if not on_gpu(model.output):
        return f"CUDA graphs need a GPU, and the model is on '{model.output.device}'"
    if model.grows:
        return f"the state of {', '.join(model.grows)} grows with every token, and a graph has one size"
    why = {name: row(name).unrecorded for name in model.layers if row(name).unrecorded}
    return "; ".join(f"{name}: {reason}" for name, reason in why.items()) or None


class Replay:
    """A step `(x, state) -> (y, state)`, a model or a mixer, from `state` on. Its memory is one state more.

    Raises ValueError, when first called, for a step that cannot be recorded.
    """

    def __init__(self, step: Step, state: State):
        self.step, self.state = step, tree_map(owned, state)
        self.graph: torch.cuda.CUDAGraph | None = None

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        if self.graph is None:
            if torch.is_autocast_enabled("cuda"):  # its cast weights are gone when it ends, and a graph stays
                raise ValueError(
                    "a step is not recorded under torch.autocast; convert the model: model.bfloat16()"
                )
            y, after = self.step(x, self.state)
            self.state = tree_map(owned, after)
            self.record(x)
            return y
        self.x.copy_(x)
        self.graph.replay()
        return self.y

    def record(self, x: Tensor) -> None:
        """Record the step that follows, without running it."""
        self.x, graph = x.clone(), torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.y, after = self.step(self.x, self.state)
                trouble = changes(self.state, after)
                if trouble is None:
                    overwrite(self.state, after)
        except RuntimeError as error:
            raise ValueError(
                "this step cannot be recorded in a CUDA graph: it waits for the GPU, or starts what a graph "
                f"cannot hold ({str(error).splitlines()[0]}). Run it without: graph=False"
            ) from error
        if trouble:
            raise ValueError(
                f"this step cannot be recorded in a CUDA graph: {trouble}. Run it without: graph=False"
            )
        self.graph = graph


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
