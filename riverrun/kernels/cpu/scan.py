"""Diagonal recurrences on a CPU: one sweep over time, channels across vector lanes."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .threads import array, parallel, use_threads

BLOCK = 128  # channels a task: a few cache lines of each of a, b and h


@parallel
def _forward(a, b, h, reset, y):
    B, T, D = b.shape
    blocks = (D + BLOCK - 1) // BLOCK
    for task in numba.prange(B * blocks):
        i, lo = task // blocks, task % blocks * BLOCK
        hi = min(lo + BLOCK, D)
        for t in range(T):
            if reset.shape[0] and reset[i, t]:
                h[i, lo:hi] = 0
            for d in range(lo, hi):
                h[i, d] = a[i, t, d] * h[i, d] + b[i, t, d]
                y[i, t, d] = h[i, d]


@parallel
def _backward(a, y, h0, reset, dy, dh, da, db):
    """dh enters as the gradient of the last state and leaves as that of the first."""
    B, T, D = y.shape
    blocks = (D + BLOCK - 1) // BLOCK
    for task in numba.prange(B * blocks):
        i, lo = task // blocks, task % blocks * BLOCK
        hi = min(lo + BLOCK, D)
        for t in range(T - 1, -1, -1):
            cut = reset.shape[0] > 0 and reset[i, t]
            for d in range(lo, hi):
                dh[i, d] += dy[i, t, d]
                before = 0 * dh[i, d] if cut else (y[i, t - 1, d] if t else h0[i, d])
                db[i, t, d] = dh[i, d]
                da[i, t, d] = dh[i, d] * np.conj(before)
                dh[i, d] = 0 if cut else dh[i, d] * np.conj(a[i, t, d])


def _run(a, b, state, reset, save):
    use_threads()
    a, b = a.contiguous(), b.contiguous()
    h = (
        b.new_zeros(b.shape[0], b.shape[2])
        if state is None
        else state.clone(memory_format=torch.contiguous_format)
    )
    y = torch.empty_like(b)
    _forward(array(a), array(b), array(h), array(reset, b), array(y))
    return y, h


def _run_backward(a, b, state, reset, y, h, dy, dh):
    use_threads()
    a = a.contiguous()
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    dh = torch.zeros_like(h) if dh is None else dh.clone(memory_format=torch.contiguous_format)
    h0 = torch.zeros_like(h) if state is None else state.contiguous()
    da, db = torch.empty_like(a), torch.empty_like(y)
    _backward(array(a), array(y), array(h0), array(reset, b), array(dy), array(dh), array(da), array(db))
    return da, db, None if state is None else dh, None


def _fake(a, b, state, reset, save):
    return torch.empty_like(b, memory_format=torch.contiguous_format), b.new_empty(b.shape[0], b.shape[2])


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
    dtype = torch.promote_types(a.dtype, b.dtype)
    y, h = _diagonal(a.to(dtype), b.to(dtype), None if state is None else state.to(dtype), reset)
    return y, h
