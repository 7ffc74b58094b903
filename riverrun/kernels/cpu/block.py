"""A block of up to 16 steps of a matrix memory, forward and backward, on a state that lies in the cache.

    S_t = diag(e^{g_t}) S_{t-1} + k_t x_tᵀ + a_t w_tᵀ        y_t = S_tᵀ q_t

    outer   x = v                                           no w;  with a bonus u, q reads S_{t-1} and v_t (u ⊙ k_t)·q_t
    delta   x_t = β_t (v_t - (diag(e^{g_t}) S_{t-1})ᵀ r_t)  no w, r = k
    dplr    x = v,  w_t = S_{t-1}ᵀ r_t                      r is the recurrence's b

With P_t the product of the block's decays up to t and s_t that of those after t, all steps read the block's first state
at once, (q P) S, steps see each other through C × C scores, what r reads is solved for row by row, and the state moves
once, S ← P S + (k s)ᵀ x + (a s)ᵀ w. Decays only ever multiply: nothing is divided, no exponent is positive, nothing can
overflow however strong the forgetting. Source: Yang et al. 2024 (arXiv:2406.06484) eq. 8-11, in products of decays.

The gradient of log-decays is a balance (Yang et al. 2023, arXiv:2312.06635, app. C): scaling everything after t by e^g
leaves y unchanged if what is read after t and what is written after t are scaled against each other, so that
dg_t = Σ_v S dS at the block's end + Σ_{s ≥ t} (q dq - k dk ...). Sums start afresh in every block.
"""

from __future__ import annotations

import numba
import numpy as np

from . import gemm
from .gemm import SIDE as C
from .threads import FASTMATH

OUTER, DELTA, DPLR = 0, 1, 2

# rows[...] (C, width), one row a step
(Q, K, R, A, V, Y, DECAY, PREFIX, SUFFIX, QS, KS, RS, AS, X, ERROR, DX, DW, DR, DQ, DK, DRK, DA, TAIL) = (
    range(23)
)
W = ERROR  # what dplr removes; delta has errors before β in its place
ROWS = 23
# columns[...] (width, C), one column a step
KT, AT, XT, WT, YT, RT, OUT = range(7)
COLUMNS = 7
# squares[...] (C, C): who reads what from whom, and gradients of the same
QK, RK, QA, RA, DQK, DRKK, DQA, DRA, SEEN, BEFORE = range(10)
SQUARES = 10

small = numba.njit(cache=True, error_model="numpy", fastmath=FASTMATH, nogil=True)


@small
def up4(n):
    return (n + 3) // 4 * 4


@small
def decays(mode, bonus, n, wide, rows, squares, by_key):
    """Products of decays, the scaled rows that meet the state, and for one decay a head who sees whom how well."""
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
def scores_by_key(q, r, keys, decay, n, wide, late, out_q, out_r, both, bonus):
    """out[i, j] = Σ_k x_ik key_jk Π decay: the keys (wide, C) decay as i moves on."""
    one = decay.dtype.type(1)
    for i in range(n):
        out_q[i, :] = 0
        out_r[i, :] = 0
        for k in range(wide):
            d = decay[i, k]
            if bonus:
                for j in range(C):
                    out_q[i, j] += q[i, k] * keys[k, j]
            if both and late:
                for j in range(C):
                    out_r[i, j] += r[i, k] * keys[k, j]
            for j in range(C):
                keys[k, j] *= d if j < i else one
            if not bonus:
                for j in range(C):
                    out_q[i, j] += q[i, k] * keys[k, j]
            if both and not late:
                for j in range(C):
                    out_r[i, j] += r[i, k] * keys[k, j]


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
def scores(mode, bonus, n, wide, rows, columns, squares, by_key, u):
    """The lower triangular squares QK, RK, QA, RA."""
    m = up4(n)
    late = mode == DPLR
    gemm.transpose(columns[KT], rows[K], wide)
    if late:
        gemm.transpose(columns[AT], rows[A], wide)
    if by_key:
        scores_by_key(
            rows[Q],
            rows[R],
            columns[KT],
            rows[DECAY],
            n,
            wide,
            late,
            squares[QK],
            squares[RK],
            mode > 0,
            bonus,
        )
        if late:
            scores_by_key(
                rows[Q],
                rows[R],
                columns[AT],
                rows[DECAY],
                n,
                wide,
                True,
                squares[QA],
                squares[RA],
                True,
                False,
            )
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
            own = u[0] * 0
            for k in range(u.shape[0]):
                own += rows[Q, i, k] * u[k] * rows[K, i, k]
            squares[QK, i, i] = own


