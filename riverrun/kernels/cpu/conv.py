"""The short convolution on a CPU: one sweep over time, channels across vector lanes, SiLU on the way.

With four taps (see taps.py) stretches of steps that no reset and no end of the sequence cuts go through
registers; other steps and widths are summed row by row. With u the sum, SiLU's gradient du = dy σ(u) (1 +
u (1 - σ(u))) needs u again: the backward makes it once more, some channels at a time, in the cache.

x and y are rows, (B T, D); those of x may be parts of wider rows, from column `at` on. w (D, W), c (D) or
empty, state and tail (B, W - 1, D).
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import LANES, add_parts, block_size, kernel, rows, same_dtype, spread
from .elementary import sigmoid, wide
from .memory import ZERO, alive, borrowed, expected, soon
from .taps import WIDTH, backward, forward
from .team import divided

BLOCK = 512  # channels a task at most
# steps dealt with vector by vector, while their rows are in the cache; the next are asked for, since parts of
# rows that lie a page apart are nothing a CPU foresees
STRETCH = 16


@kernel
def _taps(w, lo, hi):
    """The taps of some channels, (W, channels)."""
    taps = np.empty((w.shape[1], hi - lo), w.dtype)
    for j in range(w.shape[1]):
        for d in range(hi - lo):
            taps[j, d] = w[lo + d, j]
    return taps


@kernel
def _bias(c, lo, hi, like):
    """c of some channels, (1, channels)."""
    bias = np.zeros((1, hi - lo), like.dtype)
    for d in range(hi - lo if c.shape[0] else 0):
        bias[0, d] = c[lo + d]
    return bias


@kernel
def _whole(reset, i, lo, hi):
    """No reset at steps lo to hi - 1."""
    whole = True
    for t in range(lo, hi if reset.shape[0] else lo):
        whole &= not reset[i, t]
    return whole


@kernel
def _silu(y, lo, hi, left, width):
    """Rows lo to hi - 1 of y, from column `left` on."""
    wide()
    for t in range(lo, hi):
        row = y[t, left : left + width]
        for d in range(width):
            row[d] *= sigmoid(row[d])


@kernel
def _sums(active, i, lo, hi, x, at, taps, bias, state, reset, y, top, left):
    """Rows `top`, ... and columns `left`, ... of y: sums of sequence i and channels lo to hi - 1, through
    SiLU if `active`. Returns the number of inputs since the last reset; those of the state count as seen."""
    W, T, width = taps.shape[0], x.shape[0] // state.shape[0], hi - lo
    simple = W == WIDTH and width % LANES == 0
    begin, first = i * T, at + lo
    seen, t = T + W, 0
    while t < T:
        end = min(t + STRETCH, T)
        if simple and t >= W - 1 and _whole(reset, i, t - W + 2, end):
            out = y[top + t : top + end, left : left + width]
            now = x[begin + t - W + 1 : begin + end, first : first + width]
            for s in range(end, min(end + STRETCH, T)):
                soon(x, begin + s, first, width)
                expected(y, top + s, left, width)
            forward(out, now, taps, bias, end - t, width)
            seen += end - t
        else:
            end = t + 1
            seen = 0 if reset.shape[0] and reset[i, t] else seen + 1
            # rows as vectors of their own: the loops over them are then vectorised
            row, now = y[top + t, left : left + width], x[begin + t, first : first + width]
            newest, own = taps[W - 1], bias[0]
            for d in range(width):
                row[d] = own[d] + newest[d] * now[d]
            for j in range(1, min(W - 1, seen) + 1):
                tap = taps[W - 1 - j]
                then = x[begin + t - j, first : first + width] if j <= t else state[i, W - 1 + t - j, lo:hi]
                for d in range(width):
                    row[d] += tap[d] * then[d]
        if active:
            _silu(y, top + t, top + end, left, width)
        t = end
    return seen


@kernel
def _forward(first, step, active, x, at, w, c, state, reset, size, y, tail):
    if divided(first, step):
        return
    (batch, _, D), W = tail.shape, w.shape[1]
    T, blocks = x.shape[0] // batch, (D + size - 1) // size
    x, y = borrowed(x), borrowed(y)
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        taps, bias = _taps(w, lo, hi), _bias(c, lo, hi, w)
        seen = _sums(active, i, lo, hi, x, at, taps, bias, state, reset, y, i * T, lo)
        for j in range(W - 1):  # the input j steps before the last
            out = tail[i, W - 2 - j, lo:hi]
            if j > seen:
                out[:] = 0
            elif j < T:
                out[:] = x[i * T + T - 1 - j, at + lo : at + hi]
            else:
                out[:] = state[i, W - 2 + T - j, lo:hi]


@kernel
def _before_silu(u, width, dy, top, left):
    """u, the sums of `width` channels, becomes their gradient; dy from row `top` and column `left` on."""
    wide()
    one = u.dtype.type(1)
    for t in range(u.shape[0]):
        row, g = u[t], dy[top + t, left : left + width]
        soon(dy, min(top + t + STRETCH, dy.shape[0] - 1), left, width)
        for d in range(width):
            s = sigmoid(row[d])
            row[d] = g[d] * (s * (one + row[d] * (one - s)))


@kernel
def _backward(first, step, active, x, at, w, c, state, reset, size, dy, dtail, dx, dw, dc, dstate):
    """dtail is the gradient of the tail; dw (B, W, D) and dc (B, D) are the parts of one sequence."""
    if divided(first, step):
        return
    (batch, _, D), W = dtail.shape, w.shape[1]
    T, blocks = x.shape[0] // batch, (D + size - 1) // size
    room = np.empty((T if active else 0, min(size, D)), w.dtype)
    x, dx, du, given = borrowed(x), borrowed(dx), borrowed(room), borrowed(dy)
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        taps, sums, bias = _taps(w, lo, hi), np.zeros((W, hi - lo), w.dtype), np.zeros((1, hi - lo), w.dtype)
        simple = W == WIDTH and (hi - lo) % LANES == 0
        begin, own, left, right = i * T, i * T, lo, hi  # rows of x, rows and columns of dy
        dy = given
        if active:
            dy, own, left, right = du, ZERO, ZERO, hi - lo
            _sums(ZERO, i, lo, hi, x, at, taps, _bias(c, lo, hi, w), state, reset, dy, ZERO, ZERO)
            _before_silu(dy, right, given, begin, lo)
        t = 1 - W  # inputs, those of the state first
        while t < T:
            end = min(t + STRETCH, T - W + 1)
            if simple and 0 <= t < end and _whole(reset, i, t + 1, end + W - 1):
                now = x[begin + t : begin + end, at + lo : at + hi]
                later = dy[own + t : own + end + W - 1, left:right]
                for s in range(end, min(end + STRETCH, T)):
                    expected(dx, begin + s, lo, hi - lo)
                backward(dx[begin + t : begin + end, lo:hi], sums, bias, now, later, taps, end - t, hi - lo)
                t = end
                continue
            now = x[begin + t, at + lo : at + hi] if t >= 0 else state[i, W - 1 + t, lo:hi]
            out = dx[begin + t, lo:hi] if t >= 0 else dstate[i, W - 1 + t, lo:hi]
            out[:] = 0
            reach = min(W, T - t)  # steps that may read this input, from its own on
            for j in range(max(0, -t), reach):
                if (j or t < 0) and not _whole(reset, i, t + j, t + j + 1):
                    reach = j
                    break
                tap, dtap, g = taps[W - 1 - j], sums[W - 1 - j], dy[own + t + j, left:right]
                for d in range(hi - lo):
                    dtap[d] += g[d] * now[d]
                    out[d] += g[d] * tap[d]
            if t >= 0:
                g, total = dy[own + t, left:right], bias[0]
                for d in range(hi - lo):
                    total[d] += g[d]
            if t + W > T and reach == T - t:
                g = dtail[i, t + W - 1 - T, lo:hi]
                for d in range(hi - lo):
                    out[d] += g[d]
            t += 1
        dw[i, :, lo:hi] = sums
        dc[i, lo:hi] = bias[0]
    alive(room)


def _size(active, batch, D):
    """Channels a task: as many as leave every thread the same, since rows lie whole in memory. Every channel
    is summed by itself, so that results do not depend on it. SiLU keeps its sums in the cache: less there."""
    threads = torch.get_num_threads()
    for parts in range(1, 0 if active or D % LANES else D // LANES + 1):
        size = -(-D // parts // LANES) * LANES
        if size <= BLOCK and batch * -(-D // size) % threads == 0:
            return size
    return block_size(D, batch, BLOCK)


def _prepare(active, x, w, c, state, reset):
    """What both kernels begin with, and the number of tasks."""
    state = x.new_zeros(x.shape[0], w.shape[1] - 1, x.shape[2]) if state is None else state.contiguous()
    reset = None if reset is None else reset.contiguous()
    size = _size(active, x.shape[0], x.shape[2])
    c = x.new_empty(0) if c is None else c.contiguous()
    tasks = x.shape[0] * -(-x.shape[2] // size)
    return tasks, (*rows(x), w.contiguous(), c, state, reset, size)


def _run(active, x, w, c, state, reset, save):
    tasks, given = _prepare(active, x, w, c, state, reset)
    y, tail = _fake(x, w, c, state, reset, save)
    spread(_forward, tasks, x.numel(), active, *given, y.view(-1, y.shape[2]), tail)
    return y, tail


def _run_backward(active, x, w, c, state, reset, y, tail, dy, dtail):
    tasks, given = _prepare(active, x, w, c, state, reset)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    dtail = torch.zeros_like(tail) if dtail is None else dtail.contiguous()
    dx, dstate = torch.empty_like(y), torch.empty_like(tail)
    dw, dc = x.new_empty(x.shape[0], *w.shape[::-1]), x.new_empty(x.shape[0], x.shape[2])
    results = dy.flatten(0, 1), dtail, dx.flatten(0, 1), dw, dc, dstate
    spread(_backward, tasks, x.numel(), active, *given, *results)
    dw, dc = add_parts(dw).t().contiguous(), None if c is None else add_parts(dc)
    return dx, dw, dc, None if state is None else dstate, None


def _fake(x, w, c, state, reset, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(x.shape[0], w.shape[1] - 1, x.shape[2])


_short_conv, _short_conv_silu = (
    define(
        f"{name}_cpu",
        "Tensor x, Tensor w, Tensor? c, Tensor? state, Tensor? reset",
        2,
        0,
        "cpu",
        partial(_run, active),
        partial(_run_backward, active),
        _fake,
    )
    for active, name in enumerate(("short_conv", "short_conv_silu"))
)


def short_conv(
    x: Tensor, w: Tensor, c: Tensor | None, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, tail = _short_conv(*same_dtype(x, w, c, state), reset)
    return y, tail


def short_conv_silu(
    x: Tensor, w: Tensor, c: Tensor | None, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, tail = _short_conv_silu(*same_dtype(x, w, c, state), reset)
    return y, tail
