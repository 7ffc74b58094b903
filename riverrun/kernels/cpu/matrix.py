"""The matrix memories outer, delta, dplr and mlstm on a CPU: one kernel, whose state never leaves the cache.

A task is one (batch, head, block of value columns): columns of S do not depend on each other. It walks over time in
blocks (see block.py) that end at a reset; a block after a reset starts from zeros. The forward keeps the state every
SEGMENT steps; the backward recomputes the states between from there. Gradients of q, k and what else all columns share
are summed afterwards in the order of the blocks of columns, so that results are the same on any number of threads.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

from riverrun.algorithms.chunk import stabilised
from riverrun.kernels.library import define

from . import block
from .block import DELTA, DPLR, OUTER, C, small
from .elementary import exp
from .threads import parallel, use_threads

SEGMENT = 64
TASKS = 8  # wanted at the least
WIDEST = 80  # value columns of a task


@small
def end_of_block(t, stop, reset):
    """The first step after t that starts another block."""
    for i in range(t + 1, min(t + C, stop)):
        if reset.shape[0] and reset[i]:
            return i
    return min(t + C, stop)


@small
def load(rows, slot, x, t, n):
    """x[t : t + n] (T, width) into the first columns of a row slot."""
    for i in range(n):
        for k in range(x.shape[1]):
            rows[slot, i, k] = x[t + i, k]


@small
def load_keys(mode, q, k, g, a, b, t, n, wide, rows):
    load(rows, block.Q, q, t, n)
    load(rows, block.K, k, t, n)
    if mode == DELTA:
        load(rows, block.R, k, t, n)
    if mode == DPLR:
        load(rows, block.R, b, t, n)
        load(rows, block.A, a, t, n)
    for i in range(n):
        if g.shape[1] == 0:
            rows[block.DECAY, i, :wide] = 1
        elif g.shape[1] == 1:
            rows[block.DECAY, i, :wide] = exp(g[t + i, 0])
        else:
            for j in range(g.shape[1]):
                rows[block.DECAY, i, j] = exp(g[t + i, j])


@small
def scratch(K, V, like):
    """Rows, columns and squares for keys of width K and values of width V, and both widths as multiples of C."""
    wide, broad = (K + C - 1) // C * C, (V + C - 1) // C * C
    width = max(wide, broad)
    rows = block.aligned((block.ROWS, C, width), like)
    columns = block.aligned((block.COLUMNS, width, C), like)
    return rows, columns, block.aligned((block.SQUARES, C, C), like), wide, broad


@small
def forward_task(mode, q, k, v, g, beta, u, a, b, reset, S0, y, saved):
    """One head's columns: S0 (K, V) is the first state and becomes the last; saved (segments, K, V) may be empty."""
    T, K, V = q.shape[0], q.shape[1], v.shape[1]
    rows, columns, squares, wide, broad = scratch(K, V, q)
    S = block.aligned((wide, broad), q)
    S[:K, :V] = S0
    bonus, by_key = u.shape[0] > 0, g.shape[1] > 1
    t = 0
    while t < T:
        stop = end_of_block(t, min(T, t // SEGMENT * SEGMENT + SEGMENT), reset)
        n = stop - t
        if saved.shape[0] and t % SEGMENT == 0:
            saved[t // SEGMENT] = S[:K, :V]
        if reset.shape[0] and reset[t]:
            S[:] = 0
        load_keys(mode, q, k, g, a, b, t, n, wide, rows)
        load(rows, block.V, v, t, n)
        block.decays(mode, bonus, n, wide, rows, squares, by_key)
        block.scores(mode, bonus, n, wide, rows, columns, squares, by_key, u)
        block.solve(mode, n, wide, broad, rows, squares, beta[t:], S)
        block.read(mode, n, wide, broad, rows, squares, S)
        block.write(mode, n, wide, broad, rows, S)
        for i in range(n):
            for j in range(V):
                y[t + i, j] = rows[block.Y, i, j]
        t = stop
    S0[:] = S[:K, :V]


@small
def backward_task(mode, q, k, v, g, beta, u, a, b, reset, saved, dy, dS0, dq, dk, dv, dg, dbeta, du, da, db):
    """dS0 enters as the gradient of the last state and leaves as that of the first."""
    T, K, V = q.shape[0], q.shape[1], v.shape[1]
    rows, columns, squares, wide, broad = scratch(K, V, q)
    dS = block.aligned((wide, broad), q)
    dS[:K, :V] = dS0
    states = block.aligned(
        (SEGMENT // C + 1, wide, broad), q
    )  # before each block that does not start from zeros
    starts, place = np.empty(SEGMENT + 1, np.int64), np.empty(SEGMENT, np.int64)
    found = block.aligned((2, SEGMENT, broad), q)  # rows X and ERROR of the segment
    bonus, by_key = u.shape[0] > 0, g.shape[1] > 1
    for segment in range((T - 1) // SEGMENT, -1, -1):
        first, last = segment * SEGMENT, min(T, segment * SEGMENT + SEGMENT)
        blocks, kept, t = 0, 0, first
        S = states[SEGMENT // C]
        S[:K, :V] = saved[segment]
        while t < last:
            stop = end_of_block(t, last, reset)
            n = stop - t
            starts[blocks], place[blocks] = t, kept
            if reset.shape[0] and reset[t]:
                S[:] = 0
                place[blocks] = -1
            else:
                states[kept] = S
                kept += 1
            blocks += 1
            if mode or stop < last:
                load_keys(mode, q, k, g, a, b, t, n, wide, rows)
                load(rows, block.V, v, t, n)
                block.decays(mode, bonus, n, wide, rows, squares, by_key)
                if mode:
                    block.scores(mode, bonus, n, wide, rows, columns, squares, by_key, u)
                    block.solve(mode, n, wide, broad, rows, squares, beta[t:], S)
                    found[0, t - first : stop - first] = rows[block.X, :n, :broad]
                    found[1, t - first : stop - first] = rows[block.ERROR, :n, :broad]
                if stop < last:
                    block.write(mode, n, wide, broad, rows, S)
            t = stop
        starts[blocks] = last
        for which in range(blocks - 1, -1, -1):
            t, n = starts[which], starts[which + 1] - starts[which]
            if place[which] < 0:
                S[:] = 0
            S_ = states[place[which]] if place[which] >= 0 else S
            load_keys(mode, q, k, g, a, b, t, n, wide, rows)
            load(rows, block.V, v, t, n)
            load(rows, block.Y, dy, t, n)
            block.decays(mode, bonus, n, wide, rows, squares, by_key)
            block.scores(mode, bonus, n, wide, rows, columns, squares, by_key, u)
            if mode:
                load(rows, block.X, found[0], t - first, n)
                load(rows, block.ERROR, found[1], t - first, n)
            block.solve_back(mode, n, wide, broad, rows, squares, beta[t:], dbeta[t:], dS)
            block.through_state(mode, bonus, n, wide, broad, rows, columns, squares, S_, dS)
            for i in range(n):
                rows[block.TAIL, 1, i] = squares[block.DQK, i, i]
            block.through_pairs(mode, bonus, n, wide, rows, squares, by_key)
            if g.shape[1]:
                block.decay_gradient(mode, bonus, n, K, place[which] < 0, rows, dg[t:])
            if bonus:
                block.bonus_gradient(n, K, rows, rows[block.TAIL, 1], u, du)
            for i in range(n):
                for j in range(K):
                    dq[t + i, j] = rows[block.DQ, i, j]
                    dk[t + i, j] = rows[block.DK, i, j] + (rows[block.DRK, i, j] if mode == DELTA else 0)
                    if mode == DPLR:
                        da[t + i, j] = rows[block.DA, i, j]
                        db[t + i, j] = rows[block.DRK, i, j]
                for j in range(V):
                    dv[t + i, j] = rows[block.DX, i, j]
            if place[which] < 0:
                dS[:] = 0
    dS0[:] = dS[:K, :V]


@parallel
def _forward(mode, columns, q, k, v, g, beta, u, a, b, reset, S, y, saved):
    B, H, V = v.shape[0], v.shape[2], v.shape[3]
    blocks = (V + columns - 1) // columns
    for task in numba.prange(B * H * blocks):
        i, h, lo = task // blocks // H, task // blocks % H, task % blocks * columns
        hi = min(lo + columns, V)
        forward_task(
            mode,
            q[i, :, h * q.shape[2] // H],
            k[i, :, h * k.shape[2] // H],
            v[i, :, h, lo:hi],
            g[i, :, h],
            beta[i, :, h],
            u[h],
            a[i, :, h],
            b[i, :, h],
            reset[i],
            S[i, h, :, lo:hi],
            y[i, :, h, lo:hi],
            saved[i, h, :, :, lo:hi],
        )


@parallel
def _backward(
    mode, columns, q, k, v, g, beta, u, a, b, reset, saved, dy, dS, dq, dk, dv, dg, dbeta, du, da, db
):
    """dq, dk, dg, dbeta, du, da, db have an axis of blocks of columns in front, du one of the batch after it."""
    B, H, V = v.shape[0], v.shape[2], v.shape[3]
    blocks = (V + columns - 1) // columns
    for task in numba.prange(B * H * blocks):
        i, h, p = task // blocks // H, task // blocks % H, task % blocks
        lo, hi = p * columns, min(p * columns + columns, V)
        backward_task(
            mode,
            q[i, :, h * q.shape[2] // H],
            k[i, :, h * k.shape[2] // H],
            v[i, :, h, lo:hi],
            g[i, :, h],
            beta[i, :, h],
            u[h],
            a[i, :, h],
            b[i, :, h],
            reset[i],
            saved[i, h, :, :, lo:hi],
            dy[i, :, h, lo:hi],
            dS[i, h, :, lo:hi],
            dq[p, i, :, h],
            dk[p, i, :, h],
            dv[i, :, h, lo:hi],
            dg[p, i, :, h],
            dbeta[p, i, :, h],
            du[p, i, h],
            da[p, i, :, h],
            db[p, i, :, h],
        )


def _columns(B: int, H: int, V: int) -> int:
    """Value columns a task: as many as fit well, fewer where there would be fewer than TASKS tasks."""
    blocks = max(-(-V // WIDEST), min(-(-TASKS // (B * H)), -(-V // C)))
    return -(-(-(-V // blocks)) // C) * C


def _arrays(q, k, v, g, beta, u, a, b, reset):
    """Every input as an array, the absent ones of width 0."""
    none = v.new_empty(*v.shape[:3], 0)
    tensors = (
        *(x.contiguous() for x in (q, k, v)),
        none if g is None else g.contiguous().view(*v.shape[:3], -1),
        none if beta is None else beta.contiguous()[..., None],
        v.new_empty(v.shape[2], 0) if u is None else u.contiguous(),
        none if a is None else a.contiguous(),
        none if b is None else b.contiguous(),
    )
    reset = np.empty((v.shape[0], 0), np.bool_) if reset is None else reset.contiguous().numpy()
    return *(x.detach().numpy() for x in tensors), reset


def _mode(beta, a) -> int:
    return DELTA if beta is not None else DPLR if a is not None else OUTER


def _run(q, k, v, g, beta, u, a, b, state, reset, save):
    use_threads()
    (B, T, H, V), K = v.shape, k.shape[3]
    S = v.new_zeros(B, H, K, V) if state is None else state.clone(memory_format=torch.contiguous_format)
    y = v.new_empty(v.shape)
    saved = v.new_empty(B, H, -(-T // SEGMENT) if save else 0, K, V)
    inputs = _arrays(q, k, v, g, beta, u, a, b, reset)
    _forward(_mode(beta, a), _columns(B, H, V), *inputs, S.numpy(), y.numpy(), saved.numpy())
    return y, S, saved


def _run_backward(q, k, v, g, beta, u, a, b, state, reset, y, S, saved, dy, dS):
    use_threads()
    (B, T, H, V), K = v.shape, k.shape[3]
    columns = _columns(B, H, V)
    dy = v.new_zeros(v.shape) if dy is None else dy.contiguous()
    dS = v.new_zeros(B, H, K, V) if dS is None else dS.clone(memory_format=torch.contiguous_format)
    inputs = _arrays(q, k, v, g, beta, u, a, b, reset)
    parts = -(-V // columns)
    dv = v.new_empty(v.shape)
    dq, dk = (v.new_empty(parts, B, T, H, K) for _ in range(2))
    dg, dbeta, da, db = (v.new_empty(parts, *inputs[i].shape) for i in (3, 4, 6, 7))
    du = v.new_zeros(parts, B, *inputs[5].shape)
    outputs = (x.numpy() for x in (dy, dS, dq, dk, dv, dg, dbeta, du, da, db))
    _backward(_mode(beta, a), columns, *inputs, saved.detach().numpy(), *outputs)
    return (
        _grouped(dq, q.shape[2]),
        _grouped(dk, k.shape[2]),
        dv,
        None if g is None else _sum(dg).view(g.shape),
        None if beta is None else _sum(dbeta).view(beta.shape),
        None if u is None else du.sum((0, 1)),
        None if a is None else _sum(da),
        None if b is None else _sum(db),
        None if state is None else dS,
        None,
    )


def _sum(parts: Tensor) -> Tensor:
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _grouped(parts: Tensor, groups: int) -> Tensor:
    """Gradients of q or k, summed over blocks of columns and over the heads of a group."""
    x = _sum(parts)
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)


def _fake(q, k, v, g, beta, u, a, b, state, reset, save):
    (B, T, H, V), K = v.shape, k.shape[3]
    segments = (T + SEGMENT - 1) // SEGMENT if save else 0
    return v.new_empty(v.shape), v.new_empty(B, H, K, V), v.new_empty(B, H, segments, K, V)


_matrix = define(
    "matrix_cpu",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? u, Tensor? a, Tensor? b, Tensor? state, Tensor? reset",
    2,
    1,
    "cpu",
    _run,
    _run_backward,
    _fake,
)


def outer(q, k, v, g=None, u=None, state: Tensor | None = None, reset: Tensor | None = None):
    return _matrix(q, k, v, g, None, u, None, None, state, reset)


def delta(q, k, v, beta, g=None, state: Tensor | None = None, reset: Tensor | None = None):
    return _matrix(q, k, v, g, beta, None, None, None, state, reset)


def dplr(q, k, v, g, a, b, state: Tensor | None = None, reset: Tensor | None = None):
    return _matrix(q, k, v, g, None, None, a, b, state, reset)


def mlstm(q, k, v, f, i, state=None, reset: Tensor | None = None):
    return stabilised(outer, q, k, v, f, i, state, reset)
