"""silu(gate) ⊙ up in one pass, forward and backward, for the two halves of one projection.

    y = g σ(g) u        du = dy g σ(g)        dg = dy u σ(g) (1 + g (1 - σ(g)))

x = [g, u]: (rows, 2 N)    y: (rows, N)    What `riverrun.nn.GatedMLP` computes between its maps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from .launch import DEVICE, cdiv

BLOCK = 1024


@triton.jit
def _forward(x, y, N, BLOCK: tl.constexpr):
    """Grid (rows, blocks of channels)."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(x + row * 2 * N + c, mask=c < N, other=0.0).to(tl.float32)
    u = tl.load(x + row * 2 * N + N + c, mask=c < N, other=0.0).to(tl.float32)
    tl.store(y + row * N + c, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=c < N)


@triton.jit
def _backward(x, dy, dx, y, N, BLOCK: tl.constexpr):
    """y, which may stand in the place of dy, is made again if it is wanted."""
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(x + row * 2 * N + c, mask=c < N, other=0.0).to(tl.float32)
    u = tl.load(x + row * 2 * N + N + c, mask=c < N, other=0.0).to(tl.float32)
    d = tl.load(dy + row * N + c, mask=c < N, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    dg, du = d * u * s * (1.0 + g * (1.0 - s)), d * g * s
    tl.store(dx + row * 2 * N + c, dg.to(dx.dtype.element_ty), mask=c < N)
    tl.store(dx + row * 2 * N + N + c, du.to(dx.dtype.element_ty), mask=c < N)
    if y is not None:
        tl.debug_barrier()  # all threads have read dy
        tl.store(y + row * N + c, (g * s * u).to(y.dtype.element_ty), mask=c < N)


def _run(x, save=False):
    (y,), N = _fake(x), x.shape[-1] // 2
    _forward[(y.numel() // N, cdiv(N, BLOCK))](x.contiguous(), y, N, BLOCK)
    return (y,)


def _run_backward(x, dy, y=None):
    dx, N = torch.empty_like(x, memory_format=torch.contiguous_format), x.shape[-1] // 2
    rows = x.numel() // (2 * N)
    _backward[(rows, cdiv(N, BLOCK))](x.contiguous(), dy.contiguous(), dx, y, N, BLOCK)
    return (dx,)


def _fake(x, *others):
    return (x.new_empty(1, *x.shape[:-1], x.shape[-1] // 2),)


_swiglu = define("swiglu_gpu", "Tensor x", 1, None, DEVICE, _run, _run_backward, _fake)


def refuses(x: Tensor) -> str | None:
    """Why the kernel cannot take x, or None."""
    if x.device.type != DEVICE:
        return f"it runs on {DEVICE}, x is on {x.device.type}"
    return "it computes in float32, and x is float64" if x.dtype == torch.float64 else None


def call(x: Tensor) -> Tensor:
    """(..., 2 N) -> (1, ..., N), differentiable."""
    if why := refuses(x):
        raise ValueError(f"swiglu: {why}")
    return _swiglu(x)[0]


def make(x: Tensor) -> Tensor:
    return _run(x)[0]


def unmake(x: Tensor, d: Tensor) -> tuple[Tensor]:
    """The gradient of x; d, without gaps, is dy before and y after."""
    return _run_backward(x, d, d)
