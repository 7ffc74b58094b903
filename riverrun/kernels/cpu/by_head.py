"""The memories outer and delta with one decay for a head, or none: all that decays do is scale rows.

    S_t = e^{g_t} S_{t-1} + k_t x_tᵀ        y_t = S_tᵀ q_t
    outer  x = v        delta  x_t = β_t (v_t - (e^{g_t} S_{t-1})ᵀ k_t)

A block of n ≤ 16 steps. With P_i the product of its decays up to i, s_i of those after i, M_ij = e^{g_{j+1} +
... + g_i} for j ≤ i and 0 beyond, and S the state before it:

    A = M ∘ Q Kᵀ   L = - strictly lower (M ∘ K Kᵀ)
    delta  E = V - P K S + L X,  X = β E, row by row
    Y = P Q S + A X
    S ← P_n S + Kᵀ (s X)

and backwards, from dY and the gradient dS of the state at its end, all products taken before dS moves:

    dX = s K dS + Aᵀ dY
    delta  dX_i += Σ_{j>i} L_ji dV_j,  dβ = dX · E,  dV = β dX,  R = -dV;  N = strictly lower (M ∘ R Xᵀ)
    D = M ∘ dY Xᵀ
    dQ = (P dY) Sᵀ + D K
    dK = (s X) dSᵀ + Dᵀ Q    delta  + (P R) Sᵀ + (N + Nᵀ) K
    dS ← P_n dS + Qᵀ (P dY)  delta  + Kᵀ (P R)
    dg_t = ⟨S_n, dS_n⟩ + Σ_{i≥t} (q_i · dq_i - k_i · dk_i)  where dk_i counts what k reads the other way round

Decays only ever multiply: nothing is divided, no exponent is positive, nothing can overflow however strong
the forgetting. Sources: Yang et al. 2024 (arXiv:2406.06484) eq. 8-11; Yang et al. 2023 (arXiv:2312.06635)
app. C for dg.
"""

from __future__ import annotations

import numpy as np

from . import gemm
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
    dot,
    expect,
    fetch,
    keep,
    length,
    load,
    place,
    shared,
    small,
    store,
)

# rows[...] (C, width), one row a step; XS, YS, RS are s X, P dY, P R; DR is the gradient of k as it reads
Q, K, V, X, E, XS, Y, YS, RS, R, DQ, DK, DX, DR = range(14)
ROWS = 14
# columns[...] (width, C), one column a step
TURNED, OUT = range(2)
COLUMNS = 2
# squares[...] (C, C)
QK, KK, DQK, DKK, SEEN = range(5)
SQUARES = 5
# vectors[...] (C or more): P, s, β, P_n for every key, and sums
P, AFTER, BETA, WHOLE, OWN = range(5)
VECTORS = 5


@small
def scratch(room, wide, broad):
    """Rows, columns, squares and vectors for keys of width `wide` and values of width `broad`."""
    width = max(wide, broad)
    a = ROWS * C * width
    b = a + COLUMNS * width * C
    c = b + SQUARES * C * C
    return (
        room[:a].reshape((ROWS, C, width)),
        room[a:b].reshape((COLUMNS, width, C)),
        room[b:c].reshape((SQUARES, C, C)),
        room[c : c + VECTORS * width].reshape((VECTORS, width)),
    )


@small
def size(wide, broad):
    """Numbers that `scratch` takes."""
    width = max(wide, broad)
    return (ROWS + COLUMNS) * C * width + SQUARES * C * C + VECTORS * width


@small
def decays(g, beta, i, t, h, n, squares, vectors):
    """P, s, P_n, β and M."""
    apart()
    through, after, own = vectors[P], vectors[AFTER], vectors[OWN]
    one = own.dtype.type(1)
    for s in range(n):
        own[s] = g[i, t + s, h, 0] if g.shape[3] else 0 * one
        vectors[BETA, s] = beta[i, t + s, h, 0] if beta.shape[3] else one
    for s in range(n):
        own[s] = exp(own[s])
    now = one
    for s in range(n):
        now *= own[s]
        through[s] = now
    vectors[WHOLE, :] = now
    now = one
    for s in range(n - 1, -1, -1):
        after[s] = now
        now *= own[s]
    for s in range(n):
        row, above = squares[SEEN, s], squares[SEEN, max(s - 1, 0)]
        for j in range(C):
            row[j] = above[j] * own[s] if j < s else one if j == s else 0 * one


@small
def weigh(square, squares, n, strict, sign):
    """± the square's lower triangle by M, the rest zero, whatever stood there."""
    apart()
    factor = squares.dtype.type(sign)
    for i in range(n):
        row, seen = square[i], squares[SEEN, i]
        last = i - strict
        for j in range(C):
            row[j] = row[j] * (factor * seen[j]) if j <= last else 0 * seen[j]


