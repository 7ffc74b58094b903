"""The matrix memories with a decay for each key, a bonus or a low-rank part. The state stays in the cache.

A task is one sequence, some neighbouring heads and a part of the value columns: columns of S do not depend on
each other. It walks over time a SEGMENT at a time, one head after the other, in blocks (see block.py) that
end at a reset; a block after a reset starts from zeros. The forward keeps the state every SEGMENT steps; the
backward recomputes the states between. Gradients of q, k and what else all columns share are summed
afterwards in the order of the parts, so that results are the same on any number of threads.
"""

from __future__ import annotations

import numpy as np

from . import block, gradient
from .block import DELTA, DPLR
from .elementary import exp
from .gemm import SIDE as C
from .gemm import apart
from .memory import (
    MINUS_ONE,
    ONE,
    SEGMENT,
    ZERO,
    aligned,
    alive,
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


@small
def prepare(mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares, near, head):
    """Load a block and find what does not depend on the state. One g a head, or none, is spread over keys.

    The same block of `head`, `near` steps on, will be next but for a few.
    """
    apart()
    (H, K, D), then = (v.shape[2], q.shape[3], g.shape[3]), t + near
    load(rows[block.Q], q, i, t, shared(q, h, H), ZERO, K, n, then, shared(q, head, H))
    load(rows[block.K], k, i, t, shared(k, h, H), ZERO, K, n, then, shared(k, head, H))
    load(rows[block.V], v, i, t, h, lo, V, n, then, head)
    if mode == DELTA:
        load(rows[block.R], k, i, t, shared(k, h, H), ZERO, K, n, MINUS_ONE, ZERO)
    if mode == DPLR:
        load(rows[block.R], b, i, t, h, ZERO, K, n, then, head)
        load(rows[block.A], a, i, t, h, ZERO, K, n, then, head)
    load(rows[block.DECAY], g, i, t, h, ZERO, D, n, then, head)
    for r in range(n):
        decay = rows[block.DECAY, r]
        for c in range(D):
            decay[c] = exp(decay[c])
        if D < 2:
            only = decay[0] if D else rows.dtype.type(1)
            for c in range(wide):
                decay[c] = only
    bonus = u.shape[1] > 0
    block.decays(mode, bonus, n, wide, rows)
    block.scores(mode, bonus, n, wide, rows, columns, squares, u, h)


@small
def scratch(room, wide, broad):
    """Rows, columns and squares for keys of width `wide` and values of width `broad`."""
    width = max(wide, broad)
    a = block.ROWS * C * width
    b = a + block.COLUMNS * width * C
    return (
        room[:a].reshape((block.ROWS, C, width)),
        room[a:b].reshape((block.COLUMNS, width, C)),
        room[b : b + block.SQUARES * C * C].reshape((block.SQUARES, C, C)),
    )


@small
def size(wide, broad):
    """Numbers that `scratch` takes."""
    return (block.ROWS + block.COLUMNS) * C * max(wide, broad) + block.SQUARES * C * C


@compiled
def forward(first, step, mode, share, group, q, k, v, g, beta, u, a, b, reset, S0, y, saved):
    """Tasks first, first + step, ... S0 (the first state) becomes the last; saved: (B, H segments, K, V)."""
    if divided(first, step):
        return
    (B, T, H, width), K = v.shape, q.shape[3]
    parts, segments = (width + share - 1) // share, saved.shape[1] // H
    wide, broad = (K + C - 1) // C * C, share
    room = aligned(size(wide, broad) + group * wide * broad, q)
    rows, columns, squares = scratch(borrowed(room), wide, broad)
    states = borrowed(room)[size(wide, broad) :].reshape((group, wide, broad))
    q, k, v, g, a, b, y = (
        borrowed(q), borrowed(k), borrowed(v), borrowed(g), borrowed(a), borrowed(b), borrowed(y)
    )  # fmt: skip
    for task in range(first, B * parts * (H // group), step):
        i, part, heads = place(task, parts, H // group)
        lo, V = part * share, min(share, width - part * share)
        states[:] = 0
        rows[block.V] = 0  # the last part may be narrower than the one before it
        for each in range(group):
            fetch(states[each], S0, i, heads * group + each, lo, V)
        for start in range(0, T, SEGMENT):
            for each in range(group):
                h, t, stop, S = heads * group + each, start, min(T, start + SEGMENT), states[each]
                near, head = (0, h + 1) if each + 1 < group else (SEGMENT, heads * group)
                if segments:
                    keep(saved, i, h * segments + start // SEGMENT, lo, V, S)
                while t < stop:
                    n = length(t, stop, reset, i)
                    if reset.shape[1] and reset[i, t]:
                        S[:] = 0
                    prepare(
                        mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares, near, head
                    )
                    if mode:
                        block.solve(mode, n, wide, broad, rows, squares, beta, i, t, h, S)
                    block.read(mode, n, wide, broad, rows, squares, S)
                    block.write(mode, n, wide, broad, rows, S, S)
                    store(y, i, t, h, lo, V, n, rows[block.Y])
                    t += n
        for each in range(group):
            keep(S0, i, heads * group + each, lo, V, states[each])
    alive(room)


@compiled
def backward(
    first,
    step,
    mode,
    share,
    group,
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
    if divided(first, step):
        return
    (B, T, H, width), K = v.shape, q.shape[3]
    parts, segments = (width + share - 1) // share, saved.shape[1] // H
    wide, broad = (K + C - 1) // C * C, share
    area, most = wide * broad, SEGMENT // C + 2
    room = aligned(size(wide, broad) + (group + most) * area + 2 * SEGMENT * broad, q)
    rows, columns, squares = scratch(borrowed(room), wide, broad)
    rest = borrowed(room)[size(wide, broad) :]
    ends = rest[: group * area].reshape((group, wide, broad))
    # states before the blocks that do not start from zeros, then one more, and zeros
    states, NONE = rest[group * area : (group + most) * area].reshape((most, wide, broad)), most - 1
    # what was written in the segment, and errors, with the axes of a sequence
    found = rest[(group + most) * area :].reshape((2, SEGMENT, 1, broad))
    starts, before = np.empty(SEGMENT + 1, np.int64), np.empty(SEGMENT, np.int64)
    q, k, v, g, a, b, dy = (
        borrowed(q), borrowed(k), borrowed(v), borrowed(g), borrowed(a), borrowed(b), borrowed(dy)
    )  # fmt: skip
    dq, dk, dv, dg, da, db = (
        borrowed(dq), borrowed(dk), borrowed(dv), borrowed(dg), borrowed(da), borrowed(db)
    )  # fmt: skip
    for task in range(first, B * parts * (H // group), step):
        i, part, heads = place(task, parts, H // group)
        lo, V, at = part * share, min(share, width - part * share), part * B + i
        ends[:] = 0
        states[:] = 0
        rows[block.V] = 0  # the last part may be narrower than the one before it
        rows[block.Y] = 0
        for each in range(group):
            fetch(ends[each], dS0, i, heads * group + each, lo, V)
        for turn in range(segments * group):
            segment, each = segments - 1 - turn // group, turn % group
            h, dS = heads * group + each, ends[each]
            near, head = (0, h + 1) if each + 1 < group else (-SEGMENT, heads * group)
            start, stop = segment * SEGMENT, min(T, segment * SEGMENT + SEGMENT)
            fetch(states[0], saved, i, h * segments + segment, lo, V)
            blocks, kept, t = 0, 0, start
            while t < stop:
                n = length(t, stop, reset, i)
                fresh = reset.shape[1] > 0 and reset[i, t]
                starts[blocks], before[blocks] = t, NONE if fresh else kept
                S = states[before[blocks]]
                kept += not fresh
                prepare(
                    mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares, near, head
                )
                if mode:
                    block.solve(mode, n, wide, broad, rows, squares, beta, i, t, h, S)
                    store(found, ZERO, t - start, ZERO, ZERO, broad, n, rows[block.X])
                    store(found, ONE, t - start, ZERO, ZERO, broad, n, rows[block.ERROR])
                if t + n < stop:
                    block.write(mode, n, wide, broad, rows, states[kept], S)
                blocks += 1
                t += n
            for which in range(blocks - 1, -1, -1):
                t = starts[which]
                n = (stop if which == blocks - 1 else starts[which + 1]) - t
                if which < blocks - 1:
                    prepare(mode, q, k, v, g, u, a, b, i, t, h, lo, V, n, wide, rows, columns, squares, -T, h)
                    if mode:
                        load(rows[block.X], found, ZERO, t - start, ZERO, ZERO, broad, n, MINUS_ONE, ZERO)
                        load(rows[block.ERROR], found, ONE, t - start, ZERO, ZERO, broad, n, MINUS_ONE, ZERO)
                load(rows[block.Y], dy, i, t, h, lo, V, n, t + near, head)
                S, fresh = states[before[which]], before[which] == NONE
                gradient.gradients(
                    mode, g.shape[3], fresh, n, K, wide, broad, rows, columns, squares,
                    beta, dbeta, u, du, S, dS, i, at, t, h,
                )  # fmt: skip
                store(dq, at, t, h, ZERO, K, n, rows[block.DQ])
                store(dk, at, t, h, ZERO, K, n, rows[block.DK])
                store(dv, i, t, h, lo, V, n, rows[block.DX])
                store(dg, at, t, h, ZERO, g.shape[3], n, rows[block.DG])
                if mode == DPLR:
                    store(da, at, t, h, ZERO, K, n, rows[block.DA])
                    store(db, at, t, h, ZERO, K, n, rows[block.DRK])
                if fresh:
                    dS[:] = 0
        for each in range(group):
            keep(dS0, i, heads * group + each, lo, V, ends[each])
    alive(room)