@small
def solve(mode, n, wide, broad, rows, squares, beta, S):
    """What is written: X for delta (and the error before β), W for dplr."""
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
                x[i, v] = beta[i, 0] * error[i, v]
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
    m = up4(n)
    gemm.put(rows[Y], rows[QS], S, m, broad, wide)
    gemm.add(rows[Y], squares[QK], rows[X if mode == DELTA else V], m, broad, n)
    if mode == DPLR:
        gemm.add(rows[Y], squares[QA], rows[W], m, broad, n)


@small
def write(mode, n, wide, broad, rows, S):
    """The state moves to the block's end."""
    gemm.scale_add_turned(S, rows[PREFIX, n - 1], rows[KS], rows[X if mode == DELTA else V], wide, broad, n)
    if mode == DPLR:
        gemm.add_turned(S, rows[AS], rows[W], wide, broad, n)


@small
def solve_back(mode, n, wide, broad, rows, squares, beta, dbeta, dS):
    """Gradients of what is written, DX (then of v), and of what r reads, DR. rows[Y] holds dy."""
    m = up4(n)
    dx, dr = rows[DX], rows[DR]
    gemm.put(dx, rows[KS], dS, m, broad, wide)
    gemm.add_turned(dx, squares[QK], rows[Y], m, broad, n)
    if mode == DELTA:
        for i in range(n - 1, -1, -1):
            for j in range(i + 1, n):
                weight = squares[RK, j, i]
                for v in range(broad):
                    dx[i, v] -= weight * dx[j, v]
            total = dx[0, 0] * 0
            for v in range(broad):
                total += dx[i, v] * rows[ERROR, i, v]
            dbeta[i, 0] = total
            for v in range(broad):
                dx[i, v] *= beta[i, 0]
                dr[i, v] = -dx[i, v]
    elif mode == DPLR:
        gemm.put(dr, rows[AS], dS, m, broad, wide)
        gemm.add_turned(dr, squares[QA], rows[Y], m, broad, n)
        for i in range(n - 1, -1, -1):
            for j in range(i + 1, n):
                weight = squares[RA, j, i]
                for v in range(broad):
                    dr[i, v] += weight * dr[j, v]
        gemm.add_turned(dx, squares[RK], dr, m, broad, n)


@small
def against(matrix, right, out, columns, wide, broad):
    """out (C, wide) = right (broad, C)ᵀ matrix (wide, broad)ᵀ"""
    gemm.put(columns[OUT], matrix, right, wide, C, broad)
    gemm.transpose_back(out, columns[OUT], wide)


@small
def through_state(mode, bonus, n, wide, broad, rows, columns, squares, S, dS):
    """Gradients that pass through the state: DQ, DRK, DK, DA, TAIL; squares of pairs; and dS moves to the block's start."""
    m = up4(n)
    late = mode == DPLR
    x = rows[X if mode == DELTA else V]
    gemm.transpose(columns[XT], x, broad)
    gemm.transpose(columns[YT], rows[Y], broad)
    gemm.put(squares[DQK], rows[Y], columns[XT], m, C, broad)
    against(S, columns[YT], rows[DQ], columns, wide, broad)
    against(dS, columns[XT], rows[DK], columns, wide, broad)
    if mode:
        gemm.transpose(columns[RT], rows[DR], broad)
        gemm.put(squares[DRKK], rows[DR], columns[XT], m, C, broad)
        against(S, columns[RT], rows[DRK], columns, wide, broad)
    if late:
        gemm.transpose(columns[WT], rows[W], broad)
        gemm.put(squares[DQA], rows[Y], columns[WT], m, C, broad)
        gemm.put(squares[DRA], rows[DR], columns[WT], m, C, broad)
        against(dS, columns[WT], rows[DA], columns, wide, broad)
    one = rows.dtype.type(1)
    prefix, suffix, tail = rows[PREFIX], rows[SUFFIX], rows[TAIL, 0]
    for k in range(wide):
        kept = 0 * one
        for v in range(broad):
            kept += S[k, v] * dS[k, v]
        tail[k] = prefix[n - 1, k] * kept
    for i in range(n):
        for k in range(wide):
            before = prefix[i - 1, k] if i else one
            tail[k] += rows[KS, i, k] * rows[DK, i, k]
            rows[DQ, i, k] *= before if bonus else prefix[i, k]
            rows[DK, i, k] *= suffix[i, k]
            if mode:
                rows[DRK, i, k] *= before if late else prefix[i, k]
            if late:
                tail[k] += rows[AS, i, k] * rows[DA, i, k]
                rows[DA, i, k] *= suffix[i, k]
    gemm.scale_add_turned(dS, prefix[n - 1], rows[QS], rows[Y], wide, broad, n)
    if mode:
        gemm.add_turned(dS, rows[RS], rows[DR], wide, broad, n)


