"""The short convolution on a CPU: one sweep over time, channels across vector lanes, W rows in the L1 cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import add_parts, block_size, kernel, same_dtype, spread
from .elementary import compiled

BLOCK = 512  # channels a task at most: W rows of inputs, of w and of dw stay in the L1 cache


@compiled
def _add(out, o, a, p, b, q, n):
    """out[o:o+n] += a[p:p+n] ⊙ b[q:q+n]. Unsigned offsets into flat arrays cannot wrap around: it vectorises."""
    for d in range(n):
        out[o + d] += a[p + d] * b[q + d]


@kernel
def _forward(first, step, x, w, c, state, reset, size, y, tail):
    """w (W, D), state and tail (B, W - 1, D)."""
    batch, T, D = x.shape
    W = w.shape[0]
    xs, ws, before, out = x.ravel(), w.ravel(), state.ravel(), y.ravel()
    blocks = (D + size - 1) // size
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        n = np.uintp(hi - lo)
        seen = T + W  # inputs since the last reset; those of the state count as seen
        for t in range(T):
            seen = 0 if reset.shape[0] and reset[i, t] else seen + 1
            o = np.uintp((i * T + t) * D + lo)
            y[i, t, lo:hi] = c[lo:hi]
            for j in range(min(W - 1, seen) + 1):
                tap = np.uintp((W - 1 - j) * D + lo)
                if j <= t:
                    _add(out, o, ws, tap, xs, np.uintp((i * T + t - j) * D + lo), n)
                else:
                    _add(
                        out,
                        o,
                        ws,
                        tap,
                        before,
                        np.uintp((i * (W - 1) + W - 1 + t - j) * D + lo),
                        n,
                    )
        for j in range(W - 1):  # the input j steps before the last
            if j > seen:
                tail[i, W - 2 - j, lo:hi] = 0
            elif j < T:
                tail[i, W - 2 - j, lo:hi] = x[i, T - 1 - j, lo:hi]
            else:
                tail[i, W - 2 - j, lo:hi] = state[i, W - 2 + T - j, lo:hi]


@kernel
def _backward(first, step, x, w, state, reset, size, dy, dtail, dx, dw, dc, dstate):
    """dtail is the gradient of the tail; dw (B, W, D) and dc (B, D) are the parts of one row."""
    batch, T, D = x.shape
    W = w.shape[0]
    xs, ws, before, grad = x.ravel(), w.ravel(), state.ravel(), dy.ravel()
    dxs, dws, dbefore = dx.ravel(), dw.ravel(), dstate.ravel()
    blocks = (D + size - 1) // size
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        n = np.uintp(hi - lo)
        dx[i, :, lo:hi] = 0
        dw[i, :, lo:hi] = 0
        dc[i, lo:hi] = 0
        dstate[i, :, lo:hi] = 0
        seen = T + W
        for t in range(T):
            seen = 0 if reset.shape[0] and reset[i, t] else seen + 1
            o = np.uintp((i * T + t) * D + lo)
            dc[i, lo:hi] += dy[i, t, lo:hi]
            for j in range(min(W - 1, seen) + 1):
                tap = np.uintp((W - 1 - j) * D + lo)
                part = np.uintp((i * W + W - 1 - j) * D + lo)
                if j <= t:
                    p = np.uintp((i * T + t - j) * D + lo)
                    _add(dws, part, grad, o, xs, p, n)
                    _add(dxs, p, grad, o, ws, tap, n)
                else:
                    p = np.uintp((i * (W - 1) + W - 1 + t - j) * D + lo)
                    _add(dws, part, grad, o, before, p, n)
                    _add(dbefore, p, grad, o, ws, tap, n)
        for j in range(min(W - 1, seen + 1)):
            if j < T:
                dx[i, T - 1 - j, lo:hi] += dtail[i, W - 2 - j, lo:hi]
            else:
                dstate[i, W - 2 + T - j, lo:hi] += dtail[i, W - 2 - j, lo:hi]


def _tasks(x: Tensor, size: int) -> int:
    return x.shape[0] * -(-x.shape[2] // size)


def _prepare(x, w, state, reset):
    state = (
        x.new_zeros(x.shape[0], w.shape[1] - 1, x.shape[2])
        if state is None
        else state.contiguous()
    )
    reset = None if reset is None else reset.contiguous()
    size = block_size(x.shape[2], x.shape[0], BLOCK)
    return x.contiguous(), w.t().contiguous(), state, reset, size


def _run(x, w, c, state, reset, save):
    x, w, state, reset, size = _prepare(x, w, state, reset)
    c = x.new_zeros(x.shape[2]) if c is None else c.contiguous()
    y, tail = torch.empty_like(x), torch.empty_like(state)
    spread(_forward, _tasks(x, size), x.numel(), x, w, c, state, reset, size, y, tail)
    return y, tail


def _run_backward(x, w, c, state, reset, y, tail, dy, dtail):
    no_state = state is None
    x, w, state, reset, size = _prepare(x, w, state, reset)
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dtail = torch.zeros_like(state) if dtail is None else dtail.contiguous()
    dx, dstate = torch.empty_like(x), torch.empty_like(state)
    dw, dc = x.new_empty(x.shape[0], *w.shape), x.new_empty(x.shape[0], x.shape[2])
    spread(
        _backward,
        _tasks(x, size),
        x.numel(),
        x,
        w,
        state,
        reset,
        size,
        dy,
        dtail,
        dx,
        dw,
        dc,
        dstate,
    )
    dw, dc = add_parts(dw).t().contiguous(), None if c is None else add_parts(dc)
    return dx, dw, dc, None if no_state else dstate, None


def _fake(x, w, c, state, reset, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0], w.shape[1] - 1, x.shape[2])


_short_conv = define(
    "short_conv_cpu",
    "Tensor x, Tensor w, Tensor? c, Tensor? state, Tensor? reset",
    2,
    0,
    "cpu",
    _run,
    _run_backward,
    _fake,
)


def short_conv(
    x: Tensor,
    w: Tensor,
    c: Tensor | None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y, tail = _short_conv(*same_dtype(x, w, c, state), reset)
    return y, tail
