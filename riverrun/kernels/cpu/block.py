"""A block of up to 16 steps of a matrix memory, on a state that lies in the cache.

    S_t = diag(e^{g_t}) S_{t-1} + k_t x_tᵀ + a_t w_tᵀ        y_t = S_tᵀ q_t

    outer   x = v                                           no w; a bonus u: see below
    delta   x_t = β_t (v_t - (diag(e^{g_t}) S_{t-1})ᵀ r_t)  no w, r = k
    dplr    x = v,  w_t = S_{t-1}ᵀ r_t                      r is the recurrence's b
    bonus   q reads S_{t-1} and, of its own step, (q_t · u ⊙ k_t) v_t

With P_t the product of the block's decays up to t and s_t that of those after t, all steps read the block's
first state at once, (q P) S, steps see each other through C × C scores, what r reads is solved for row by
row, and the state moves once, S ← P S + (k s)ᵀ x + (a s)ᵀ w. Decays only ever multiply: nothing is divided,
no exponent is positive, nothing can overflow however strong the forgetting. Source: Yang et al. 2024
(arXiv:2406.06484) eq. 8-11, in products of decays.
"""

from __future__ import annotations

import numpy as np

from . import gemm
from .gemm import SIDE as C
from .gemm import apart
from .memory import MINUS_ONE, ONE, ZERO, small

OUTER, DELTA, DPLR = 0, 1, 2

# rows[...] (C, width), one row a step
Q, K, R, A, V, Y, DECAY, PREFIX, SUFFIX, QS, KS, RS, AS, X, ERROR = range(15)
DX, DR, DQ, DK, DRK, DA, TAIL, DG, ONES = range(15, 24)
W = ERROR  # what dplr removes; delta has errors before β in its place
ROWS = 24
# columns[...] (width, C), one column a step
KT, AT, XT, WT, YT, RT, OUT = range(7)
COLUMNS = 7
# squares[...] (C, C): who reads what from whom, and gradients of the same
QK, RK, QA, RA, DQK, DRKK, DQA, DRA = range(8)
SQUARES = 8


@small
def up4(n):
    return (n + 3) // 4 * 4


@small
def decays(mode, bonus, n, wide, rows):
    """Products of decays, and scaled rows that meet the state."""
    apart()
    one = rows.dtype.type(1)
    late = mode == DPLR  # r reads before the step's own decay
    decay, prefix, suffix = rows[DECAY], rows[PREFIX], rows[SUFFIX]
    for k in range(wide):
        rows[ONES, 0, k] = one
    for i in range(n):
        for k in range(wide):
            before = prefix[i - 1, k] if i else one
            now = before * decay[i, k]
            prefix[i, k] = now
            rows[QS, i, k] = rows[Q, i, k] * (before if bonus else now)
            if mode:
                rows[RS, i, k] = rows[R, i, k] * (before if late else now)
    for i in range(n - 1, -1, -1):
        for k in range(wide):
            after = suffix[i + 1, k] * decay[i + 1, k] if i < n - 1 else one
            suffix[i, k] = after
            rows[KS, i, k] = rows[K, i, k] * after
            if late:
                rows[AS, i, k] = rows[A, i, k] * after


@small
def scale(out, x, by, width):
    for k in range(width):
        out[k] = x[k] * by[k]


@small
def mask(square, n, strict, sign):
    """± the lower triangle; the rest becomes zero, whatever stood there."""
    apart()
    factor = square.dtype.type(sign)
    for i in range(n):
        row, last = square[i], i - 1 if strict else i
        for j in range(C):
            row[j] = factor * row[j] if j <= last else 0 * factor


@small
def scores(mode, bonus, n, wide, rows, columns, squares, u, h):
    """The lower triangular squares QK, RK (-RK for delta), QA, RA."""
    apart()
    late, r, decay = mode == DPLR, rows[R if mode else Q], rows[DECAY]
    gemm.transpose(columns[KT], rows[K], wide)
    gemm.read_decaying(squares[QK], squares[RK], columns[KT], decay, rows[Q], r, n, wide, bonus, late)
    mask(squares[QK], n, np.int64(bonus), ONE)
    if mode:
        mask(squares[RK], n, ONE, MINUS_ONE if mode == DELTA else ONE)
    if late:
        gemm.transpose(columns[AT], rows[A], wide)
        gemm.read_decaying(squares[QA], squares[RA], columns[AT], decay, rows[Q], r, n, wide, False, True)
        mask(squares[QA], n, ZERO, ONE)
        mask(squares[RA], n, ONE, ONE)
    for i in range(n if bonus else 0):
        q, key, weight = rows[Q, i], rows[K, i], u[h]
        own = 0 * q[0]
        for k in range(weight.shape[0]):
            own += q[k] * weight[k] * key[k]
        squares[QK, i, i] = own


@small
def solve(mode, n, wide, broad, rows, squares, beta, b, t, h, S):
    """What is written: X for delta (and the error before β), W for dplr. Row by row, but what four rows
    take from those before them is a product."""
    apart()
    m, delta = up4(n), mode == DELTA
    w, x = rows[W], rows[X if delta else W]  # what is solved for is x; it makes w
    square = squares[RK if delta else RA]
    gemm.put(w, rows[RS], S, m, broad, wide)
    if delta:
        for i in range(n):
            error, value = w[i], rows[V, i]
            for v in range(broad):
                error[v] = value[v] - error[v]
    else:
        gemm.add(w, squares[RK], rows[V], m, broad, n)
    for lo in range(0, n, 4):
        if lo:
            gemm.add(w[lo:], square[lo:], x, 4, broad, lo)
        for i in range(lo, min(lo + 4, n)):
            to, own = w[i], x[i]
            for j in range(lo, i):
                weight, row = square[i, j], x[j]
                for v in range(broad):
                    to[v] += weight * row[v]
            if delta:
                for v in range(broad):
                    own[v] = beta[b, t + i, h, 0] * to[v]


@small
def read(mode, n, wide, broad, rows, squares, S):
    """Y for every step of the block, from the state before it."""
    apart()
    m = up4(n)
    gemm.put(rows[Y], rows[QS], S, m, broad, wide)
    gemm.add(rows[Y], squares[QK], rows[X if mode == DELTA else V], m, broad, n)
    if mode == DPLR:
        gemm.add(rows[Y], squares[QA], rows[W], m, broad, n)


@small
def write(mode, n, wide, broad, rows, S, old):
    """S is the state `old` at the block's end."""
    apart()
    x = rows[X if mode == DELTA else V]
    gemm.scale_add_turned(S, old, rows[PREFIX, n - 1], rows[KS], x, wide, broad, n)
    if mode == DPLR:
        gemm.add_turned(S, rows[AS], rows[W], wide, broad, n)
