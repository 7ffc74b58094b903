"""Kernels as PyTorch operators: `torch.compile(fullgraph=True)`, `torch.export` and autograd see one node.

An operator is a forward that may save tensors for a backward, and a backward that is an operator of its own:

    forward(*inputs, save) -> (*outputs, *saved)         `save` is false when no gradient can be asked for
    backward(*inputs, *outputs, *saved, *grads) -> one gradient per differentiable input, None for the others

Differentiating a backward raises: a kernel has no second derivative, and none is better than a silent zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("riverrun", "FRAGMENT")

PLAIN = (Tensor, torch.nn.Parameter)  # subclasses may see operators in their own way

NO_SECOND = (
    "riverrun::{name}: compiled kernels have no second derivative. Run the op with impl='sequential' or its "
    "parallel PyTorch form (inside `riverrun.ops.forced(...)`) where you need one"
)


def define(
    name: str,
    inputs: str,
    outputs: int,
    saved: int,
    device: str,
    forward: Callable[..., tuple[Tensor, ...]],
    backward: Callable[..., tuple[Tensor | None, ...]],
    fake: Callable[..., tuple[Tensor, ...]],
) -> Callable[..., tuple[Tensor, ...]]:
    """Register `riverrun::NAME` and its backward for `device` ("cpu" or "cuda"); return it as a function.

    `inputs` is a schema such as "Tensor a, Tensor b, Tensor? state, Tensor? reset"; only float tensors get
    gradients, of their own shapes and dtypes. `fake(*inputs, save)` returns empty outputs and saved tensors
    of the right shapes. The function that is returned takes the inputs and gives the outputs only. Where
    nobody watches operators, it calls `forward` and `backward` directly.
    """
    names = [part.split()[-1] for part in inputs.split(",")]
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    results = ", ".join(["Tensor"] * (outputs + saved))
    _library.define(f"{name}({inputs}, bool save) -> ({results})")
    _library.impl(name, forward, key)
    torch.library.register_fake(f"riverrun::{name}", fake, lib=_library)

    extra = ", ".join(
        [f"Tensor out{i}" for i in range(outputs + saved)] + [f"Tensor? grad{i}" for i in range(outputs)]
    )
    _library.define(f"{name}_backward({inputs}, {extra}) -> Tensor[]")

    # a schema cannot say "list of maybe tensors" as a result: an absent gradient travels as an empty tensor
    def run_backward(*args: Any) -> list[Tensor]:
        given = [x for x in args[: len(names)] if x is not None]
        return [given[0].new_empty(0) if g is None else g for g in backward(*args)]

    def fake_backward(*args: Any) -> list[Tensor]:
        return [
            torch.empty_like(x, memory_format=torch.contiguous_format)
            if differentiable(x)
            else x0.new_empty(0)
            for x0 in args[:1]
            for x in args[: len(names)]
        ]

    _library.impl(f"{name}_backward", run_backward, key)
    torch.library.register_fake(f"riverrun::{name}_backward", fake_backward, lib=_library)
    op = getattr(torch.ops.riverrun, name).default
    op_backward = getattr(torch.ops.riverrun, f"{name}_backward").default

    def setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[: len(names)], *output)
        ctx.set_materialize_grads(False)

    def run_autograd(ctx: Any, *grads: Tensor | None):
        saved_tensors = ctx.saved_tensors
        result = op_backward(*saved_tensors, *grads[:outputs])
        given = saved_tensors[: len(names)]
        return *[g if differentiable(x) else None for g, x in zip(result, given, strict=True)], None

    def no_second(ctx: Any, *grads: Any):
        raise RuntimeError(NO_SECOND.format(name=name))

    torch.library.register_autograd(f"riverrun::{name}", run_autograd, setup_context=setup, lib=_library)
    torch.library.register_autograd(f"riverrun::{name}_backward", no_second, lib=_library)

    class Direct(torch.autograd.Function):
        """What the operator does under autograd, without the dispatcher: that takes as long as a kernel."""

        @staticmethod
        def forward(ctx: Any, *args: Tensor | None):
            result = forward(*args, True)
            ctx.save_for_backward(*args, *result)
            ctx.set_materialize_grads(False)
            return tuple(result[:outputs])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None):
            if torch.is_grad_enabled() or watched():
                return run_autograd(ctx, *grads)[:-1]
            return tuple(backward(*ctx.saved_tensors, *grads))

    def call(*args: Tensor | None) -> tuple[Tensor, ...]:
        save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in args)
        if watched() or any(x is not None and type(x) not in PLAIN for x in args):
            return op(*args, save)[:outputs]
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


def differentiable(x: Tensor | None) -> bool:
    return x is not None and (x.is_floating_point() or x.is_complex())
