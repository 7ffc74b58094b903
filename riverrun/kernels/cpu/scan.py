"""Diagonal recurrences on a CPU: one sweep over time, channels across vector lanes.

Decays that are the same for every row or time come expanded, with a stride of 0, and are read in place.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import block_size, kernel, same_dtype, spread
from .team import divided

BLOCK = 128  # channels a task at most: a few cache lines of each of a, b and h


@kernel
def _forward(first, step, a, b, h, reset, size, y):
    """a (B or 1, T or 1, D); h (B, D) enters as the first state and leaves as the last."""
    if divided(first, step):
        return
    B, T, D = b.shape
    blocks = (D + size - 1) // size
    for task in range(first, B * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        h_i = h[i, lo:hi]  # rows as vectors of their own: the loop over them is then vectorised
        for t in range(T):
            a_t = a[i if a.shape[0] > 1 else 0, t if a.shape[1] > 1 else 0, lo:hi]
            b_t, y_t = b[i, t, lo:hi], y[i, t, lo:hi]
            if reset.shape[0] and reset[i, t]:
                h_i[:] = 0
            for d in range(hi - lo):
                h_i[d] = a_t[d] * h_i[d] + b_t[d]
                y_t[d] = h_i[d]


@kernel
def _backward(first, step, a, y, h0, reset, size, dy, dh, da, db):
    """dh enters as the gradient of the last state and leaves as that of the first."""
    if divided(first, step):
        return
    B, T, D = y.shape
    blocks = (D + size - 1) // size
    for task in range(first, B * blocks, step):
        i, lo = task // blocks, task % blocks * size
        hi = min(lo + size, D)
        g = dh[i, lo:hi]
        for t in range(T - 1, -1, -1):
            a_t = a[i if a.shape[0] > 1 else 0, t if a.shape[1] > 1 else 0, lo:hi]
            before = y[i, t - 1, lo:hi] if t else h0[i, lo:hi]
            dy_t, da_t, db_t = dy[i, t, lo:hi], da[i, t, lo:hi], db[i, t, lo:hi]
            if reset.shape[0] and reset[i, t]:
                for d in range(hi - lo):
                    db_t[d] = g[d] + dy_t[d]
                    da_t[d] = 0
                    g[d] = 0
            else:
                for d in range(hi - lo):
                    total = g[d] + dy_t[d]
                    db_t[d] = total
                    da_t[d] = total * np.conj(before[d])
                    g[d] = total * np.conj(a_t[d])


def _prepare(a, b, state, reset):
    """a without the axes it is expanded over, the first state, reset, channels a task, tasks."""
    a = a[: 1 if a.stride(0) == 0 else None, : 1 if a.stride(1) == 0 else None].contiguous()
    h0 = b.new_zeros(b.shape[0], b.shape[2]) if state is None else state.contiguous()
    size = block_size(b.shape[2], b.shape[0], BLOCK)
    reset = None if reset is None else reset.contiguous()
    return a, h0, reset, size, b.shape[0] * -(-b.shape[2] // size)


def _run(a, b, state, reset, save):
    a, h, reset, size, tasks = _prepare(a, b, state, reset)
    h, y = h.clone(), b.new_empty(b.shape)
    spread(_forward, tasks, b.numel(), a, b.contiguous(), h, reset, size, y)
    return y, h


def _run_backward(a, b, state, reset, y, h, dy, dh):
    a, h0, reset, size, tasks = _prepare(a, b, state, reset)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    dh = torch.zeros_like(h) if dh is None else dh.clone(memory_format=torch.contiguous_format)
    da, db = torch.empty_like(y), torch.empty_like(y)
    spread(_backward, tasks, b.numel(), a, y, h0, reset, size, dy, dh, da, db)
    return da, db, None if state is None else dh, None


def _fake(a, b, state, reset, save):
    return b.new_empty(b.shape), b.new_empty(b.shape[0], b.shape[2])


_diagonal = define(
    "diagonal_cpu",
    "Tensor a, Tensor b, Tensor? state, Tensor? reset",
    2,
    0,
    "cpu",
    _run,
    _run_backward,
    _fake,
)


def diagonal(
    a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, h = _diagonal(*same_dtype(a, b, state), reset)
    return y, h
