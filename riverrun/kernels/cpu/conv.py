"""The short convolution on a CPU: one sweep over time, channels across vector lanes.

With four taps (see taps.py) stretches of steps that no reset and no end of the sequence cuts go through
registers; other steps and widths are summed row by row.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import LANES, add_parts, block_size, kernel, same_dtype, spread
from .taps import WIDTH, backward, forward

BLOCK = 512  # channels a task at most
STRETCH = 16  # steps dealt with vector by vector, while their rows are in the cache


@kernel
def _taps(w, lo, hi):
    """The taps of some channels, (W, channels)."""
    taps = np.empty((w.shape[1], hi - lo), w.dtype)
    for j in range(w.shape[1]):
        for d in range(hi - lo):
            taps[j, d] = w[lo + d, j]
    return taps


@kernel
def _whole(reset, i, lo, hi):
    """No reset at steps lo to hi - 1."""
    whole = True
    for t in range(lo, hi if reset.shape[0] else lo):
        whole &= not reset[i, t]
    return whole


@kernel
def _forward(first, step, x, w, c, state, reset, size, y, tail):
    """w (D, W), c (D) or empty, state and tail (B, W - 1, D)."""
    batch, T, D = x.shape
    W = w.shape[1]
    blocks = (D + size - 1) // size
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        taps, bias = _taps(w, lo, hi), np.zeros((1, hi - lo), x.dtype)
        if c.shape[0]:
            bias[0] = c[lo:hi]
        simple = W == WIDTH and (hi - lo) % LANES == 0
        seen, t = T + W, 0  # inputs since the last reset; those of the state count as seen
        while t < T:
            end = min(t + STRETCH, T)
            if simple and t >= W - 1 and _whole(reset, i, t - W + 2, end):
                forward(y[i, t:end, lo:hi], x[i, t - W + 1 : end, lo:hi], taps, bias, end - t, hi - lo)
                seen, t = seen + end - t, end
                continue
            seen = 0 if reset.shape[0] and reset[i, t] else seen + 1
            # rows as vectors of their own: the loops over them are then vectorised
            out, now, newest, own = y[i, t, lo:hi], x[i, t, lo:hi], taps[W - 1], bias[0]
            for d in range(hi - lo):
                out[d] = own[d] + newest[d] * now[d]
            for j in range(1, min(W - 1, seen) + 1):
                tap = taps[W - 1 - j]
                then = x[i, t - j, lo:hi] if j <= t else state[i, W - 1 + t - j, lo:hi]
                for d in range(hi - lo):
                    out[d] += tap[d] * then[d]
            t += 1
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
        taps, sums, bias = _taps(w, lo, hi), np.zeros((W, hi - lo), w.dtype), np.zeros((1, hi - lo), w.dtype)
        simple = W == WIDTH and (hi - lo) % LANES == 0
        t = 1 - W  # inputs, those of the state first
        while t < T:
            end = min(t + STRETCH, T - W + 1)
            if simple and 0 <= t < end and _whole(reset, i, t + 1, end + W - 1):
                now, later = x[i, t:end, lo:hi], dy[i, t : end + W - 1, lo:hi]
                backward(dx[i, t:end, lo:hi], sums, bias, now, later, taps, end - t, hi - lo)
                t = end
                continue
            now = x[i, t, lo:hi] if t >= 0 else state[i, W - 1 + t, lo:hi]
            out = dx[i, t, lo:hi] if t >= 0 else dstate[i, W - 1 + t, lo:hi]
            out[:] = 0
            reach = min(W, T - t)  # steps that may read this input, from its own on
            for j in range(max(0, -t), reach):
                if (j or t < 0) and not _whole(reset, i, t + j, t + j + 1):
                    reach = j
                    break
                tap, dtap, g = taps[W - 1 - j], sums[W - 1 - j], dy[i, t + j, lo:hi]
                for d in range(hi - lo):
                    dtap[d] += g[d] * now[d]
                    out[d] += g[d] * tap[d]
            if t >= 0:
                g, own = dy[i, t, lo:hi], bias[0]
                for d in range(hi - lo):
                    own[d] += g[d]
            if t + W > T and reach == T - t:
                g = dtail[i, t + W - 1 - T, lo:hi]
                for d in range(hi - lo):
                    out[d] += g[d]
            t += 1
        dw[i, :, lo:hi] = sums
        dc[i, lo:hi] = bias[0]


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
