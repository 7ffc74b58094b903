"""Every head's row times a number of its own, forward and backward in one pass each.

    y = s x        dx = s dy        ds = Σ x ⊙ dy over the channels of a head

x, y: (B, T, H, P) of x's dtype    s: (B, T, H), usually float32. The product is a float32 one, rounded once.
What `riverrun.nn.scaled` computes; eager PyTorch writes and reads it in float32 before it rounds it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from .launch import DEVICE, cdiv, power_of_2

ITEMS = 1024  # numbers that a program of four warps holds


@triton.jit
def _forward(x, s, y, R, H, P, XS, ROWS: tl.constexpr, C: tl.constexpr):
    """Grid (blocks of ROWS heads), R heads in all, H to a step. XS: from one step of x to the next."""
    i, j = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, C)[None, :]
    inside = (i < R) & (j < P)
    x_ = tl.load(x + i // H * XS + i % H * P + j, mask=inside, other=0.0).to(tl.float32)
    s_ = tl.load(s + i, mask=i < R, other=0.0).to(tl.float32)
    tl.store(y + i * P + j, (s_ * x_).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(x, s, dy, dx, ds, R, H, P, XS, ROWS: tl.constexpr, C: tl.constexpr):
    i, j = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, C)[None, :]
    inside = (i < R) & (j < P)
    x_ = tl.load(x + i // H * XS + i % H * P + j, mask=inside, other=0.0).to(tl.float32)
    s_ = tl.load(s + i, mask=i < R, other=0.0).to(tl.float32)
    dy_ = tl.load(dy + i * P + j, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx + i * P + j, (s_ * dy_).to(dx.dtype.element_ty), mask=inside)
    tl.store(ds + i, tl.sum(x_ * dy_, 1)[:, None].to(ds.dtype.element_ty), mask=i < R)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _launch(kernel, x: Tensor, s: Tensor, *others: Tensor) -> None:
    """x may be a part of a wider tensor, if each of its steps lies in one piece."""
    H, P = x.shape[2:]
    steps = x.reshape(-1, H * P)
    steps = steps if steps.stride(1) == 1 else steps.contiguous()
    C, R = power_of_2(P), len(steps) * H
    rows = max(1, min(ITEMS // C, power_of_2(R)))
    warps = max(1, min(4, rows * C // 256))
    kernel[(cdiv(R, rows),)](
        steps, s.contiguous(), *others, R, H, P, steps.stride(0), rows, C, num_warps=warps
    )


def _run(x, s, save):
    y = _like(x)
    _launch(_forward, x, s, y)
    return (y,)


def _run_backward(x, s, dy):
    dx, ds = _like(x), _like(s)
    _launch(_backward, x, s, dy.contiguous(), dx, ds)
    return dx, ds


_scaled = define(
    "scaled_gpu", "Tensor x, Tensor s", 1, None, DEVICE,
    _run, _run_backward, lambda x, *others: (_like(x),),
)  # fmt: skip


def scaled(x: Tensor, s: Tensor) -> Tensor:
    if why := refuses(x, s):
        raise ValueError(f"scaled: {why}")
    return _scaled(x, s)[0]


def refuses(x: Tensor, s: Tensor) -> str | None:
    """Why the kernel cannot take x and s, or None."""
    if x.device.type != DEVICE:
        return f"it runs on {DEVICE}, x is on {x.device.type}"
    if torch.float64 in (x.dtype, s.dtype):
        return "it computes in float32, and an argument is float64"
    return None
