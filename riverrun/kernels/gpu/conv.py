"""The short causal convolution with its state on a GPU: every x is read once, and W taps come from cache.

    y_t = c + Σ_j w[W-1-j] x_{t-j}        dx_t = Σ_j w[W-1-j] dy_{t+j}        dw[W-1-j] = Σ_t dy_t x_{t-j}

followed by SiLU if wanted, whose gradient makes y again and is a pass before the others. With x before time
0 from the state, and no tap across a reset. Time -(W - 1) … -1 of dx is the state's gradient, and the
gradient of the last state joins the dx of its last W - 1 inputs. A program takes a block of channels and a
stretch of time; its parts of dw and dc are summed afterwards in a fixed order.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from .launch import DEVICE, cdiv, power_of_2
from .tiles import flat

WIDEST = 32  # taps
STRETCH = 128  # steps a program of the backward pass


@triton.jit
def _inputs(x, state, row, t, d, D, XS, T, W: tl.constexpr):
    """x at times t (I, 1) of channels d (1, J); before time 0 from the state, before that nothing.

    XS: from one step of x to the next.
    """
    value = tl.load(x + (row * T + t) * XS + d, mask=(t >= 0) & (t < T) & (d < D), other=0.0).to(tl.float32)
    if state is not None:
        early = (t < 0) & (t >= 1 - W) & (d < D)
        value += tl.load(state + (row * (W - 1) + t + W - 1) * D + d, mask=early, other=0.0).to(tl.float32)
    return value


@triton.jit
def _cut(reset, row, t, T):
    """Whether a reset stands at time t."""
    return tl.load(reset + row * T + t, mask=(t >= 0) & (t < T), other=0) != 0


@triton.jit
def _keep(x, state, reset, tail, row, d, D, XS, T, W: tl.constexpr):
    """Write the last W - 1 inputs that no reset follows, newest last."""
    one = tl.zeros([1, 1], tl.int32)
    seen = tl.full([1, 1], 1, tl.int1)
    for j in tl.static_range(W - 1):
        if reset is not None and j > 0:
            seen = seen & (_cut(reset, row, T - j + one, T) == 0)
        value = tl.where(seen, _inputs(x, state, row, T - 1 - j + one, d, D, XS, T, W), 0.0)
        tl.store(tail + (row * (W - 1) + W - 2 - j) * D + d, value, mask=d < D)


@triton.jit
def _forward(
    x, w, c, state, reset, dy, y, tail, D, XS, T,
    SILU: tl.constexpr, W: tl.constexpr, TIMES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (time blocks, channel blocks, B). The last time block writes the state.

    With dy, that of SiLU's result, y becomes the gradient of what SiLU was given.
    """
    row = tl.program_id(2).to(tl.int64)
    t = tl.program_id(0) * TIMES + tl.arange(0, TIMES)[:, None]
    d = tl.program_id(1) * C + tl.arange(0, C)[None, :]
    total = tl.zeros([TIMES, C], tl.float32)
    if c is not None:
        total += tl.load(c + d, mask=d < D, other=0.0).to(tl.float32)
    seen = tl.full([TIMES, 1], 1, tl.int1)
    for j in tl.static_range(W):
        value = _inputs(x, state, row, t - j, d, D, XS, T, W)
        if reset is not None and j > 0:
            seen = seen & (_cut(reset, row, t - j + 1, T) == 0)
            value = tl.where(seen, value, 0.0)
        total += value * tl.load(w + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32)
    at, inside = (row * T + t) * D + d, (t < T) & (d < D)
    if SILU:
        gate = tl.sigmoid(total)
        if dy is not None:
            g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
            total = g * gate * (1.0 + total * (1.0 - gate))
        else:
            total *= gate
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)
    if tail is not None and tl.program_id(0) == tl.num_programs(0) - 1:
        _keep(x, state, reset, tail, row, d, D, XS, T, W)


@triton.jit
def _gradient(w, reset, dy, dtail, row, t, d, D, T, W: tl.constexpr):
    """dx at times t (I, 1), which may lie before 0."""
    total = tl.zeros([t.shape[0], d.shape[1]], tl.float32)
    seen = tl.full([t.shape[0], 1], 1, tl.int1)
    for j in tl.static_range(W):
        s = t + j
        g = tl.load(dy + (row * T + s) * D + d, mask=(s >= 0) & (s < T) & (d < D), other=0.0).to(tl.float32)
        if reset is not None and j > 0:
            seen = seen & (_cut(reset, row, s, T) == 0)
            g = tl.where(seen, g, 0.0)
        total += g * tl.load(w + d * W + (W - 1 - j), mask=d < D, other=0.0).to(tl.float32)
    if dtail is not None:
        # the last state holds x_t if t is among the last W - 1 times, all of which the loop has looked at
        i = t - (T - W + 1)
        kept = (i >= 0) & (i < W - 1) & seen
        total += tl.load(dtail + (row * (W - 1) + i) * D + d, mask=kept & (d < D), other=0.0)
    return total


