"""A block of outer, delta or mlstm with one decay for a head, or none: all that decays do is scale rows.

    S_t = e^{g_t} S_{t-1} + k_t x_tᵀ        y_t = S_tᵀ q_t
    outer  x = v        delta  x_t = β_t (v_t - (e^{g_t} S_{t-1})ᵀ k_t)
    mlstm  as outer, with w_j M_ij for M_ij and w_i s_i for s_i; normaliser.py adds the rest

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
from .memory import MINUS_ONE, ONE, ZERO, dot, small

# rows[...] (C, width), one row a step; XS, YS, RS are s X, P dY, P R; DR is the gradient of k as it reads
Q, K, V, X, E, XS, Y, YS, RS, R, DQ, DK, DX, DR = range(14)
ROWS = 14
# columns[...] (width, C), one column a step
TURNED, OUT = range(2)
COLUMNS = 2
# squares[...] (C, C)
QK, KK, DQK, DKK, SEEN = range(5)
SQUARES = 5
# vectors[...] (C or more): P, s, β or w, P_n for every key, log-decays and sums; of mlstm also m, d and then
# dd, P dd, and what reaches m
P, AFTER, BETA, WHOLE, OWN, TOP, SUM, PSUM, FREE = range(9)
VECTORS = 9
TWO = np.int64(2)


@small
def scratch(room, wide, broad):
    """Rows, columns, squares and vectors for keys of width `wide` and values of width `broad`. Each has a
    row to spare: blocks a whole page apart would wait for each other's stores."""
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
    return ROWS * C * width + COLUMNS * width * C + SQUARES * C * C + VECTORS * width


@small
def given(g, beta, i, t, h, n, vectors):
    """Log-decays and β of outer and delta."""
    apart()
    own = vectors[OWN]
    one = own.dtype.type(1)
    for s in range(n):
        own[s] = g[i, t + s, h, 0] if g.shape[3] else 0 * one
        vectors[BETA, s] = beta[i, t + s, h, 0] if beta.shape[3] else one


@small
def decays(n, squares, vectors):
    """P, s, P_n and M from log-decays."""
    apart()
    through, after, own = vectors[P], vectors[AFTER], vectors[OWN]
    one = own.dtype.type(1)
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
def settled(delta, g, beta, squares, vectors):
    """Whether all blocks have the same decays, 1, and no β: these are set now."""
    if beta is not None and not delta and g.shape[3] == 0:
        given(g, beta, ZERO, ZERO, ZERO, C, vectors)
        decays(C, squares, vectors)
        return True
    return False


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
def rank_one(out, left, right, width, n):
    """out += left rightᵀ"""
    apart()
    for i in range(n):
        to, factor = out[i], left[i]
        for c in range(width):
            to[c] += factor * right[c]


@small
def gather(out, whole, x, weights, rows, width, n):
    """out = whole x + Σ_i weights_i rows_i"""
    apart()
    for c in range(width):
        out[c] = whole[c] * x[c]
    for i in range(n):
        row, factor = rows[i], weights[i]
        for c in range(width):
            out[c] += factor * row[c]


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


@small
def against(out, matrix, x, columns, wide, broad, ahead, count):
    """out (C, wide) = x (C, broad) matrix (wide, broad)ᵀ"""
    gemm.transpose(columns[TURNED], x, broad)
    gemm.put_asking(columns[OUT], matrix, columns[TURNED], wide, C, broad, ahead, count)
    gemm.transpose_back(out, columns[OUT], wide)


@small
def gradients(
    delta, fresh, n, wide, broad, rows, columns, squares, vectors, S, dS, dg, dbeta, at, t, h, ahead,
    norm, dnorm, dlog,
):  # fmt: skip
    """A loaded block's gradients, from rows[Y] = dy; X and E of delta and dd of mlstm are there.

    ahead: eight places in memory that will be needed next (see `memory.ask`).
    norm, dnorm, dlog: n of mlstm, its gradient and that of log w. None for the others, as dbeta is for mlstm.
    """
    apart()
    m, x = (n + 3) // 4 * 4, rows[X] if delta else rows[V]
    fading = dg.shape[3] > 0
    xs, ys = rows[XS] if fading else x, rows[YS] if fading else rows[Y]
    scores(delta, n, wide, rows, columns, squares)
    gemm.put_asking(rows[DX], rows[K], dS, m, broad, wide, ahead, TWO)
    gemm.scale_add_turned(rows[DX], rows[DX], vectors[AFTER], squares[QK], rows[Y], m, broad, n)
    if dbeta is not None and delta:
        solve_back(n, broad, rows, squares, vectors)
        for i in range(n):
            dbeta[at, t + i, h, 0] = vectors[OWN, i]
    gemm.transpose(columns[TURNED], x, broad)
    gemm.put(squares[DQK], rows[Y], columns[TURNED], m, C, broad)
    if norm is not None:
        for i in range(n):
            square = squares[DQK, i]
            for j in range(C):
                square[j] += vectors[SUM, i]
    weigh(squares[DQK], squares, n, ZERO, ONE)
    if fading:
        scale(ys, rows[Y], vectors[P], broad, n)
        scale(xs, x, vectors[AFTER], broad, n)
    if dbeta is not None and delta:
        gemm.put(squares[DKK], rows[R], columns[TURNED], m, C, broad)
        weigh(squares[DKK], squares, n, ONE, ONE)
        scale(rows[RS], rows[R], vectors[P], broad, n)
        against(rows[DR], S, rows[RS], columns, wide, broad, ahead, ZERO)
        gemm.add(rows[DR], squares[DKK], rows[K], m, wide, n)
    against(rows[DQ], S, ys, columns, wide, broad, ahead[2:], TWO)
    against(rows[DK], dS, xs, columns, wide, broad, ahead[4:], TWO)
    if norm is not None:
        rank_one(rows[DQ], vectors[PSUM], norm, wide, n)
        rank_one(rows[DK], vectors[AFTER], dnorm, wide, n)
    total = 0 * dS[0, 0]
    if fading:
        for key in range(wide):
            total += dot(S[key], dS[key], broad)
        if norm is not None:
            total += dot(norm, dnorm, wide)
        total *= vectors[WHOLE, 0]
        for i in range(n):
            total += dot(rows[K, i], rows[DK, i], wide)
    gemm.add(rows[DQ], squares[DQK], rows[K], m, wide, n)
    gemm.add_turned(rows[DK], squares[DQK], rows[Q], m, wide, n)
    gemm.scale_add_turned_asking(dS, dS, vectors[WHOLE], rows[Q], ys, wide, broad, n, ahead[6:], TWO)
    if dbeta is not None and delta:
        gemm.add_turned(rows[DK], squares[DKK], rows[K], m, wide, n)
        gemm.add_turned(dS, rows[K], rows[RS], wide, broad, n)
    if norm is not None:
        gather(dnorm, vectors[WHOLE], dnorm, vectors[PSUM], rows[Q], wide, n)
    if fading:
        for i in range(n - 1, -1, -1):
            write = dot(rows[K, i], rows[DK, i], wide)
            total += dot(rows[Q, i], rows[DQ, i], wide) - write
            if norm is not None:
                dlog[at, t + i, h, 0] = write
            if dbeta is not None and delta:
                total += dot(rows[K, i], rows[DR, i], wide)
            dg[at, t + i, h, 0] = 0 if fresh and i == 0 else total  # nothing was there to decay
    if dbeta is not None and delta:
        for i in range(n):
            to, other = rows[DK, i], rows[DR, i]
            for key in range(wide):
                to[key] += other[key]
