"""Linear maps of what is cheap to make: on a GPU that is made again on the way back instead of being kept.

    y_j = W_j x_{i(j)}        x_1, ..., x_N = make(inputs)

What a map keeps for its gradient is its input, so a token shift of six mixtures keeps six tensors and SwiGLU
one of the inner width, though one pass over their own inputs gives them back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from riverrun.kernels.library import PLAIN, watched


def mapped(
    kernel: Any, inputs: tuple[Tensor | None, ...], layers: Sequence[nn.Module], rows: Sequence[int]
) -> tuple[Tensor, ...]:
    """`layers[j]` of x_{rows[j]}, for each j.

    kernel.call(*inputs) gives (N, ..., D), differentiable; kernel.make(*inputs) the same, not differentiable;
    kernel.unmake(*inputs, d) the gradients of the inputs for d, those of the x, and turns d into the x.
    """
    if torch.is_grad_enabled() and not watched() and all(plain(layer) for layer in layers):
        weights: list[Any] = [layer.weight for layer in layers]
        device = weights[0].device.type
        if torch.is_autocast_enabled(device):
            weights = [w.to(torch.get_autocast_dtype(device)) for w in weights]
        return _Mapped.apply(kernel, tuple(rows), len(inputs), *inputs, *weights)
    x = kernel.call(*inputs)
    return tuple(layer(x[i]) for layer, i in zip(layers, rows, strict=True))


def plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and nothing else, which nobody watches."""
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return type(layer) is nn.Linear and layer.bias is None and type(layer.weight) in PLAIN and not hooks


class _Mapped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, kernel, rows, count, *tensors):
        ctx.kernel, ctx.rows, ctx.count = kernel, rows, count
        ctx.save_for_backward(*tensors)
        x, weights = kernel.make(*tensors[:count]), tensors[count:]
        return tuple(F.linear(x[i].to(w.dtype), w) for i, w in zip(rows, weights, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx, *dys):
        inputs, weights = ctx.saved_tensors[: ctx.count], ctx.saved_tensors[ctx.count :]
        shape, flat = dys[0].shape[:-1], [dy.reshape(-1, dy.shape[-1]) for dy in dys]
        d = flat[0].new_empty(1 + max(ctx.rows), len(flat[0]), weights[0].shape[1])
        for j, i in enumerate(ctx.rows):
            if i in ctx.rows[:j]:
                d[i].addmm_(flat[j], weights[j])
            else:
                torch.mm(flat[j], weights[j], out=d[i])
        gradients = ctx.kernel.unmake(*inputs, d.view(-1, *shape, d.shape[-1]))
        return None, None, None, *gradients, *(dy.T @ d[i] for dy, i in zip(flat, ctx.rows, strict=True))
