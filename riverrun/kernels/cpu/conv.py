"""The short convolution on a CPU: one sweep over time, channels across vector lanes, W rows of inputs in the
L1 cache."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import add_parts, block_size, kernel, same_dtype, spread

BLOCK = 512  # channels a task at most


@kernel
def _taps(w, lo, hi):
    """The taps of some channels, (W, channels)."""
    taps = np.empty((w.shape[1], hi - lo), w.dtype)
    for j in range(w.shape[1]):
        for d in range(hi - lo):
            taps[j, d] = w[lo + d, j]
    return taps


@kernel
def _forward(first, step, x, w, c, state, reset, size, y, tail):
    """w (D, W), c (D) or empty, state and tail (B, W - 1, D)."""
    batch, T, D = x.shape
    W = w.shape[1]
    blocks = (D + size - 1) // size
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        taps, bias = _taps(w, lo, hi), np.zeros(hi - lo, x.dtype)
        if c.shape[0]:
            bias[:] = c[lo:hi]
        seen = T + W  # inputs since the last reset; those of the state count as seen
        for t in range(T):
            seen = 0 if reset.shape[0] and reset[i, t] else seen + 1
            # rows as vectors of their own: the loops over them are then vectorised
            out, now, newest = y[i, t, lo:hi], x[i, t, lo:hi], taps[W - 1]
            for d in range(hi - lo):
                out[d] = bias[d] + newest[d] * now[d]
            for j in range(1, min(W - 1, seen) + 1):
                tap = taps[W - 1 - j]
                then = x[i, t - j, lo:hi] if j <= t else state[i, W - 1 + t - j, lo:hi]
                for d in range(hi - lo):
                    out[d] += tap[d] * then[d]
        for j in range(W - 1):  # the input j steps before the last
            out = tail[i, W - 2 - j, lo:hi]
            if j > seen:
                out[:] = 0
            else:
                out[:] = x[i, T - 1 - j, lo:hi] if j < T else state[i, W - 2 + T - j, lo:hi]


@kernel
def _backward(first, step, x, w, state, reset, size, dy, dtail, dx, dw, dc, dstate):
    """dtail is the gradient of the tail; dw (B, W, D) and dc (B, D) are the parts of one row."""
    batch, T, D = x.shape
    W = w.shape[1]
    blocks = (D + size - 1) // size
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        taps = _taps(w, lo, hi)
        dx[i, :, lo:hi] = 0
        dw[i, :, lo:hi] = 0
        dstate[i, :, lo:hi] = 0
        dbias = dc[i, lo:hi]
        dbias[:] = 0
        seen = T + W
        for t in range(T):
            seen = 0 if reset.shape[0] and reset[i, t] else seen + 1
            g = dy[i, t, lo:hi]
            for d in range(hi - lo):
                dbias[d] += g[d]
            for j in range(min(W - 1, seen) + 1):
                tap, dtap = taps[W - 1 - j], dw[i, W - 1 - j, lo:hi]
                then = x[i, t - j, lo:hi] if j <= t else state[i, W - 1 + t - j, lo:hi]
                dthen = dx[i, t - j, lo:hi] if j <= t else dstate[i, W - 1 + t - j, lo:hi]
                for d in range(hi - lo):
                    dtap[d] += g[d] * then[d]
                    dthen[d] += g[d] * tap[d]
        for j in range(min(W - 1, seen + 1)):
            g = dtail[i, W - 2 - j, lo:hi]
            dthen = dx[i, T - 1 - j, lo:hi] if j < T else dstate[i, W - 2 + T - j, lo:hi]
            for d in range(hi - lo):
                dthen[d] += g[d]


def _tasks(x: Tensor, size: int) -> int:
    return x.shape[0] * -(-x.shape[2] // size)


def _prepare(x, w, state, reset):
    state = x.new_zeros(x.shape[0], w.shape[1] - 1, x.shape[2]) if state is None else state.contiguous()
    reset = None if reset is None else reset.contiguous()
    size = block_size(x.shape[2], x.shape[0], BLOCK)
    return x.contiguous(), w.contiguous(), state, reset, size


def _run(x, w, c, state, reset, save):
    x, w, state, reset, size = _prepare(x, w, state, reset)
    c = x.new_empty(0) if c is None else c.contiguous()
    y, tail = torch.empty_like(x), torch.empty_like(state)
    spread(_forward, _tasks(x, size), x.numel(), x, w, c, state, reset, size, y, tail)
    return y, tail


def _run_backward(x, w, c, state, reset, y, tail, dy, dtail):
    no_state = state is None
    x, w, state, reset, size = _prepare(x, w, state, reset)
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dtail = torch.zeros_like(state) if dtail is None else dtail.contiguous()
    dx, dstate = torch.empty_like(x), torch.empty_like(state)
    dw, dc = x.new_empty(x.shape[0], *w.shape[::-1]), x.new_empty(x.shape[0], x.shape[2])
    spread(_backward, _tasks(x, size), x.numel(), x, w, state, reset, size, dy, dtail, dx, dw, dc, dstate)
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
    x: Tensor, w: Tensor, c: Tensor | None, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, tail = _short_conv(*same_dtype(x, w, c, state), reset)
    return y, tail
