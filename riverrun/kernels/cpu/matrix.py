"""The matrix memories outer, delta, dplr and mlstm on a CPU: one kernel, whose state never leaves the cache.

A task is one (batch, head, part of the value columns): columns of S do not depend on each other. It walks
over time in blocks (see block.py) that end at a reset; a block after a reset starts from zeros. The forward
keeps the state every SEGMENT steps; the backward recomputes the states between. Gradients of q, k and what
else all columns share are summed afterwards in the order of the parts, so that results are the same on any
number of threads.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from riverrun.algorithms.chunk import stabilised
from riverrun.kernels.library import define

from . import block, gradient, short
from .block import DELTA, DPLR, OUTER, C, aligned, small
from .blocks import SMALL
from .elementary import exp
from .gemm import apart
from .threads import FASTMATH, array, in_threads

compiled = numba.njit(cache=True, error_model="numpy", fastmath=FASTMATH, nogil=True)

SEGMENT = 64
TASKS = 4  # wanted at the least; a part of the columns repeats what columns share, so parts cost
WIDEST = 80  # value columns of a task


@small
def length(t, stop, reset, i):
    """Steps of the block that starts at t: up to C, and no further than `stop` or the next reset."""
    for n in range(1, min(C, stop - t)):
        if reset.shape[1] and reset[i, t + n]:
            return n
    return min(C, stop - t)


@small
def load(rows, slot, x, i, t, h, lo, width, n):
    """x[i, t : t + n, h, lo : lo + width] into the first columns of a row slot."""
    apart()
    for r in range(n):
        for c in range(width):
            rows[slot, r, c] = x[i, t + r, h, lo + c]


@small
def store(x, i, t, h, lo, width, n, rows, slot):
    """The inverse of `load`."""
    apart()
    for r in range(n):
        for c in range(width):
            x[i, t + r, h, lo + c] = rows[slot, r, c]


@small
def fetch(S, x, i, h, lo, V):
    """x[i, h, :, lo : lo + V] into the corner of S."""
    apart()
    for k in range(x.shape[2]):
        for c in range(V):
            S[k, c] = x[i, h, k, lo + c]


@small
def keep(x, i, h, lo, V, S):
    """The inverse of `fetch`."""
    apart()
    for k in range(x.shape[2]):
        for c in range(V):
            x[i, h, k, lo + c] = S[k, c]


@small
def copy(to, x, wide, broad):
    apart()
    for k in range(wide):
        for c in range(broad):
            to[k, c] = x[k, c]


@small
def clear(S, wide, broad):
    apart()
    for k in range(wide):
        for c in range(broad):
            S[k, c] = 0


@small
def prepare(mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares):
    """Load a block and find what does not depend on the state. One g a head, or none, is spread over keys."""
    apart()
    H, K, D = v.shape[2], q.shape[3], g.shape[3]
    group = h * k.shape[2] // H
    load(rows, block.Q, q, i, t, h * q.shape[2] // H, 0, K, n)
    load(rows, block.K, k, i, t, group, 0, K, n)
    load(rows, block.V, v, i, t, h, lo, V, n)
    if mode == DELTA:
        load(rows, block.R, k, i, t, group, 0, K, n)
    if mode == DPLR:
        load(rows, block.R, b, i, t, h, 0, K, n)
        load(rows, block.A, a, i, t, h, 0, K, n)
    load(rows, block.DECAY, g, i, t, h, 0, D, n)
    for r in range(n):
        for c in range(D):
            rows[block.DECAY, r, c] = exp(rows[block.DECAY, r, c])
        if D < 2:
            only = rows[block.DECAY, r, 0] if D else rows.dtype.type(1)
            for c in range(wide):
                rows[block.DECAY, r, c] = only
    bonus = u.shape[1] > 0
    block.decays(mode, bonus, n, wide, rows, squares, D > 1)
    block.scores(mode, bonus, n, wide, rows, columns, squares, D > 1, u, h)


@small
def scratch(wide, broad, like):
    """Rows, columns and squares for keys of width `wide` and values of width `broad`."""
    apart()
    width = max(wide, broad)
    return (
        aligned(block.ROWS * C * width, like).reshape((block.ROWS, C, width)),
        aligned(block.COLUMNS * width * C, like).reshape((block.COLUMNS, width, C)),
        aligned(block.SQUARES * C * C, like).reshape((block.SQUARES, C, C)),
    )


@compiled
def _forward(first, step, mode, share, q, k, v, g, beta, u, a, b, reset, S0, y, saved):
    """Tasks first, first + step, ... S0 (the first state) becomes the last; saved: (B, H segments, K, V)."""
    (B, T, H, width), K = v.shape, q.shape[3]
    parts, segments = (width + share - 1) // share, saved.shape[1] // H
    wide, broad = (K + C - 1) // C * C, share
    rows, columns, squares = scratch(wide, broad, q)
    S = aligned(wide * broad, q).reshape((wide, broad))
    for task in range(first, B * H * parts, step):
        i, h, lo = task // parts // H, task // parts % H, task % parts * share
        V = min(share, width - lo)
        clear(S, wide, broad)
        clear(rows[block.V], C, broad)  # the last part may be narrower than the one before it
        fetch(S, S0, i, h, lo, V)
        t = 0
        while t < T:
            n = length(t, min(T, t // SEGMENT * SEGMENT + SEGMENT), reset, i)
            if segments and t % SEGMENT == 0:
                keep(saved, i, h * segments + t // SEGMENT, lo, V, S)
            if reset.shape[1] and reset[i, t]:
                clear(S, wide, broad)
            prepare(mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares)
            block.solve(mode, n, wide, broad, rows, squares, beta, i, t, h, S)
            block.read(mode, n, wide, broad, rows, squares, S)
            block.write(mode, n, wide, broad, rows, S)
            store(y, i, t, h, lo, V, n, rows, block.Y)
            t += n
        keep(S0, i, h, lo, V, S)


@compiled
def _backward(
    first,
    step,
    mode,
    share,
    q,
    k,
    v,
    g,
    beta,
    u,
    a,
    b,
    reset,
    saved,
    dy,
    dS0,
    dq,
    dk,
    dv,
    dg,
    dbeta,
    du,
    da,
    db,
):
    """dS0 is the gradient of the last state and becomes that of the first. Gradients of what all columns
    share are sums over one part's columns, of shape (parts B, ...)."""
    (B, T, H, width), K = v.shape, q.shape[3]
    parts, segments = (width + share - 1) // share, saved.shape[1] // H
    wide, broad = (K + C - 1) // C * C, share
    rows, columns, squares = scratch(wide, broad, q)
    dS = aligned(wide * broad, q).reshape((wide, broad))
    # states before the blocks that do not start from zeros; the last but one moves, the last stays zero
    states = aligned((SEGMENT // C + 2) * wide * broad, q).reshape((SEGMENT // C + 2, wide, broad))
    S, NONE = states[SEGMENT // C], SEGMENT // C + 1
    starts, place = np.empty(SEGMENT + 1, np.int64), np.empty(SEGMENT, np.int64)
    # what was written in the segment, and errors, with the axes of a sequence
    found = aligned(2 * SEGMENT * broad, q).reshape((2, SEGMENT, 1, broad))
    for task in range(first, B * H * parts, step):
        i, h, lo = task // parts // H, task // parts % H, task % parts * share
        V, at = min(share, width - lo), task % parts * B + i
        clear(dS, wide, broad)
        clear(S, wide, broad)
        clear(rows[block.V], C, broad)  # the last part may be narrower than the one before it
        clear(rows[block.Y], C, broad)
        fetch(dS, dS0, i, h, lo, V)
        for segment in range(segments - 1, -1, -1):
            start, stop = segment * SEGMENT, min(T, segment * SEGMENT + SEGMENT)
            fetch(S, saved, i, h * segments + segment, lo, V)
            blocks, kept, t = 0, 0, start
            while t < stop:
                n = length(t, stop, reset, i)
                starts[blocks], place[blocks] = t, kept
                if reset.shape[1] and reset[i, t]:
                    clear(S, wide, broad)
                    place[blocks] = NONE
                else:
                    copy(states[kept], S, wide, broad)
                    kept += 1
                blocks += 1
                prepare(mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares)
                block.solve(mode, n, wide, broad, rows, squares, beta, i, t, h, S)
                store(found, 0, t - start, 0, 0, broad, n, rows, block.X)
                store(found, 1, t - start, 0, 0, broad, n, rows, block.ERROR)
                if t + n < stop:
                    block.write(mode, n, wide, broad, rows, S)
                t += n
            for which in range(blocks - 1, -1, -1):
                t = starts[which]
                n = (stop if which == blocks - 1 else starts[which + 1]) - t
                if which < blocks - 1:
                    prepare(mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares)
                    load(rows, block.X, found, 0, t - start, 0, 0, broad, n)
                    load(rows, block.ERROR, found, 1, t - start, 0, 0, broad, n)
                load(rows, block.Y, dy, i, t, h, lo, V, n)
                before, fresh = states[place[which]], place[which] == NONE
                gradient.gradients(
                    mode, g.shape[3], fresh, n, K, wide, broad, rows, columns, squares,
                    beta, dbeta, u, du, before, dS, i, at, t, h,
                )  # fmt: skip
                store(dq, at, t, h, 0, K, n, rows, block.DQ)
                store(dk, at, t, h, 0, K, n, rows, block.DK)
                store(dv, i, t, h, lo, V, n, rows, block.DX)
                store(dg, at, t, h, 0, g.shape[3], n, rows, block.DG)
                if mode == DPLR:
                    store(da, at, t, h, 0, K, n, rows, block.DA)
                    store(db, at, t, h, 0, K, n, rows, block.DRK)
                if fresh:
                    clear(dS, wide, broad)
        keep(dS0, i, h, lo, V, dS)


def _columns(B: int, H: int, V: int) -> int:
    """Value columns a task: as many as fit well, fewer where there would be fewer than TASKS tasks."""
    parts = max(math.ceil(V / WIDEST), min(math.ceil(TASKS / (B * H)), math.ceil(V / C)))
    return math.ceil(V / parts / C) * C


def _arrays(q, k, v, g, beta, u, a, b, reset):
    """Every input as an array, the absent ones of width 0."""
    q, k, v = (array(x.contiguous()) for x in (q, k, v))
    none = np.empty((*v.shape[:3], 0), v.dtype)
    return (
        q,
        k,
        v,
        none if g is None else array(g.contiguous()).reshape(*v.shape[:3], -1),
        none if beta is None else array(beta.contiguous()).reshape(*v.shape[:3], 1),
        none[0, 0] if u is None else array(u.contiguous()),
        none if a is None else array(a.contiguous()),
        none if b is None else array(b.contiguous()),
        np.empty((v.shape[0], 0), np.bool_) if reset is None else array(reset.contiguous()),
    )


def _mode(beta, a) -> int:
    return DELTA if beta is not None else DPLR if a is not None else OUTER


def _run(q, k, v, g, beta, u, a, b, state, reset, save):
    (B, T, H, V), K = v.shape, k.shape[3]
    y, inputs = torch.empty(v.shape, dtype=v.dtype), _arrays(q, k, v, g, beta, u, a, b, reset)
    if T <= short.STEPS:
        before = v.new_zeros(B, H, K, V) if state is None else state.contiguous()
        S = torch.empty(B, H, K, V, dtype=v.dtype)
        tasks = B * H if S.numel() * T > SMALL else 1
        in_threads(short.forward, tasks, _mode(beta, a), *inputs, array(before), array(S), array(y))
        return y, S, before.clone() if save else v.new_empty(B, 0, K, V)
    S = v.new_zeros(B, H, K, V) if state is None else state.clone(memory_format=torch.contiguous_format)
    saved = v.new_empty(B, H * -(-T // SEGMENT) if save else 0, K, V)
    share = _columns(B, H, V)
    tasks = B * H * -(-V // share)
    in_threads(_forward, tasks, _mode(beta, a), share, *inputs, *(array(x) for x in (S, y, saved)))
    return y, S, saved


def _run_backward(q, k, v, g, beta, u, a, b, state, reset, y, S, saved, dy, dS):
    (B, T, H, V), K = v.shape, k.shape[3]
    share = _columns(B, H, V)
    dy = v.new_zeros(v.shape) if dy is None else dy.contiguous()
    dS = v.new_zeros(B, H, K, V) if dS is None else dS.clone(memory_format=torch.contiguous_format)
    inputs = _arrays(q, k, v, g, beta, u, a, b, reset)
    parts = -(-V // share)
    dv = v.new_empty(v.shape)
    dq, dk = (v.new_empty(parts * B, T, H, K) for _ in range(2))
    dg, dbeta, da, db = (v.new_empty(parts * B, T, H, inputs[i].shape[3]) for i in (3, 4, 6, 7))
    du = v.new_zeros(parts * B, *inputs[5].shape)
    arrays = (array(x) for x in (saved, dy, dS, dq, dk, dv, dg, dbeta, du, da, db))
    in_threads(_backward, B * H * parts, _mode(beta, a), share, *inputs, *arrays)
    return (
        _grouped(_sum(dq, parts), q.shape[2]),
        _grouped(_sum(dk, parts), k.shape[2]),
        dv,
        None if g is None else _sum(dg, parts).view(g.shape),
        None if beta is None else _sum(dbeta, parts).view(beta.shape),
        None if u is None else du.sum(0),
        None if a is None else _sum(da, parts),
        None if b is None else _sum(db, parts),
        None if state is None else dS,
        None,
    )


def _sum(x: Tensor, parts: int) -> Tensor:
    """Over the blocks of columns, which stand in front of the batch."""
    return x if parts == 1 else x.unflatten(0, (parts, -1)).sum(0)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Gradients of q or k, summed over the heads that share a group."""
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)


def _fake(q, k, v, g, beta, u, a, b, state, reset, save):
    (B, T, H, V), K = v.shape, k.shape[3]
    segments = (T + SEGMENT - 1) // SEGMENT if save else 0
    return v.new_empty(v.shape), v.new_empty(B, H, K, V), v.new_empty(B, H * segments, K, V)


_matrix = define(
    "matrix_cpu",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? u, Tensor? a, Tensor? b, "
    "Tensor? state, Tensor? reset",
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
