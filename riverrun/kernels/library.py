"""Kernels as PyTorch operators: `torch.compile(fullgraph=True)`, `torch.export` and autograd see one node.

An operator is a forward that may save tensors for a backward, and a backward that is an operator of its own:

    forward(*inputs, save) -> (*outputs, *saved)         `save` is false when no gradient can be asked for
    backward(*inputs, *outputs, *saved, *grads) -> one gradient per differentiable tensor, None for the others

or backward(*inputs, *grads), where inputs are all it needs. Differentiating a backward raises: a kernel has
no second derivative, and none is better than a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("riverrun", "FRAGMENT")

PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may see operators in their own way

NO_SECOND = (
    "riverrun::{name}: compiled kernels have no second derivative. Where you need one, run the op with "
    "impl='sequential' or its parallel PyTorch form (inside `riverrun.ops.forced(...)`), layers in float64"
)


def define(
    name: str,
    inputs: str,
    outputs: int,
    saved: int | None,
    device: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., Sequence[Tensor | None]],
    fake: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """Register `riverrun::NAME` and its backward for `device` ("cpu" or "cuda"); return it as a function.

    `inputs` is a schema such as "Tensor a, Tensor? state, Tensor? reset, float eps": tensors, then numbers.
    Only float tensors get gradients, of their own shapes and dtypes. If `saved` is None, the backward gets
    inputs and gradients only, zeros for those that are absent. `fake(*inputs, save)` returns empty outputs
    and saved tensors of the right shapes. The function that is returned takes the inputs and gives the
    outputs only. Where nobody watches operators, it calls `forward` and `backward` directly. They never get
    a conjugate or a negative that PyTorch keeps as a flag.
    """
    kinds = [part.split()[0] for part in inputs.split(",")]
    tensors, given = sum(kind.startswith("Tensor") for kind in kinds), len(kinds)
    made = outputs + (saved or 0)
    kept = 0 if saved is None else made
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]

    def bare(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
        """An operator with one result gives it as it is; see `several`."""
        return (lambda *args: function(*args)[0]) if made == 1 else function

    _library.define(f"{name}({inputs}, bool save) -> ({', '.join(['Tensor'] * made)})")
    _library.impl(name, bare(forward), key)
    torch.library.register_fake(f"riverrun::{name}", bare(fake), lib=_library)

    extra = [f"Tensor out{i}" for i in range(kept)] + [f"Tensor? grad{i}" for i in range(outputs)]
    _library.define(f"{name}_backward({inputs}, {', '.join(extra)}) -> Tensor[]")

    # a schema cannot say "list of maybe tensors" as a result: an absent gradient travels as an empty tensor
    def run_backward(*args: Any) -> list[Tensor]:
        return [args[0].new_empty(0) if g is None else g for g in backward(*args)]

    def fake_backward(*args: Any) -> list[Tensor]:
        return [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if differentiable(x)
            else args[0].new_empty(0)
            for x in args[:tensors]
        ]

    _library.impl(f"{name}_backward", run_backward, key)
    torch.library.register_fake(f"riverrun::{name}_backward", fake_backward, lib=_library)
    op = getattr(torch.ops.riverrun, name).default
    op_backward = getattr(torch.ops.riverrun, f"{name}_backward").default

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.numbers = inputs[tensors:given]
        ctx.save_for_backward(*inputs[:tensors], *several(output)[:kept])
        ctx.set_materialize_grads(saved is None)

    def arguments(ctx: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
        """Of the backward; PyTorch gives gradients of what is saved, too."""
        found = ctx.saved_tensors
        return *found[:tensors], *ctx.numbers, *found[tensors:], *grads[:outputs]

    def run_autograd(ctx: Any, *grads: Tensor | None):
        args = arguments(ctx, grads)
        found = zip(op_backward(*args), args[:tensors], strict=True)
        return *[g if differentiable(x) else None for g, x in found], *[None] * (given - tensors + 1)

    def no_second(ctx: Any, *grads: Any):
        raise RuntimeError(NO_SECOND.format(name=name))

    torch.library.register_autograd(f"riverrun::{name}", run_autograd, setup_context=setup, lib=_library)
    torch.library.register_autograd(f"riverrun::{name}_backward", no_second, lib=_library)

    class Direct(torch.autograd.Function):
        """What the operator does under autograd, without the dispatcher: that takes as long as a kernel."""

        @staticmethod
        def forward(ctx: Any, *args: Any):
            result = forward(*args, True)
            setup(ctx, args, result)
            return tuple(result[:outputs])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None):
            if torch.is_grad_enabled() or watched() or any(map(unmade, grads)):
                return run_autograd(ctx, *grads)
            return *backward(*arguments(ctx, grads)), *[None] * (given - tensors)

    def call(*args: Any) -> tuple[Tensor, ...]:
        some = [x for x in args[:tensors] if x is not None]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in some)
        if watched() or any(type(x) not in PLAIN or unmade(x) for x in some):
            return several(op(*args, save))[:outputs]
        return Direct.apply(*args) if save else forward(*args, False)[:outputs]

    return call


def watched() -> bool:
    """Whether anything but autograd wants to see operators: a compiler, a tracer, a mode, `vmap`."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def unmade(x: Tensor | None) -> bool:
    """Whether its numbers are conjugates or negatives of those in memory: the dispatcher makes them."""
    return x is not None and (x.is_conj() or x.is_neg())


def several(results: Any) -> tuple[Tensor, ...]:
    """Of an operator, which gives a single one as it is."""
    return (results,) if isinstance(results, Tensor) else results


def differentiable(x: Tensor | None) -> bool:
    return x is not None and (x.is_floating_point() or x.is_complex())
