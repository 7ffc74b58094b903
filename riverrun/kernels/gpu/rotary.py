"""Rotary positions: pairs of channels turned by angles whose cosines and sines are given, in one pass.

    y_i = x_i cos_i - x_{i + K/2} sin_i        y_{i + K/2} = x_{i + K/2} cos_i + x_i sin_i

x, y: (B, T, H, K)    cos, sin: (B, T, K/2) float32. Gradients are turned back by the same kernel. What
`riverrun.nn.rotary.rotate` computes; eager PyTorch reads and writes x some twelve times for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import PLAIN, watched

from .launch import DEVICE, cdiv, power_of_2

ITEMS = 512  # pairs that a program of four warps holds


@triton.jit
def _turn(x, cos, sin, y, R, H, HALF, XS, ROWS: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr):
    """Grid (blocks of ROWS heads), R heads in all, H to a step. XS: from one step of x to the next."""
    i, j = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, C)[None, :]
    inside, step = (i < R) & (j < HALF), i // H
    at = step * XS + i % H * 2 * HALF + j
    a = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(cos + step * HALF + j, mask=inside, other=0.0)
    s = tl.load(sin + step * HALF + j, mask=inside, other=0.0)
    if BACK:
        s = -s
    to = y + i * 2 * HALF + j
    tl.store(to, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
    tl.store(to + HALF, (b * c + a * s).to(y.dtype.element_ty), mask=inside)


def _run(x, cos, sin, back):
    H, K = x.shape[2:]
    steps = x.reshape(-1, H * K)
    steps = steps if steps.stride(1) == 1 else steps.contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    C, R = power_of_2(K // 2), len(steps) * H
    rows = max(1, min(ITEMS // C, power_of_2(R)))
    warps = max(1, min(4, rows * C // 128))
    _turn[(cdiv(R, rows),)](
        steps, cos.contiguous(), sin.contiguous(), y, R, H, K // 2, steps.stride(0), rows, C, back,
        num_warps=warps,
    )  # fmt: skip
    return y


@torch.library.custom_op("riverrun::rotate_gpu", mutates_args=(), device_types=DEVICE)
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    return _run(x, cos, sin, back)


@_rotate.register_fake
def _(x, cos, sin, back):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _gradients(ctx, dy):
    return _turned(dy, *ctx.saved_tensors, not ctx.back), None, None, None


_rotate.register_autograd(_gradients, setup_context=_setup)


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher. `define`'s have no second derivative; this one's is itself."""

    @staticmethod
    def forward(ctx, *args):
        _setup(ctx, args, None)
        return _run(*args)

    backward = staticmethod(_gradients)


def _turned(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if watched() or type(x) not in PLAIN:
        return _rotate(x, cos, sin, back)
    turn = _Direct.apply if torch.is_grad_enabled() and x.requires_grad else _run
    return turn(x, cos, sin, back)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (B, T, H, K), K even, turned by the angles of cos and sin (B, T, K/2)."""
    if why := refuses(x):
        raise ValueError(f"rotate: {why}")
    return _turned(x, cos, sin, False)


def refuses(x: Tensor) -> str | None:
    """Why the kernel cannot take x, or None."""
    if x.device.type != DEVICE:
        return f"it runs on {DEVICE}, x is on {x.device.type}"
    return "it computes in float32, and x is float64" if x.dtype == torch.float64 else None
