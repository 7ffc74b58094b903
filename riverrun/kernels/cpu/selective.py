"""The selective state space on a CPU: channels across vector lanes, states in the L1 cache, T × E × N never stored.

Forward keeps the states of every `EVERY`-th step. Backward recomputes the steps between from them, a stretch at a time,
and sums dB and dC over blocks of channels and dA over the batch in a fixed order.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import add_parts, block_size, same_dtype
from .elementary import exp
from .threads import array, parallel, use_threads

BLOCK = 64  # channels a task at most
EVERY = 16  # steps from one saved state to the next


@parallel
def _forward(x, dt, A, B, C, state, reset, size, y, last, saved):
    """A (N, E), state and last (B, N, E), saved (B, T / EVERY, N, E) or empty: the states before every EVERY-th step."""
    batch, T, E = x.shape
    N = A.shape[0]
    blocks = (E + size - 1) // size
    for task in numba.prange(batch * blocks):
        i, lo = task // blocks, task % blocks * size
        width = min(size, E - lo)
        h, rate, write = np.empty((N, width), x.dtype), np.empty((N, width), x.dtype), np.empty(width, x.dtype)
        for n in range(N):
            for e in range(width):
                h[n, e], rate[n, e] = state[i, n, lo + e], A[n, lo + e]
        for t in range(T):
            if reset.shape[0] and reset[i, t]:
                h[:] = 0
            if saved.shape[0] and t % EVERY == 0:
                saved[i, t // EVERY, :, lo : lo + width] = h
            for e in range(width):
                write[e] = dt[i, t, lo + e] * x[i, t, lo + e]
                y[i, t, lo + e] = 0
            for n in range(N):
                b, c = B[i, t, n], C[i, t, n]
                for e in range(width):
                    h[n, e] = exp(dt[i, t, lo + e] * rate[n, e]) * h[n, e] + write[e] * b
                    y[i, t, lo + e] += c * h[n, e]
        last[i, :, lo : lo + width] = h


@parallel
def _backward(x, dt, A, B, C, reset, size, saved, dy, dh, dx, ddt, dA, dB, dC):
    """dh (B, N, E) enters as the gradient of the last state and leaves as that of the first; dA (B, N, E) and dB, dC
    (blocks, B, T, N) are the parts of one row and one block of channels."""
    batch, T, E = x.shape
    N = A.shape[0]
    blocks = (E + size - 1) // size
    for task in numba.prange(batch * blocks):
        i, block = task // blocks, task % blocks
        lo = block * size
        width = min(size, E - lo)
        h = np.empty((EVERY + 1, N, width), x.dtype)  # before and after every step of a stretch
        decay = np.empty((EVERY, N, width), x.dtype)
        write, dwrite, d = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
        rate, drate, g = np.empty((N, width), x.dtype), np.zeros((N, width), x.dtype), np.empty((N, width), x.dtype)
        for n in range(N):
            for e in range(width):
                rate[n, e], g[n, e] = A[n, lo + e], dh[i, n, lo + e]
        for start in range((T - 1) // EVERY * EVERY, -1, -EVERY):
            stop = min(start + EVERY, T)
            h[0] = saved[i, start // EVERY, :, lo : lo + width]
            for t in range(start, stop):
                cut = reset.shape[0] > 0 and reset[i, t]
                j = t - start
                for e in range(width):
                    write[e] = dt[i, t, lo + e] * x[i, t, lo + e]
                for n in range(N):
                    b = B[i, t, n]
                    if cut:  # a decay of 0 forgets, and passes no gradient on
                        for e in range(width):
                            decay[j, n, e] = 0
                            h[j + 1, n, e] = write[e] * b
                    else:
                        for e in range(width):
                            decay[j, n, e] = exp(dt[i, t, lo + e] * rate[n, e])
                            h[j + 1, n, e] = decay[j, n, e] * h[j, n, e] + write[e] * b
            for t in range(stop - 1, start - 1, -1):
                j = t - start
                for e in range(width):
                    write[e] = dt[i, t, lo + e] * x[i, t, lo + e]
                    dwrite[e] = 0
                    d[e] = 0
                for n in range(N):
                    b, c = B[i, t, n], C[i, t, n]
                    db = dc = 0 * b
                    for e in range(width):
                        dc += dy[i, t, lo + e] * h[j + 1, n, e]
                        g[n, e] += dy[i, t, lo + e] * c
                        db += g[n, e] * write[e]
                        dwrite[e] += g[n, e] * b
                        g[n, e] *= decay[j, n, e]
                        d[e] += g[n, e] * h[j, n, e] * rate[n, e]
                        drate[n, e] += g[n, e] * h[j, n, e] * dt[i, t, lo + e]
                    dB[block, i, t, n], dC[block, i, t, n] = db, dc
                for e in range(width):
                    dx[i, t, lo + e] = dwrite[e] * dt[i, t, lo + e]
                    ddt[i, t, lo + e] = dwrite[e] * x[i, t, lo + e] + d[e]
        dh[i, :, lo : lo + width] = g
        dA[i, :, lo : lo + width] = drate


def _transposed(x: Tensor) -> Tensor:
    """The last two axes swapped, in memory of its own."""
    return x.mT.clone(memory_format=torch.contiguous_format)


def _run(x, dt, A, B, C, state, reset, save):
    use_threads()
    x, dt, B, C, reset = (z if z is None else z.contiguous() for z in (x, dt, B, C, reset))
    h = x.new_zeros(x.shape[0], A.shape[1], A.shape[0]) if state is None else _transposed(state)
    y, last = torch.empty_like(x), torch.empty_like(h)
    saved = x.new_empty((x.shape[0] if save else 0, -(-x.shape[1] // EVERY), *h.shape[1:]))
    size = block_size(x.shape[2], x.shape[0], BLOCK)
    inputs = (array(z) for z in (x, dt, _transposed(A), B, C, h, reset))
    _forward(*inputs, size, array(y), array(last), array(saved))
    return y, _transposed(last), saved


def _run_backward(x, dt, A, B, C, state, reset, y, last, saved, dy, dh):
    use_threads()
    x, dt, B, C, reset = (z if z is None else z.contiguous() for z in (x, dt, B, C, reset))
    batch, T, E = x.shape
    size = block_size(E, batch, BLOCK)
    dy = torch.zeros_like(x) if dy is None else dy.contiguous()
    dh = x.new_zeros(batch, A.shape[1], E) if dh is None else _transposed(dh)
    dx, ddt, dA = torch.empty_like(x), torch.empty_like(x), torch.empty_like(dh)
    parts = B.new_empty((2, -(-E // size), *B.shape))
    inputs = (array(z) for z in (x, dt, _transposed(A), B, C, reset))
    _backward(*inputs, size, *(array(z) for z in (saved, dy, dh, dx, ddt, dA, parts[0], parts[1])))
    dA_sum, dB, dC = torch.empty_like(dA[0]), torch.empty_like(B), torch.empty_like(B)
    for part, total in ((dA, dA_sum), (parts[0], dB), (parts[1], dC)):
        add_parts(array(part.flatten(1)), array(total.flatten()))
    return dx, ddt, _transposed(dA_sum), dB, dC, None if state is None else _transposed(dh), None


def _fake(x, dt, A, B, C, state, reset, save):
    rows, steps = x.shape[0], (x.shape[1] + EVERY - 1) // EVERY
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return y, x.new_empty(rows, *A.shape), x.new_empty(rows if save else 0, steps, A.shape[1], A.shape[0])


_selective = define(
    "selective_cpu",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? state, Tensor? reset",
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
    state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    y, h = _selective(*same_dtype(x, dt, A, B, C, state), reset)
    return y, h
