"""The memories outer, delta and mlstm with one decay for a head, or none. The state stays in the cache.

A task walks over time as in by_key.py. What it does with a block stands in head.py, and in normaliser.py what
mlstm adds; its f comes as g.
"""

from __future__ import annotations

import numpy as np

from . import gemm, normaliser
from .gemm import SIDE as C
from .gemm import apart
from .head import (
    AFTER,
    DK,
    DQ,
    DX,
    KK,
    QK,
    SUM,
    TOP,
    TURNED,
    TWO,
    WHOLE,
    XS,
    E,
    K,
    P,
    Q,
    V,
    X,
    Y,
    decays,
    gather,
    given,
    gradients,
    scale,
    scores,
    scratch,
    settled,
    size,
    solve,
    weigh,
)
from .memory import (
    MINUS_ONE,
    ONE,
    SEGMENT,
    ZERO,
    aligned,
    alive,
    ask,
    borrowed,
    compiled,
    fetch,
    keep,
    length,
    load,
    place,
    shared,
    small,
    store,
)
from .team import divided

PLACES = np.arange(8)  # not literals, see memory.py


@compiled
def forward(first, step, share, group, q, k, v, g, beta, reset, S0, y, saved, norm=None):
    """Tasks first, first + step, ... S0 (the first state) becomes the last; saved: (B, H segments, K, V).

    norm, a `normaliser.Norm`, is None but for mlstm, whose beta is None: what is None compiles to nothing.
    """
    if divided(first, step):
        return
    (B, T, H, width), keys = v.shape, q.shape[3]
    parts, segments = (width + share - 1) // share, saved.shape[1] // H
    delta = False
    if beta is not None:
        delta = beta.shape[3] > 0
    wide, broad = (keys + C - 1) // C * C, share
    area = wide * broad
    room = aligned(size(wide, broad) + group * (area + wide), q)
    rows, columns, squares, vectors = scratch(borrowed(room), wide, broad)
    rest = borrowed(room)[size(wide, broad) :]
    states = rest[: group * area].reshape((group, wide, broad))
    norms = rest[group * area :].reshape((group, 1, wide))
    q, k, v, y = borrowed(q), borrowed(k), borrowed(v), borrowed(y)
    room_ahead = np.empty((4, 3), np.int64)
    x = rows[X] if delta else rows[V]
    constant = settled(delta, g, beta, squares, vectors)
    xs = x if constant else rows[XS]
    top, ahead = np.zeros(group, q.dtype), borrowed(room_ahead)
    for task in range(first, B * parts * (H // group), step):
        i, part, heads = place(task, parts, H // group)
        lo, here = part * share, min(share, width - part * share)
        states[:] = 0
        rows[V] = 0  # the last part may be narrower than the one before it
        for each in range(group):
            fetch(states[each], S0, i, heads * group + each, lo, here)
            if norm is not None:
                fetch(norms[each], norm.n, i, heads * group + each, ZERO, keys)
                top[each] = norm.m[i, heads * group + each]
        for start in range(0, T, SEGMENT):
            for each in range(group):
                h, t, stop, S = heads * group + each, start, min(T, start + SEGMENT), states[each]
                # blocks of this head will be next, this many steps on
                near, head = (0, h + 1) if each + 1 < group else (SEGMENT, heads * group)
                if segments:
                    keep(saved, i, h * segments + start // SEGMENT, lo, here, S)
                    if norm is not None and part == 0:
                        keep(norm.saved, i, h * segments + start // SEGMENT, ZERO, keys, norms[each])
                while t < stop:
                    n = length(t, stop, reset, i)
                    m = (n + 3) // 4 * 4
                    if reset.shape[1] and reset[i, t]:
                        S[:] = 0
                        norms[each, :] = 0
                        top[each] = 0
                    load(rows[Q], q, i, t, shared(q, h, H), ZERO, keys, n, MINUS_ONE, ZERO)
                    load(rows[K], k, i, t, shared(k, h, H), ZERO, keys, n, MINUS_ONE, ZERO)
                    load(rows[V], v, i, t, h, lo, here, n, MINUS_ONE, ZERO)
                    ask(ahead, PLACES[0], q, i, t + near, shared(q, head, H), ZERO, keys)
                    ask(ahead, PLACES[1], k, i, t + near, shared(k, head, H), ZERO, keys)
                    ask(ahead, PLACES[2], v, i, t + near, head, lo, here)
                    ask(ahead, PLACES[3], y, i, t + near, head, lo, here)
                    if beta is not None and not constant:
                        given(g, beta, i, t, h, n, vectors)
                        decays(n, squares, vectors)
                    if norm is not None:
                        normaliser.gates(g, norm.i, i, t, h, n, top[each], squares, vectors)
                    scores(delta, n, wide, rows, columns, squares)
                    if beta is not None and delta:
                        solve(n, wide, broad, rows, squares, vectors, S)
                    gemm.put_asking(rows[Y], rows[Q], S, m, broad, wide, ahead, TWO)
                    gemm.scale_add(rows[Y], rows[Y], vectors[P], squares[QK], x, m, broad, n)
                    if norm is not None:
                        normaliser.divide(norms[each, 0], n, wide, broad, rows, squares, vectors)
                        top[each] = vectors[TOP, n - 1]
                        for s in range(n if part == 0 else 0):
                            norm.tops[i, t + s, h], norm.sums[i, t + s, h] = vectors[TOP, s], vectors[SUM, s]
                    store(y, i, t, h, lo, here, n, rows[Y])
                    if not constant:
                        scale(xs, x, vectors[AFTER], broad, n)
                    gemm.scale_add_turned_asking(
                        S, S, vectors[WHOLE], rows[K], xs, wide, broad, n, ahead[2:], TWO
                    )
                    t += n
        for each in range(group):
            keep(S0, i, heads * group + each, lo, here, states[each])
            if norm is not None and part == 0:
                keep(norm.n_last, i, heads * group + each, ZERO, keys, norms[each])
                norm.m_last[i, heads * group + each] = top[each]
    alive(room_ahead)
    alive(room)


@small
def foresee(ahead, q, k, v, dy, dq, dk, dv, y, i, at, t, h, H, lo, width):
    """What the backward will read and write at step t and head h."""
    apart()
    ask(ahead, PLACES[0], q, i, t, shared(q, h, H), ZERO, q.shape[3])
    ask(ahead, PLACES[1], k, i, t, shared(k, h, H), ZERO, q.shape[3])
    ask(ahead, PLACES[2], v, i, t, h, lo, width)
    ask(ahead, PLACES[3], dy, i, t, h, lo, width)
    ask(ahead, PLACES[4], dq, at, t, h, ZERO, q.shape[3])
    ask(ahead, PLACES[5], dk, at, t, h, ZERO, q.shape[3])
    ask(ahead, PLACES[6], dv, i, t, h, lo, width)
    ask(ahead, PLACES[7], y, i, t, h, lo, width)


@compiled
def backward(
    first, step, share, group, q, k, v, g, beta, reset, saved, dy, dS0, dq, dk, dv, dg, dbeta,
    norm=None, back=None,
):  # fmt: skip
    """dS0 is the gradient of the last state and becomes that of the first. Gradients of what all columns
    share are sums over one part's columns, of shape (parts B, ...). norm and back (a `normaliser.Back`) are
    those of mlstm."""
    if divided(first, step):
        return
    (B, T, H, width), keys = v.shape, q.shape[3]
    parts, segments = (width + share - 1) // share, saved.shape[1] // H
    delta = False
    if beta is not None:
        delta = beta.shape[3] > 0
    wide, broad = (keys + C - 1) // C * C, share
    area, most = wide * broad, SEGMENT // C + 2
    room = aligned(size(wide, broad) + (group + most) * (area + wide) + 2 * SEGMENT * broad, q)
    rows, columns, squares, vectors = scratch(borrowed(room), wide, broad)
    rest = borrowed(room)[size(wide, broad) :]
    ends = rest[: group * area].reshape((group, wide, broad))
    # states before the blocks that do not start from zeros, then one more, and zeros
    states, NONE = rest[group * area : (group + most) * area].reshape((most, wide, broad)), most - 1
    rest = rest[(group + most) * area :]
    # of n what ends and states are of S
    norm_ends = rest[: group * wide].reshape((group, 1, wide))
    norms = rest[group * wide : (group + most) * wide].reshape((most, 1, wide))
    # X and E of delta, with the axes of a sequence
    found = rest[(group + most) * wide :].reshape((2, SEGMENT, 1, broad))
    q, k, v, dy = borrowed(q), borrowed(k), borrowed(v), borrowed(dy)
    dq, dk, dv = borrowed(dq), borrowed(dk), borrowed(dv)
    constant = settled(delta, g, beta, squares, vectors)
    starts, before = np.empty(SEGMENT + 1, np.int64), np.empty(SEGMENT, np.int64)
    free, ahead = np.zeros(group, q.dtype), np.empty((8, 3), np.int64)
    for task in range(first, B * parts * (H // group), step):
        i, part, heads = place(task, parts, H // group)
        lo, here, at = part * share, min(share, width - part * share), part * B + i
        ends[:] = 0
        states[:] = 0
        rows[V] = 0  # the last part may be narrower than the one before it
        rows[Y] = 0
        for each in range(group):
            h, dS, dn = heads * group + each, ends[each], norm_ends[each]
            fetch(dS, dS0, i, h, lo, here)
            if norm is not None:
                free[each] = normaliser.begin(norm, back, dS, dn, i, h, lo, here)
        for turn in range(segments * group):
            segment, each = segments - 1 - turn // group, turn % group
            h, dS, dn = heads * group + each, ends[each], norm_ends[each]
            near, head = (0, h + 1) if each + 1 < group else (-SEGMENT, heads * group)
            start, stop = segment * SEGMENT, min(T, segment * SEGMENT + SEGMENT)
            fetch(states[0], saved, i, h * segments + segment, lo, here)
            if norm is not None:
                fetch(norms[0], norm.saved, i, h * segments + segment, ZERO, keys)
            blocks, kept, t = 0, 0, start
            while t < stop:
                n = length(t, stop, reset, i)
                fresh = reset.shape[1] > 0 and reset[i, t]
                starts[blocks], before[blocks] = t, NONE if fresh else kept
                S = states[before[blocks]]
                kept += not fresh
                load(rows[K], k, i, t, shared(k, h, H), ZERO, keys, n, MINUS_ONE, ZERO)
                load(rows[V], v, i, t, h, lo, here, n, MINUS_ONE, ZERO)
                normaliser.again(constant, g, beta, norm, fresh, i, t, h, n, squares, vectors)
                if beta is not None and delta:
                    gemm.transpose(columns[TURNED], rows[K], wide)
                    gemm.put(squares[KK], rows[K], columns[TURNED], (n + 3) // 4 * 4, C, wide)
                    weigh(squares[KK], squares, n, ONE, MINUS_ONE)
                    solve(n, wide, broad, rows, squares, vectors, S)
                    store(found, ZERO, t - start, ZERO, ZERO, broad, n, rows[X])
                    store(found, ONE, t - start, ZERO, ZERO, broad, n, rows[E])
                if t + n < stop:
                    scale(rows[XS], rows[X] if delta else rows[V], vectors[AFTER], broad, n)
                    gemm.scale_add_turned(states[kept], S, vectors[WHOLE], rows[K], rows[XS], wide, broad, n)
                    if norm is not None:
                        was = norms[before[blocks], 0]
                        gather(norms[kept, 0], vectors[WHOLE], was, vectors[AFTER], rows[K], wide, n)
                blocks += 1
                t += n
            for which in range(blocks - 1, -1, -1):
                t = starts[which]
                n = (stop if which == blocks - 1 else starts[which + 1]) - t
                S, fresh = states[before[which]], before[which] == NONE
                load(rows[Q], q, i, t, shared(q, h, H), ZERO, keys, n, MINUS_ONE, ZERO)
                load(rows[Y], dy, i, t, h, lo, here, n, MINUS_ONE, ZERO)
                y = dv if norm is None else back.y
                foresee(ahead, q, k, v, dy, dq, dk, dv, y, i, at, t + near, head, H, lo, here)
                if which < blocks - 1:
                    load(rows[K], k, i, t, shared(k, h, H), ZERO, keys, n, MINUS_ONE, ZERO)
                    load(rows[V], v, i, t, h, lo, here, n, MINUS_ONE, ZERO)
                    normaliser.again(constant, g, beta, norm, fresh, i, t, h, n, squares, vectors)
                    if beta is not None and delta:
                        load(rows[X], found, ZERO, t - start, ZERO, ZERO, broad, n, MINUS_ONE, ZERO)
                        load(rows[E], found, ONE, t - start, ZERO, ZERO, broad, n, MINUS_ONE, ZERO)
                if beta is not None:
                    gradients(
                        delta, fresh, n, wide, broad, rows, columns, squares, vectors,
                        S, dS, dg, dbeta, at, t, h, ahead, None, None, None,
                    )  # fmt: skip
                if norm is not None:
                    load(rows[E], back.y, i, t, h, lo, here, n, MINUS_ONE, ZERO)
                    normaliser.undivide(norm.sums, i, t, h, n, here, rows, vectors)
                    gradients(
                        delta, fresh, n, wide, broad, rows, columns, squares, vectors,
                        S, dS, dg, None, at, t, h, ahead,
                        norms[before[which], 0], dn[0], back.di,
                    )  # fmt: skip
                    free[each] = normaliser.route(
                        g, norm, dg, back.di, free[each], fresh, i, at, t, h, n, vectors
                    )
                store(dq, at, t, h, ZERO, keys, n, rows[DQ])
                store(dk, at, t, h, ZERO, keys, n, rows[DK])
                store(dv, i, t, h, lo, here, n, rows[DX])
                if fresh:
                    dS[:], dn[:] = 0, 0
                    free[each] = 0
        for each in range(group):
            keep(dS0, i, heads * group + each, lo, here, ends[each])
            if norm is not None:
                keep(back.dn_first, at, heads * group + each, ZERO, keys, norm_ends[each])
    alive(room)
