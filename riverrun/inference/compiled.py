"""One step as machine code, made for one model and one batch size: fast decoding on a CPU.

    engine = Compiled(model)                                         needs a C++ compiler
    run = Generation(model, tokenizer, prompts, engine=engine)       compiles at its first step
    running = engine(state); logits = running(tokens)                by hand: tokens (B, 1), logits (B, 1, V)
    running.state                                                    what has read them

It is the model's own forward, traced by `torch.export` with every recurrence run by its definition: for a
single step that is a few products and sums, which Inductor fuses with all that stands between two maps into
one loop. Weights are constants of the code, packed for products with few rows, so they are held twice; code
for changed weights, another batch size or another number of threads is made anew. Results are those of the
model up to rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.state import State, leaves, tree_map

Code = Callable[..., tuple[Tensor, ...]]  # (tokens, *leaves of a state) -> (logits, *leaves of the next)

# constants may be folded and packed; "max_autotune" makes Inductor consider its own loops for products
OPTIONS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}


class Compiled:
    """The compiled steps of a model, or of any module `(tokens, state) -> (logits, state)`.

    Raises ValueError for a model that is not on a CPU or whose state grows, and RuntimeError when there is no
    C++ compiler. `seconds` is what compiling has taken so far.
    """

    def __init__(self, model: nn.Module):
        if why := refusal(model):
            raise ValueError(f"a step of this model cannot be compiled: {why}. Run it without: compile=false")
        require_compiler()
        self.model, self.seconds = model, 0.0
        self.codes: dict[Any, Code] = {}

    def __call__(self, state: State) -> Running:
        """A run from `state` on. Raises ValueError under autocast and for another model's state."""
        if torch.is_autocast_enabled("cpu"):
            raise ValueError(
                "a step is not compiled under torch.autocast; convert the model: model.bfloat16()"
            )
        return Running(self, state)

    @torch.no_grad()
    def code(self, state: State) -> Code:
        """What runs a step from a state of these shapes, made if it is not there yet."""
        key = tuple((x.shape, x.dtype) for x in leaves(state)), torch.get_num_threads(), edition(self.model)
        if key not in self.codes:
            self.codes = {k: code for k, code in self.codes.items() if k[-1] == key[-1]}  # of these weights
            start = time.perf_counter()
            self.codes[key] = build(self.model, state)
            self.seconds += time.perf_counter() - start
        return self.codes[key]


class Running:
    """A compiled step from one state on: called with tokens (B, 1), it gives logits (B, 1, V)."""

    def __init__(self, compiled: Compiled, state: State):
        self.compiled = compiled
        self.run: Code | None = None
        if state is not None:
            self.begin(state)

    def begin(self, state: State) -> None:
        state = tree_map(Tensor.contiguous, state)
        self.like, self.leaves = state, list(leaves(state))
        self.run = self.compiled.code(state)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        if self.run is None:  # a sequence's first token: the model says what its states look like
            logits, state = self.compiled.model(tokens, None)
            self.begin(state)
            return logits
        logits, *self.leaves = self.run(tokens, *self.leaves)
        return logits

    @property
    def state(self) -> State:
        """What has read all tokens so far, None before the first; later steps leave it as it is."""
        return None if self.run is None else nested(self.leaves, self.like)


class Flat(nn.Module):
    """One step whose state is passed and returned as a list of tensors, each without gaps."""

    def __init__(self, model: nn.Module, like: State):
        super().__init__()
        self.model, self.like = model, like

    def forward(self, tokens: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        with ops.forced(**dict.fromkeys(ops.OPS, "sequential")):
            logits, after = self.model(tokens, nested(state, self.like))
        return logits, *(x.contiguous() for x in leaves(after))


def refusal(model: nn.Module) -> str | None:
    """Why no step of `model` can be compiled here, or None."""
    device = next(model.parameters()).device
    if device.type != "cpu":
        return f"the model is on '{device}', and this code is for a CPU"
    if grows := getattr(model, "grows", None):
        return f"the state of {', '.join(grows)} grows with every token, and the code is for one size"
    return None


def require_compiler() -> None:
    # torch._inductor takes a second to import, which only those who compile should wait for
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise RuntimeError(
            "compiling a step needs a C++ compiler, and none was found: install one (g++ or clang++), name "
            "it in the environment variable CXX, or generate without compile=true"
        ) from error


def edition(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """Differs once a weight was replaced or changed in place, but not through `p.data`: PyTorch counts."""
    return tuple((x.data_ptr(), x._version) for x in (*model.parameters(), *model.buffers()))


def build(model: nn.Module, state: State) -> Code:
    """Trace a step from `state`, and compile it."""
    graph, inputs = trace(model, state)
    with own_products():
        return torch._inductor.compile(graph, inputs, options=OPTIONS)


def trace(model: nn.Module, state: State) -> tuple[torch.fx.GraphModule, list[Any]]:
    """A step from `state` as a graph, and inputs for it. Raises ValueError if there is no one graph."""
    inputs = [torch.zeros(next(leaves(state)).shape[0], 1, dtype=torch.int64), *leaves(state)]
    try:
        graph = torch.export.export(Flat(model, state), tuple(inputs), strict=False).module()
    except RuntimeError as error:
        raise ValueError(
            "a step of this model cannot be traced: what is run depends on data, or takes gradients "
            f"({str(error).strip().splitlines()[0]}). Run it without: compile=false"
        ) from error
    graph.graph.set_codegen(torch.fx.graph.CodeGen())  # inputs are flat: nothing to unpack at every call
    graph.recompile()
    return graph, inputs


@contextmanager
def own_products() -> Iterator[None]:
    """Inside, Inductor multiplies by its own loops wherever it has one, else by the library.

    With 1 to 16 rows they read packed weights as fast as memory gives them. To choose by timing, as Inductor
    would, takes a minute, and what is chosen would vary from run to run.
    """
    from torch._inductor.select_algorithm import ExternKernelCaller, get_algorithm_selector_cache

    def choose(choices: list[Any]) -> list[Any]:
        own = [c for c in choices if not isinstance(c, ExternKernelCaller)]
        return (own or choices)[:1]

    choosers = get_algorithm_selector_cache().preprocessing_fns
    choosers.append(choose)
    try:
        yield
    finally:
        choosers.remove(choose)


def nested(flat: list[Tensor] | tuple[Tensor, ...], like: State) -> State:
    """Tensors in the order of `leaves`, nested as `like`."""
    parts = iter(flat)
    return tree_map(lambda _: next(parts), like)
