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

import numba
import numpy as np

from . import gemm
from .gemm import SIDE as C
from .gemm import apart
from .threads import FASTMATH

OUTER, DELTA, DPLR = 0, 1, 2

# rows[...] (C, width), one row a step
Q, K, R, A, V, Y, DECAY, PREFIX, SUFFIX, QS, KS, RS, AS, X, ERROR = range(15)
DX, DR, DQ, DK, DRK, DA, TAIL, DG = range(15, 23)
W = ERROR  # what dplr removes; delta has errors before β in its place
ROWS = 23
# columns[...] (width, C), one column a step
KT, AT, XT, WT, YT, RT, OUT = range(7)
COLUMNS = 7
# squares[...] (C, C): who reads what from whom, and gradients of the same
QK, RK, QA, RA, DQK, DRKK, DQA, DRA, SEEN, BEFORE = range(10)
SQUARES = 10

small = numba.njit(
    cache=True,
    error_model="numpy",
    fastmath=FASTMATH,
    nogil=True,
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
)


@small
def up4(n):
    return (n + 3) // 4 * 4


@small
def decays(mode, bonus, n, wide, rows, squares, by_key):
    """Products of decays, scaled rows that meet the state, and for one decay a head how well steps see."""
    apart()
    one = rows.dtype.type(1)
    late = mode == DPLR  # r reads before the step's own decay
    decay, prefix, suffix = rows[DECAY], rows[PREFIX], rows[SUFFIX]
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
    if not by_key:
        seen, before_ = squares[SEEN], squares[BEFORE]
        for i in range(n):
            for j in range(C):
                earlier = seen[i - 1, j] if i else 0 * one
                before_[i, j] = earlier
                seen[i, j] = earlier * decay[i, 0] if j != i else one


@small
def mask(square, n, strict):
    for i in range(n):
        for j in range(i if strict else i + 1, C):
            square[i, j] = 0


@small
def multiply(square, other, n):
    for i in range(n):
        for j in range(C):
            square[i, j] *= other[i, j]


@small
def scores(mode, bonus, n, wide, rows, columns, squares, by_key, u, h):
    """The lower triangular squares QK, RK, QA, RA."""
    apart()
    m = up4(n)
    late = mode == DPLR
    gemm.transpose(columns[KT], rows[K], wide)
    if late:
        gemm.transpose(columns[AT], rows[A], wide)
    if by_key:
        r, decay = rows[R if mode else Q], rows[DECAY]
        gemm.read_decaying(squares[QK], squares[RK], columns[KT], decay, rows[Q], r, n, wide, bonus, late)
        if late:
            gemm.read_decaying(squares[QA], squares[RA], columns[AT], decay, rows[Q], r, n, wide, False, True)
    else:
        gemm.put(squares[QK], rows[Q], columns[KT], m, C, wide)
        multiply(squares[QK], squares[BEFORE if bonus else SEEN], n)
        if mode:
            gemm.put(squares[RK], rows[R], columns[KT], m, C, wide)
            multiply(squares[RK], squares[BEFORE if late else SEEN], n)
        if late:
            gemm.put(squares[QA], rows[Q], columns[AT], m, C, wide)
            multiply(squares[QA], squares[SEEN], n)
            gemm.put(squares[RA], rows[R], columns[AT], m, C, wide)
            multiply(squares[RA], squares[BEFORE], n)
    mask(squares[QK], n, bonus)
    if mode:
        mask(squares[RK], n, True)
    if late:
        mask(squares[QA], n, False)
        mask(squares[RA], n, True)
    if bonus:
        for i in range(n):
            own = u[0, 0] * 0
            for k in range(u.shape[1]):
                own += rows[Q, i, k] * u[h, k] * rows[K, i, k]
            squares[QK, i, i] = own


@small
def solve(mode, n, wide, broad, rows, squares, beta, b, t, h, S):
    """What is written: X for delta (and the error before β), W for dplr."""
    apart()
    m = up4(n)
    if mode == DELTA:
        error, x = rows[ERROR], rows[X]
        gemm.put(error, rows[RS], S, m, broad, wide)
        for i in range(n):
            for v in range(broad):
                error[i, v] = rows[V, i, v] - error[i, v]
            for j in range(i):
                weight = squares[RK, i, j]
                for v in range(broad):
                    error[i, v] -= weight * x[j, v]
            for v in range(broad):
                x[i, v] = beta[b, t + i, h, 0] * error[i, v]
    elif mode == DPLR:
        w = rows[W]
        gemm.put(w, rows[RS], S, m, broad, wide)
        gemm.add(w, squares[RK], rows[V], m, broad, n)
        for i in range(n):
            for j in range(i):
                weight = squares[RA, i, j]
                for v in range(broad):
                    w[i, v] += weight * w[j, v]


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
def write(mode, n, wide, broad, rows, S):
    """The state moves to the block's end."""
    apart()
    gemm.scale_add_turned(S, rows[PREFIX, n - 1], rows[KS], rows[X if mode == DELTA else V], wide, broad, n)
    if mode == DPLR:
        gemm.add_turned(S, rows[AS], rows[W], wide, broad, n)


@small
def aligned(size, like):
    """Zeros that start where a cache line does."""
    apart()
    room = np.zeros(size + 16, like.dtype)
    start = (-room.ctypes.data % 64) // room.itemsize
    return room[start : start + size]