@triton.jit
def _backward(
    x, w, state, reset, dy, dtail, dx, dw, dc, dstate, D, XS, T, LENGTH,
    W: tl.constexpr, WP: tl.constexpr, TIMES: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (stretches of LENGTH steps, channel blocks, B). dw and dc have a row for each (B, stretch)."""
    piece, row = tl.program_id(0), tl.program_id(2).to(tl.int64)
    d, taps = tl.program_id(1) * C + tl.arange(0, C)[None, :], tl.arange(0, WP)[:, None]
    sum_w, sum_c = tl.zeros([WP, C], tl.float32), tl.zeros([1, C], tl.float32)
    end = tl.minimum(T, (piece + 1) * LENGTH)
    for t0 in range(piece * LENGTH, end, TIMES):
        t = t0 + tl.arange(0, TIMES)[:, None]
        g = _gradient(w, reset, dy, dtail, row, t, d, D, T, W)
        tl.store(dx + (row * T + t) * D + d, g.to(dx.dtype.element_ty), mask=(t < end) & (d < D))
        g = tl.load(dy + (row * T + t) * D + d, mask=(t < end) & (d < D), other=0.0).to(tl.float32)
        sum_c += tl.sum(g, 0)[None, :]
        seen = tl.full([TIMES, 1], 1, tl.int1)
        for j in tl.static_range(W):
            value = _inputs(x, state, row, t - j, d, D, XS, T, W)
            if reset is not None:
                if j > 0:
                    seen = seen & (_cut(reset, row, t - j + 1, T) == 0)
                value = tl.where(seen, value, 0.0)
            sum_w += tl.where(taps == W - 1 - j, tl.sum(value * g, 0)[None, :], 0.0)
    part = row * tl.num_programs(0) + piece
    tl.store(dw + (part * D + d) * W + taps, sum_w, mask=(taps < W) & (d < D))
    tl.store(dc + part * D + d, sum_c, mask=d < D)
    if dstate is not None and piece == 0:
        t = taps - (W - 1)
        g = _gradient(w, reset, dy, dtail, row, t, d, D, T, W)
        tl.store(dstate + (row * (W - 1) + taps) * D + d, g, mask=(taps < W - 1) & (d < D))


def _tile(x: Tensor) -> dict:
    """Threads along channels only, 16 bytes each, so that sums over a tile's times stay in the thread."""
    vector = 16 // x.element_size()
    C = min(power_of_2(x.shape[2]), 128 * vector)
    times = min(8 if vector == 4 else 4, power_of_2(x.shape[1]))
    return {"TIMES": times, "C": C, "num_warps": max(1, C // (32 * vector))}


def _steps(x: Tensor) -> Tensor:
    """(B T, D), a view if a step lies in one piece: x is often a part of a wider projection."""
    x = x.reshape(-1, x.shape[2])
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(x, w, c, state, reset, dy, y, tail, silu: bool) -> None:
    (B, T, D), tile, steps = x.shape, _tile(x), _steps(x)
    grid = (cdiv(T, tile["TIMES"]), cdiv(D, tile["C"]), B)
    others = (flat(v) for v in (w, c, state, reset, dy))
    _forward[grid](steps, *others, y, tail, D, steps.stride(0), T, SILU=silu, W=w.shape[1], **tile)


def _run(x, w, c, state, reset, save, silu=False):
    y, tail = _fake(x, w, c, state, reset, save)
    _launch(x, w, c, state, reset, None, y, tail, silu)
    return y, tail


def _run_backward(x, w, c, state, reset, y, tail, dy, dtail, silu=False):
    B, T, D = x.shape
    W, pieces, tile, steps = w.shape[1], cdiv(T, STRETCH), _tile(x), _steps(x)
    dy = torch.zeros_like(y) if dy is None else dy
    if silu:
        dsum = torch.empty_like(y)
        _launch(x, w, c, state, reset, dy, dsum, None, silu)
        dy = dsum
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dw = x.new_empty(B * pieces, D, W, dtype=torch.float32)
    dc = x.new_empty(B * pieces, D, dtype=torch.float32)
    dstate = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    inputs = tuple(flat(v) for v in (w, state, reset, dy, dtail))
    _backward[(pieces, cdiv(D, tile["C"]), B)](
        steps, *inputs, dx, dw, dc, dstate, D, steps.stride(0), T, STRETCH,
        W=W, WP=power_of_2(W), **tile,
    )  # fmt: skip
    return dx, dw.sum(0).to(w.dtype), None if c is None else dc.sum(0).to(c.dtype), dstate, None


def _fake(x, w, c, state, reset, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0], w.shape[1] - 1, x.shape[2], dtype=torch.float32)


ARGUMENTS = "Tensor x, Tensor w, Tensor? c, Tensor? state, Tensor? reset"

_short_conv = define("short_conv_gpu", ARGUMENTS, 2, 0, DEVICE, _run, _run_backward, _fake)
_short_conv_silu = define(
    "short_conv_silu_gpu", ARGUMENTS, 2, 0, DEVICE,
    partial(_run, silu=True), partial(_run_backward, silu=True), _fake,
)  # fmt: skip


def short_conv(
    x: Tensor, w: Tensor, c: Tensor | None = None, state: Tensor | None = None, reset: Tensor | None = None
):
    y, tail = _short_conv(x, w, c, state, reset)
    return y, tail


def short_conv_silu(
    x: Tensor, w: Tensor, c: Tensor | None = None, state: Tensor | None = None, reset: Tensor | None = None
):
    y, tail = _short_conv_silu(x, w, c, state, reset)
    return y, tail


def refuses(w: Tensor) -> str | None:
    """Why so many taps cannot be unrolled, or None."""
    if w.shape[1] > WIDEST:
        return f"W = {w.shape[1]} taps; it unrolls at most {WIDEST}"
    return None