@small
def scale(out, x, by, broad, n):
    """out = diag(by) x"""
    apart()
    for i in range(n):
        to, row, factor = out[i], x[i], by[i]
        for v in range(broad):
            to[v] = factor * row[v]


@small
def solve(n, wide, broad, rows, squares, vectors, S):
    """E and X of delta: four rows at a time, first what earlier fours wrote, then each other."""
    apart()
    error, x, m = rows[E], rows[X], (n + 3) // 4 * 4
    gemm.put(error, rows[K], S, m, broad, wide)
    for i in range(n):
        e, value, through = error[i], rows[V, i], vectors[P, i]
        for v in range(broad):
            e[v] = value[v] - through * e[v]
    for lo in range(0, n, 4):
        hi = min(lo + 4, n)
        if lo:
            gemm.add(error[lo:], squares[KK, lo:], x, 4, broad, lo)
        for i in range(lo, hi):
            e, to, beta = error[i], x[i], vectors[BETA, i]
            for j in range(lo, i):
                weight, row = squares[KK, i, j], x[j]
                for v in range(broad):
                    e[v] += weight * row[v]
            for v in range(broad):
                to[v] = beta * e[v]


@small
def solve_back(n, broad, rows, squares, vectors):
    """dβ into OWN, dX to dV, and R, from the back."""
    apart()
    dx, r = rows[DX], rows[R]
    for lo in range((n - 1) // 4 * 4, -1, -4):
        hi = min(lo + 4, n)
        if hi < n:
            gemm.add_turned(dx[lo:], squares[KK, hi:, lo:], dx[hi:], 4, broad, n - hi)
        for i in range(hi - 1, lo - 1, -1):
            d, to, beta = dx[i], r[i], vectors[BETA, i]
            for j in range(i + 1, hi):
                weight, row = squares[KK, j, i], dx[j]
                for v in range(broad):
                    d[v] += weight * row[v]
            vectors[OWN, i] = dot(d, rows[E, i], broad)
            for v in range(broad):
                d[v] *= beta
                to[v] = -d[v]


@small
def scores(delta, n, wide, rows, columns, squares):
    """The squares A and L."""
    m, turned = (n + 3) // 4 * 4, columns[TURNED]
    gemm.transpose(turned, rows[K], wide)
    gemm.put(squares[QK], rows[Q], turned, m, C, wide)
    weigh(squares[QK], squares, n, ZERO, ONE)
    if delta:
        gemm.put(squares[KK], rows[K], turned, m, C, wide)
        weigh(squares[KK], squares, n, ONE, MINUS_ONE)


@compiled
def forward(first, step, share, group, q, k, v, g, beta, reset, S0, y, saved):
    """Tasks first, first + step, ... S0 (the first state) becomes the last; saved: (B, H segments, K, V)."""
    (B, T, H, width), keys = v.shape, q.shape[3]
    parts, segments, delta = (width + share - 1) // share, saved.shape[1] // H, beta.shape[3] > 0
    wide, broad = (keys + C - 1) // C * C, share
    area = wide * broad
    room = aligned(size(wide, broad) + group * area, q)
    rows, columns, squares, vectors = scratch(borrowed(room), wide, broad)
    states = borrowed(room)[size(wide, broad) :].reshape((group, wide, broad))
    q, k, v, y = borrowed(q), borrowed(k), borrowed(v), borrowed(y)
    x = rows[X] if delta else rows[V]
    for task in range(first, B * parts * (H // group), step):
        i, part, heads = place(task, parts, H // group)
        lo, here = part * share, min(share, width - part * share)
        states[:] = 0
        rows[V] = 0  # the last part may be narrower than the one before it
        for each in range(group):
            fetch(states[each], S0, i, heads * group + each, lo, here)
        for start in range(0, T, SEGMENT):
            for each in range(group):
                h, t, stop, S = heads * group + each, start, min(T, start + SEGMENT), states[each]
                # blocks of this head will be next, this many steps on
                near, head = (0, h + 1) if each + 1 < group else (SEGMENT, heads * group)
                if segments:
                    keep(saved, i, h * segments + start // SEGMENT, lo, here, S)
                while t < stop:
                    n = length(t, stop, reset, i)
                    m = (n + 3) // 4 * 4
                    if reset.shape[1] and reset[i, t]:
                        S[:] = 0
                    load(rows[Q], q, i, t, shared(q, h, H), ZERO, keys, n, t + near, shared(q, head, H))
                    load(rows[K], k, i, t, shared(k, h, H), ZERO, keys, n, t + near, shared(k, head, H))
                    load(rows[V], v, i, t, h, lo, here, n, t + near, head)
                    expect(y, i, t, h, lo, here, n)
                    decays(g, beta, i, t, h, n, squares, vectors)
                    scores(delta, n, wide, rows, columns, squares)
                    if delta:
                        solve(n, wide, broad, rows, squares, vectors, S)
                    gemm.put(rows[Y], rows[Q], S, m, broad, wide)
                    gemm.scale_add(rows[Y], rows[Y], vectors[P], squares[QK], x, m, broad, n)
                    store(y, i, t, h, lo, here, n, rows[Y])
                    scale(rows[XS], x, vectors[AFTER], broad, n)
                    gemm.scale_add_turned(S, S, vectors[WHOLE], rows[K], rows[XS], wide, broad, n)
                    t += n
        for each in range(group):
            keep(S0, i, heads * group + each, lo, here, states[each])
    alive(room)


@small
def against(out, matrix, x, columns, wide, broad):
    """out (C, wide) = x (C, broad) matrix (wide, broad)ᵀ"""
    gemm.transpose(columns[TURNED], x, broad)
    gemm.put(columns[OUT], matrix, columns[TURNED], wide, C, broad)
    gemm.transpose_back(out, columns[OUT], wide)


@small
def gradients(delta, fresh, n, wide, broad, rows, columns, squares, vectors, S, dS, dg, dbeta, at, t, h):
    """A loaded block's gradients, from rows[Y] = dy; X and E of delta are there."""
    apart()
    m, x = (n + 3) // 4 * 4, rows[X] if delta else rows[V]
    scores(delta, n, wide, rows, columns, squares)
    gemm.put(rows[DX], rows[K], dS, m, broad, wide)
    gemm.scale_add_turned(rows[DX], rows[DX], vectors[AFTER], squares[QK], rows[Y], m, broad, n)
    if delta:
        solve_back(n, broad, rows, squares, vectors)
        for i in range(n):
            dbeta[at, t + i, h, 0] = vectors[OWN, i]
    gemm.transpose(columns[TURNED], x, broad)
    gemm.put(squares[DQK], rows[Y], columns[TURNED], m, C, broad)
    weigh(squares[DQK], squares, n, ZERO, ONE)
    scale(rows[YS], rows[Y], vectors[P], broad, n)
    scale(rows[XS], x, vectors[AFTER], broad, n)
    if delta:
        gemm.put(squares[DKK], rows[R], columns[TURNED], m, C, broad)
        weigh(squares[DKK], squares, n, ONE, ONE)
        scale(rows[RS], rows[R], vectors[P], broad, n)
        against(rows[DR], S, rows[RS], columns, wide, broad)
        gemm.add(rows[DR], squares[DKK], rows[K], m, wide, n)
    against(rows[DQ], S, rows[YS], columns, wide, broad)
    against(rows[DK], dS, rows[XS], columns, wide, broad)
    total = 0 * dS[0, 0]
    if dg.shape[3]:
        for key in range(wide):
            total += dot(S[key], dS[key], broad)
        total *= vectors[WHOLE, 0]
        for i in range(n):
            total += dot(rows[K, i], rows[DK, i], wide)
    gemm.add(rows[DQ], squares[DQK], rows[K], m, wide, n)
    gemm.add_turned(rows[DK], squares[DQK], rows[Q], m, wide, n)
    gemm.scale_add_turned(dS, dS, vectors[WHOLE], rows[Q], rows[YS], wide, broad, n)
    if delta:
        gemm.add_turned(rows[DK], squares[DKK], rows[K], m, wide, n)
        gemm.add_turned(dS, rows[K], rows[RS], wide, broad, n)
    if dg.shape[3]:
        for i in range(n - 1, -1, -1):
            total += dot(rows[Q, i], rows[DQ, i], wide) - dot(rows[K, i], rows[DK, i], wide)
            if delta:
                total += dot(rows[K, i], rows[DR, i], wide)
            dg[at, t + i, h, 0] = 0 if fresh and i == 0 else total  # nothing was there to decay
    if delta:
        for i in range(n):
            to, other = rows[DK, i], rows[DR, i]
            for key in range(wide):
                to[key] += other[key]


@compiled
def backward(first, step, share, group, q, k, v, g, beta, reset, saved, dy, dS0, dq, dk, dv, dg, dbeta):
    """dS0 is the gradient of the last state and becomes that of the first. Gradients of what all columns
    share are sums over one part's columns, of shape (parts B, ...)."""
    (B, T, H, width), keys = v.shape, q.shape[3]
    parts, segments, delta = (width + share - 1) // share, saved.shape[1] // H, beta.shape[3] > 0
    wide, broad = (keys + C - 1) // C * C, share
    area, most = wide * broad, SEGMENT // C + 2
    room = aligned(size(wide, broad) + (group + most) * area + 2 * SEGMENT * broad, q)
    rows, columns, squares, vectors = scratch(borrowed(room), wide, broad)
    rest = borrowed(room)[size(wide, broad) :]
    ends = rest[: group * area].reshape((group, wide, broad))
    # states before the blocks that do not start from zeros, then one more, and zeros
    states, NONE = rest[group * area : (group + most) * area].reshape((most, wide, broad)), most - 1
    # X and E of delta, with the axes of a sequence
    found = rest[(group + most) * area :].reshape((2, SEGMENT, 1, broad))
    q, k, v, dy = borrowed(q), borrowed(k), borrowed(v), borrowed(dy)
    dq, dk, dv = borrowed(dq), borrowed(dk), borrowed(dv)
    starts, before = np.empty(SEGMENT + 1, np.int64), np.empty(SEGMENT, np.int64)
    for task in range(first, B * parts * (H // group), step):
        i, part, heads = place(task, parts, H // group)
        lo, here, at = part * share, min(share, width - part * share), part * B + i
        ends[:] = 0
        states[:] = 0
        rows[V] = 0  # the last part may be narrower than the one before it
        rows[Y] = 0
        for each in range(group):
            fetch(ends[each], dS0, i, heads * group + each, lo, here)
        for turn in range(segments * group):
            segment, each = segments - 1 - turn // group, turn % group
            h, dS = heads * group + each, ends[each]
            near, head = (0, h + 1) if each + 1 < group else (-SEGMENT, heads * group)
            start, stop = segment * SEGMENT, min(T, segment * SEGMENT + SEGMENT)
            fetch(states[0], saved, i, h * segments + segment, lo, here)
            blocks, kept, t = 0, 0, start
            while t < stop:
                n = length(t, stop, reset, i)
                fresh = reset.shape[1] > 0 and reset[i, t]
                starts[blocks], before[blocks] = t, NONE if fresh else kept
                S = states[before[blocks]]
                kept += not fresh
                load(rows[K], k, i, t, shared(k, h, H), ZERO, keys, n, t + near, shared(k, head, H))
                load(rows[V], v, i, t, h, lo, here, n, t + near, head)
                decays(g, beta, i, t, h, n, squares, vectors)
                if delta:
                    gemm.transpose(columns[TURNED], rows[K], wide)
                    gemm.put(squares[KK], rows[K], columns[TURNED], (n + 3) // 4 * 4, C, wide)
                    weigh(squares[KK], squares, n, ONE, MINUS_ONE)
                    solve(n, wide, broad, rows, squares, vectors, S)
                    store(found, ZERO, t - start, ZERO, ZERO, broad, n, rows[X])
                    store(found, ONE, t - start, ZERO, ZERO, broad, n, rows[E])
                if t + n < stop:
                    scale(rows[XS], rows[X] if delta else rows[V], vectors[AFTER], broad, n)
                    gemm.scale_add_turned(states[kept], S, vectors[WHOLE], rows[K], rows[XS], wide, broad, n)
                blocks += 1
                t += n
            for which in range(blocks - 1, -1, -1):
                t = starts[which]
                n = (stop if which == blocks - 1 else starts[which + 1]) - t
                S, fresh = states[before[which]], before[which] == NONE
                load(rows[Q], q, i, t, shared(q, h, H), ZERO, keys, n, t + near, shared(q, head, H))
                load(rows[Y], dy, i, t, h, lo, here, n, t + near, head)
                expect(dq, at, t, h, ZERO, keys, n)
                expect(dk, at, t, h, ZERO, keys, n)
                expect(dv, i, t, h, lo, here, n)
                if which < blocks - 1:
                    load(rows[K], k, i, t, shared(k, h, H), ZERO, keys, n, MINUS_ONE, ZERO)
                    load(rows[V], v, i, t, h, lo, here, n, MINUS_ONE, ZERO)
                    decays(g, beta, i, t, h, n, squares, vectors)
                    if delta:
                        load(rows[X], found, ZERO, t - start, ZERO, ZERO, broad, n, MINUS_ONE, ZERO)
                        load(rows[E], found, ONE, t - start, ZERO, ZERO, broad, n, MINUS_ONE, ZERO)
                gradients(
                    delta, fresh, n, wide, broad, rows, columns, squares, vectors,
                    S, dS, dg, dbeta, at, t, h,
                )  # fmt: skip
                store(dq, at, t, h, ZERO, keys, n, rows[DQ])
                store(dk, at, t, h, ZERO, keys, n, rows[DK])
                store(dv, i, t, h, lo, here, n, rows[DX])
                if fresh:
                    dS[:] = 0
        for each in range(group):
            keep(dS0, i, heads * group + each, lo, here, ends[each])
    alive(room)
