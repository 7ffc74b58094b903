"""The selective state space on a CPU: channels across vector lanes, states in the L1 cache, T × E × N never
stored.

`low` is taken in loops of its own, so that without it nothing is added to the work of a number.

Forward keeps the states of every `EVERY`-th step. Backward recomputes the steps between from them, a stretch
at a time, and sums dB and dC over blocks of channels and dA over the batch in a fixed order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import add_parts, block_size, kernel, same_dtype, spread
from .elementary import exp
from .team import divided

BLOCK = 64  # channels a task at most
EVERY = 16  # steps from one saved state to the next
SHORT = 4  # steps for which states are used as they lie: transposing them would take longer


@kernel
def _forward(first, step, x, dt, A, B, C, low, state, reset, size, y, last, saved):
    """A and low (N, E), low or empty; state and last (B, N, E); saved (B, T / EVERY, N, E) or empty: the
    state before every so many steps."""
    if divided(first, step):
        return
    batch, T, E = x.shape
    N, one = A.shape[0], x.dtype.type(1)
    blocks = (E + size - 1) // size
    for task in range(first, batch * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, E)
        h, rate = np.empty((N, hi - lo), x.dtype), np.empty((N, hi - lo), x.dtype)
        write = np.empty(hi - lo, x.dtype)
        for n in range(N):
            h[n], rate[n] = state[i, n, lo:hi], A[n, lo:hi]
        for t in range(T):
            if reset.shape[0] and reset[i, t]:
                for n in range(N):
                    h[n] = 0
            if saved.shape[0] and t % EVERY == 0:
                for n in range(N):
                    saved[i, t // EVERY, n, lo:hi] = h[n]
            # rows as vectors of their own: indexed as matrices, the loops below would not be vectorised
            x_t, dt_t, y_t = x[i, t, lo:hi], dt[i, t, lo:hi], y[i, t, lo:hi]
            for e in range(hi - lo):
                write[e] = dt_t[e] * x_t[e]
                y_t[e] = 0
            for n in range(N):
                b, c, h_n, rate_n = B[i, t, n], C[i, t, n], h[n], rate[n]
                if low.shape[0]:
                    low_n = low[n, lo:hi]
                    for e in range(hi - lo):
                        a = exp(dt_t[e] * rate_n[e])
                        h_n[e] = (a + low_n[e] * (one - a)) * h_n[e] + write[e] * b
                        y_t[e] += c * h_n[e]
                else:
                    for e in range(hi - lo):
                        h_n[e] = exp(dt_t[e] * rate_n[e]) * h_n[e] + write[e] * b
                        y_t[e] += c * h_n[e]
        for n in range(N):
            last[i, n, lo:hi] = h[n]


@kernel
def _short(first, step, x, dt, A, B, C, low, state, reset, y, last):
    """A few steps, as in decoding: A and low (E, N), low or empty; state and last (B, E, N)."""
    if divided(first, step):
        return
    batch, T, E = x.shape
    N, one = A.shape[1], x.dtype.type(1)
    for task in range(first, batch, step):
        decay = np.empty((E, N), x.dtype)
        every = decay.reshape(E * N)
        h, to = state[task], last[task]
        for t in range(T):
            b, c, dt_t, x_t, y_t = B[task, t], C[task, t], dt[task, t], x[task, t], y[task, t]
            for e in range(E):
                for n in range(N):
                    decay[e, n] = dt_t[e] * A[e, n]
            for j in range(E * N):  # one long vector
                every[j] = exp(every[j])
            if low.shape[0]:
                for e in range(E):
                    for n in range(N):
                        decay[e, n] += low[e, n] * (one - decay[e, n])
            if t:
                h = to
            if reset.shape[0] and reset[task, t]:
                to[:] = 0
                h = to
            for e in range(E):
                write, total = dt_t[e] * x_t[e], 0 * x_t[e]
                for n in range(N):
                    new = decay[e, n] * h[e, n] + write * b[n]
                    to[e, n] = new
                    total += c[n] * new
                y_t[e] = total


@kernel
def _backward(first, step, x, dt, A, B, C, low, reset, size, saved, dy, dh, dx, ddt, dA, dB, dC, dlow):
    """dh (B, N, E) enters as the gradient of the last state and leaves as that of the first; dA, dlow (B, N,
    E) and dB, dC (blocks, B, T, N) are the parts of one row and one block of channels."""
    if divided(first, step):
        return
    batch, T, E = x.shape
    N, one = A.shape[0], x.dtype.type(1)
    blocks = (E + size - 1) // size
    for task in range(first, batch * blocks, step):
        i, block = task // blocks, task % blocks
        lo = block * size
        hi = min(lo + size, E)
        h = np.empty((EVERY + 1, N, hi - lo), x.dtype)  # before and after every step of a stretch
        decay = np.empty((EVERY, N, hi - lo), x.dtype)
        rate, drate = np.empty((N, hi - lo), x.dtype), np.zeros((N, hi - lo), x.dtype)
        g, write = np.empty((N, hi - lo), x.dtype), np.empty(hi - lo, x.dtype)
        dwrite, d = np.empty(hi - lo, x.dtype), np.empty(hi - lo, x.dtype)
        for n in range(N):
            rate[n], g[n] = A[n, lo:hi], dh[i, n, lo:hi]
        for start in range((T - 1) // EVERY * EVERY, -1, -EVERY):
            stop = min(start + EVERY, T)
            for n in range(N):
                h[0, n] = saved[i, start // EVERY, n, lo:hi]
            for t in range(start, stop):
                cut = reset.shape[0] > 0 and reset[i, t]
                x_t, dt_t = x[i, t, lo:hi], dt[i, t, lo:hi]
                for e in range(hi - lo):
                    write[e] = dt_t[e] * x_t[e]
                for n in range(N):
                    b, rate_n, decay_n = B[i, t, n], rate[n], decay[t - start, n]
                    before, after = h[t - start, n], h[t - start + 1, n]
                    for e in range(hi - lo):
                        decay_n[e] = exp(dt_t[e] * rate_n[e])
                    if cut:  # a decay of 0 forgets, and passes no gradient on
                        decay_n[:] = 0
                    if low.shape[0] and not cut:
                        low_n = low[n, lo:hi]
                        for e in range(hi - lo):
                            a = decay_n[e] + low_n[e] * (one - decay_n[e])
                            after[e] = a * before[e] + write[e] * b
                    else:
                        for e in range(hi - lo):
                            after[e] = decay_n[e] * before[e] + write[e] * b
            for t in range(stop - 1, start - 1, -1):
                cut = reset.shape[0] > 0 and reset[i, t]
                x_t, dt_t, dy_t = x[i, t, lo:hi], dt[i, t, lo:hi], dy[i, t, lo:hi]
                dx_t, ddt_t = dx[i, t, lo:hi], ddt[i, t, lo:hi]
                for e in range(hi - lo):
                    write[e] = dt_t[e] * x_t[e]
                    dwrite[e] = 0
                    d[e] = 0
                for n in range(N):
                    b, c, g_n, decay_n = B[i, t, n], C[i, t, n], g[n], decay[t - start, n]
                    before, after, rate_n, drate_n = h[t - start, n], h[t - start + 1, n], rate[n], drate[n]
                    db = dc = 0 * b
                    for e in range(hi - lo):
                        dc += dy_t[e] * after[e]
                        g_e = g_n[e] + dy_t[e] * c
                        db += g_e * write[e]
                        dwrite[e] += g_e * b
                        g_n[e] = g_e
                    if low.shape[0] and not cut:
                        low_n, dlow_n = low[n, lo:hi], dlow[i, n, lo:hi]
                        for e in range(hi - lo):
                            lost = one - decay_n[e]
                            k = g_n[e] * before[e]
                            dlow_n[e] += k * lost
                            k *= (one - low_n[e]) * decay_n[e]
                            d[e] += k * rate_n[e]
                            drate_n[e] += k * dt_t[e]
                            g_n[e] *= decay_n[e] + low_n[e] * lost
                    else:
                        for e in range(hi - lo):
                            g_n[e] *= decay_n[e]
                            k = g_n[e] * before[e]
                            d[e] += k * rate_n[e]
                            drate_n[e] += k * dt_t[e]
                    dB[block, i, t, n], dC[block, i, t, n] = db, dc
                for e in range(hi - lo):
                    dx_t[e] = dwrite[e] * dt_t[e]
                    ddt_t[e] = dwrite[e] * x_t[e] + d[e]
        for n in range(N):
            dh[i, n, lo:hi], dA[i, n, lo:hi] = g[n], drate[n]


def _transposed(x: Tensor) -> Tensor:
    """The last two axes swapped, in memory of its own."""
    return x.mT.clone(memory_format=torch.contiguous_format)


def _run(x, dt, A, B, C, low, state, reset, save):
    x, dt, B, C, reset = (z if z is None else z.contiguous() for z in (x, dt, B, C, reset))
    low = x.new_empty(0, 0) if low is None else low
    if x.shape[1] <= SHORT:
        h = x.new_zeros(x.shape[0], *A.shape) if state is None else state.contiguous()
        y, last = torch.empty_like(x), torch.empty_like(h)
        given = x, dt, A.contiguous(), B, C, low.contiguous()
        spread(_short, x.shape[0], h.numel() * x.shape[1], *given, h, reset, y, last)
        return y, last, _transposed(h)[:, None] if save else x.new_empty(0, 1, *A.mT.shape)
    h = x.new_zeros(x.shape[0], A.shape[1], A.shape[0]) if state is None else _transposed(state)
    y, last = torch.empty_like(x), torch.empty_like(h)
    saved = x.new_empty((x.shape[0] if save else 0, -(-x.shape[1] // EVERY), *h.shape[1:]))
    size = block_size(x.shape[2], x.shape[0], BLOCK)
    tasks, work = x.shape[0] * -(-x.shape[2] // size), x.numel() * A.shape[1]
    given = x, dt, _transposed(A), B, C, _transposed(low)
    spread(_forward, tasks, work, *given, h, reset, size, y, last, saved)
    return y, _transposed(last), saved


def _run_backward(x, dt, A, B, C, low, state, reset, y, last, saved, dy, dh):
    x, dt, B, C, reset = (z if z is None else z.contiguous() for z in (x, dt, B, C, reset))
    batch, _, E = x.shape
    size = block_size(E, batch, BLOCK)
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dh = x.new_zeros(batch, A.shape[1], E) if dh is None else _transposed(dh)
    dx, ddt, dA = torch.empty_like(x), torch.empty_like(x), torch.empty_like(dh)
    dlow = x.new_empty(0, 0, 0) if low is None else torch.zeros_like(dh)
    dB, dC = (B.new_empty(-(-E // size), *B.shape) for _ in range(2))
    tasks, work = batch * dB.shape[0], x.numel() * A.shape[1]
    floor = x.new_empty(0, 0) if low is None else _transposed(low)
    inputs = (x, dt, _transposed(A), B, C, floor, reset, size, saved)
    spread(_backward, tasks, work, *inputs, dy, dh, dx, ddt, dA, dB, dC, dlow)
    dA, dB, dC = _transposed(add_parts(dA)), add_parts(dB), add_parts(dC)
    dlow = None if low is None else _transposed(add_parts(dlow))
    return dx, ddt, dA, dB, dC, dlow, None if state is None else _transposed(dh), None


def _fake(x, dt, A, B, C, low, state, reset, save):
    rows, steps = x.shape[0], (x.shape[1] + EVERY - 1) // EVERY
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(rows, *A.shape), x.new_empty(rows if save else 0, steps, A.shape[1], A.shape[0])


_selective = define(
    "selective_cpu",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? low, Tensor? state, Tensor? reset",
    2,
    1,
    "cpu",
    _run,
    _run_backward,
    _fake,
)


def selective(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    low: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y, h = _selective(*same_dtype(x, dt, A, B, C, low, state), reset)
    return y, h