@small
def pairs_by_head(square, seen, strict, x, keys, dx, dkeys, n, wide):
    """Gradients of x and keys through square[i, j] = seen[i, j] x_i·key_j."""
    m = up4(n)
    multiply(square, seen, n)
    mask(square, n, strict)
    gemm.add(dx, square, keys, m, wide, n)
    gemm.add_turned(dkeys, square, x, m, wide, n)


@small
def pairs_by_key(square, late, strict, x, keys, dx, dkeys, decay, moved, n, wide):
    """The same where each key has its own decay; `late` reads before the step's own decay. moved is overwritten."""
    mask(square, n, strict)
    for j in range(n):
        for k in range(wide):
            moved[j, k] = keys[j, k]
    for i in range(n):
        for j in range(i + 1):
            weight = square[i, j]
            for k in range(wide):
                key = moved[j, k]
                now = key * decay[i, k] if j < i else key
                moved[j, k] = now
                dx[i, k] += weight * (key if late else now)
    for i in range(n):
        for k in range(wide):
            moved[i, k] = x[i, k]
    for j in range(n - 1, -1, -1):
        for i in range(j, n):
            weight = square[i, j]
            last = i - 1 if late else i  # x_i meets key_j through the decays of steps j + 1 to `last`
            for k in range(wide):
                now = moved[i, k] * decay[j + 1, k] if j < last else moved[i, k]
                moved[i, k] = now
                dkeys[j, k] += weight * now


@small
def through_pairs(mode, bonus, n, wide, rows, squares, by_key):
    """Gradients between the steps of the block, added to DQ, DRK, DK and DA."""
    late = mode == DPLR
    if by_key:
        decay, moved = rows[DECAY], rows[QS]
        pairs_by_key(squares[DQK], bonus, bonus, rows[Q], rows[K], rows[DQ], rows[DK], decay, moved, n, wide)
        if mode:
            pairs_by_key(
                squares[DRKK], late, True, rows[R], rows[K], rows[DRK], rows[DK], decay, moved, n, wide
            )
        if late:
            pairs_by_key(
                squares[DQA], False, False, rows[Q], rows[A], rows[DQ], rows[DA], decay, moved, n, wide
            )
            pairs_by_key(
                squares[DRA], True, True, rows[R], rows[A], rows[DRK], rows[DA], decay, moved, n, wide
            )
        return
    seen, before = squares[SEEN], squares[BEFORE]
    pairs_by_head(
        squares[DQK], before if bonus else seen, bonus, rows[Q], rows[K], rows[DQ], rows[DK], n, wide
    )
    if mode:
        pairs_by_head(
            squares[DRKK], before if late else seen, True, rows[R], rows[K], rows[DRK], rows[DK], n, wide
        )
    if late:
        pairs_by_head(squares[DQA], seen, False, rows[Q], rows[A], rows[DQ], rows[DA], n, wide)
        pairs_by_head(squares[DRA], before, True, rows[R], rows[A], rows[DRK], rows[DA], n, wide)


@small
def decay_gradient(mode, bonus, n, K_, fresh, rows, dg):
    """dg (n, 1 or K) by the balance of reads and writes after each step."""
    balance = rows[TAIL, 0]
    for i in range(n - 1, -1, -1):
        for k in range(K_):
            balance[k] -= rows[K, i, k] * rows[DK, i, k]
            if not bonus:
                balance[k] += rows[Q, i, k] * rows[DQ, i, k]
            if mode == DELTA:
                balance[k] += rows[R, i, k] * rows[DRK, i, k]
            if mode == DPLR:
                balance[k] -= rows[A, i, k] * rows[DA, i, k]
        if fresh and i == 0:  # nothing was there to decay
            dg[0, :] = 0
        elif dg.shape[1] == 1:
            total = balance[0] * 0
            for k in range(K_):
                total += balance[k]
            dg[i, 0] = total
        else:
            for k in range(K_):
                dg[i, k] = balance[k]
        for k in range(K_):
            if bonus:
                balance[k] += rows[Q, i, k] * rows[DQ, i, k]
            if mode == DPLR:
                balance[k] += rows[R, i, k] * rows[DRK, i, k]


@small
def bonus_gradient(n, K_, rows, own, u, du):
    """Through y_i += (Σ_k q_i u k_i) v_i; own[i] = dy_i·v_i."""
    for i in range(n):
        for k in range(K_):
            q, key = rows[Q, i, k], rows[K, i, k]
            rows[DQ, i, k] += own[i] * u[k] * key
            rows[DK, i, k] += own[i] * u[k] * q
            du[k] += own[i] * q * key


@small
def aligned(shape, like):
    """Zeros in which every cache line starts an element."""
    size = 1
    for s in shape:
        size *= s
    room = np.zeros(size + 16, like.dtype)
    start = (-room.ctypes.data % 64) // room.itemsize
    return room[start : start + size].reshape(shape)
