"""Token shift: every step mixed with the one before it, several times over, forward and backward.

    y_i = x_t + μ_i ⊙ (p_t - x_t)        p_t = x_{t-1}, `last` before the first step, 0 at a reset

    dx_t = Σ_i (1 - μ_i) ⊙ dy_i,t + Σ_i μ_i ⊙ dy_i,t+1, the second where t + 1 exists and is no reset
    dμ_i = Σ_t dy_i,t ⊙ (p_t - x_t)      dlast = Σ_i μ_i ⊙ dy_i,0, unless step 0 is a reset

x: (B, T, D)    μ: (N, D)    y: (N, B, T, D)    last: (B, D)    reset: (B, T). Sums in float32, in a fixed
order. What `riverrun.nn.shift` computes; eager PyTorch writes N times x twice on its way back.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from .launch import DEVICE, cdiv, power_of_2
from .tiles import flat

WIDE = 256  # channels of a program, whose one warp loads 16 bytes of bfloat16 a thread
STRETCH = 64  # steps of a program of the backward pass


@triton.jit
def _previous(x, last, reset, n, d, D, T, inside):
    """p at rows n (I, 1) of channels d (1, J)."""
    t = n % T
    value = tl.load(x + (n - 1) * D + d, mask=inside & (t > 0), other=0.0).to(tl.float32)
    if last is not None:
        value += tl.load(last + n // T * D + d, mask=inside & (t == 0), other=0.0).to(tl.float32)
    if reset is not None:
        value = tl.where(tl.load(reset + n, mask=inside, other=0) != 0, 0.0, value)
    return value


@triton.jit
def _forward(
    x, mix, last, reset, y, R, T, D, N: tl.constexpr, TIMES: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Grid (blocks of TIMES of the R = B T rows, channel blocks)."""
    n = tl.program_id(0).to(tl.int64) * TIMES + tl.arange(0, TIMES)[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    inside = (n < R) & (d < D)
    x_ = tl.load(x + n * D + d, mask=inside, other=0.0).to(tl.float32)
    step = _previous(x, last, reset, n, d, D, T, inside) - x_
    for i in tl.static_range(N):
        m = tl.load(mix + i * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(y + (i * R + n) * D + d, (x_ + m * step).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _carried(mix, reset, dy, n, d, R, T, D, inside, N: tl.constexpr):
    """Σ_i μ_i ⊙ dy_i at rows n, 0 at a reset: what they give to the step before."""
    total = tl.zeros([n.shape[0], d.shape[1]], tl.float32)
    for i in tl.static_range(N):
        m = tl.load(mix + i * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += m * tl.load(dy + (i * R + n) * D + d, mask=inside, other=0.0).to(tl.float32)
    if reset is not None:
        total = tl.where(tl.load(reset + n, mask=inside, other=0) != 0, 0.0, total)
    return total


@triton.jit
def _backward(
    x, mix, last, reset, dy, dx, dmix, dlast, R, T, D, LENGTH,
    N: tl.constexpr, NP: tl.constexpr, TIMES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (stretches of LENGTH rows, channel blocks). dmix has a row of N for each stretch."""
    part, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * C + tl.arange(0, C)[None, :]
    which = tl.arange(0, NP)[:, None]
    sums = tl.zeros([NP, C], tl.float32)
    end = tl.minimum(R, (part + 1) * LENGTH)
    for n0 in range(part * LENGTH, end, TIMES):
        n = n0 + tl.arange(0, TIMES)[:, None]
        inside = (n < end) & (d < D)
        x_ = tl.load(x + n * D + d, mask=inside, other=0.0).to(tl.float32)
        step = _previous(x, last, reset, n, d, D, T, inside) - x_
        total = _carried(mix, reset, dy, n + 1, d, R, T, D, inside & (n % T < T - 1), N)
        for i in tl.static_range(N):
            m = tl.load(mix + i * D + d, mask=d < D, other=0.0).to(tl.float32)
            g = tl.load(dy + (i * R + n) * D + d, mask=inside, other=0.0).to(tl.float32)
            total += (1.0 - m) * g
            sums += tl.where(which == i, tl.sum(g * step, 0)[None, :], 0.0)
        tl.store(dx + n * D + d, total.to(dx.dtype.element_ty), mask=inside)
        if dlast is not None:
            first = inside & (n % T == 0)
            given = _carried(mix, reset, dy, n, d, R, T, D, first, N)
            tl.store(dlast + n // T * D + d, given.to(dlast.dtype.element_ty), mask=first)
    tl.store(dmix + (part * N + which) * D + d, sums, mask=(which < N) & (d < D))


def _sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Rows, steps, channels, and channels of a program."""
    B, T, D = x.shape
    return B * T, T, D, min(WIDE, power_of_2(D))


def make(x: Tensor, mix: Tensor, last: Tensor | None, reset: Tensor | None, out: Tensor | None = None):
    """y, in x's dtype or in that of `out`, where it then goes."""
    R, T, D, C = _sizes(x)
    y = x.new_empty(mix.shape[0], *x.shape) if out is None else out
    inputs = (flat(v) for v in (x, mix, last, reset))
    _forward[(cdiv(R, 4), cdiv(D, C))](*inputs, y, R, T, D, mix.shape[0], 4, C, num_warps=1)
    return y


def unmake(x: Tensor, mix: Tensor, last: Tensor | None, reset: Tensor | None, d: Tensor):
    """Gradients of the inputs; d, (N, B, T, D) and without gaps, is dy before and y after."""
    gradients = _gradients(x, mix, last, reset, d)
    make(x, mix, last, reset, d)
    return gradients


def _gradients(x, mix, last, reset, dy):
    (R, T, D, C), N = _sizes(x), mix.shape[0]
    parts = cdiv(R, STRETCH)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dmix = x.new_empty(parts, N, D, dtype=torch.float32)
    dlast = None if last is None else torch.empty_like(last, memory_format=torch.contiguous_format)
    _backward[(parts, cdiv(D, C))](
        *(flat(v) for v in (x, mix, last, reset, dy)), dx, dmix, dlast, R, T, D, STRETCH,
        N, power_of_2(N), 4, C, num_warps=1,
    )  # fmt: skip
    return dx, dmix.sum(0).to(mix.dtype), dlast, None


def _run(x, mix, last, reset, save):
    return (make(x, mix, last, reset),)


def _fake(x, mix, last, reset, save):
    return (x.new_empty(mix.shape[0], *x.shape),)


_shift = define(
    "token_shift_gpu", "Tensor x, Tensor mix, Tensor? last, Tensor? reset", 1, None, DEVICE,
    _run, _gradients, _fake,
)  # fmt: skip


def call(x: Tensor, mix: Tensor, last: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """(N, B, T, D) for x (B, T, D) and mix (N, D), differentiable."""
    if why := refuses(x):
        raise ValueError(f"token shift: {why}")
    return _shift(x, mix, last, reset)[0]


def refuses(x: Tensor) -> str | None:
    """Why the kernel cannot take x, or None."""
    if x.device.type != DEVICE:
        return f"it runs on {DEVICE}, x is on {x.device.type}"
    return "it computes in float32, and x is float64" if x.dtype == torch.float64 else None
