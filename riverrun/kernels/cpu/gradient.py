"""Gradients of a block of a matrix memory (see block.py), from those of its y and of the state at its end.

The gradient of log-decays is a balance (Yang et al. 2023, arXiv:2312.06635, app. C): scaling everything
after t by e^g leaves y unchanged if what is read after t and what is written after t are scaled against each
other, so that dg_t = Σ_v S dS at the block's end + Σ_{s ≥ t} (q dq - k dk ...). Sums start afresh in every
block.
"""

from __future__ import annotations

from . import gemm
from .block import (  # fmt: skip
    AS,
    BEFORE,
    DA,
    DECAY,
    DELTA,
    DG,
    DK,
    DPLR,
    DQ,
    DQA,
    DQK,
    DR,
    DRA,
    DRK,
    DRKK,
    DX,
    ERROR,
    KS,
    OUT,
    PREFIX,
    QA,
    QK,
    QS,
    RA,
    RK,
    RS,
    RT,
    SEEN,
    SUFFIX,
    TAIL,
    WT,
    XT,
    YT,
    A,
    K,
    Q,
    R,
    V,
    W,
    X,
    Y,
    mask,
    multiply,
    small,
    up4,
)
from .gemm import SIDE as C
from .gemm import apart


@small
def solve_back(mode, n, wide, broad, rows, squares, beta, dbeta, dS, b, at, t, h):
    """Gradients of what is written, DX (then of v), and of what r reads, DR. rows[Y] holds dy."""
    apart()
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
            dbeta[at, t + i, h, 0] = total
            for v in range(broad):
                dx[i, v] *= beta[b, t + i, h, 0]
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
    """Gradients through the state: DQ, DRK, DK, DA, TAIL; squares of pairs; dS moves to the block's start."""
    apart()
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
    """The same with a decay for each key; `late` reads before the step's own decay. moved is scratch."""
    apart()
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
    apart()
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
def decay_gradient(mode, bonus, n, K_, fresh, rows, by_key):
    """DG (in its first column for one decay a head) by the balance of reads and writes after each step."""
    apart()
    balance, dg = rows[TAIL, 0], rows[DG]
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
        elif not by_key:
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
def bonus_gradient(n, K_, rows, own, u, du, h, at):
    """Through y_i += (Σ_k q_i u k_i) v_i; own[i] = dy_i·v_i."""
    apart()
    for i in range(n):
        for k in range(K_):
            q, key = rows[Q, i, k], rows[K, i, k]
            rows[DQ, i, k] += own[i] * u[h, k] * key
            rows[DK, i, k] += own[i] * u[h, k] * q
            du[at, h, k] += own[i] * q * key


@small
def gradients(
    mode, D, fresh, n, K_, wide, broad, rows, columns, squares, beta, dbeta, u, du, S, dS, b, at, t, h
):
    """A prepared and solved block's gradients, from rows[Y] = dy and dS; `fresh`: S is a cleared state."""
    apart()
    bonus, by_key = u.shape[1] > 0, D > 1
    solve_back(mode, n, wide, broad, rows, squares, beta, dbeta, dS, b, at, t, h)
    through_state(mode, bonus, n, wide, broad, rows, columns, squares, S, dS)
    own = rows[TAIL, 1]
    for i in range(n):
        own[i] = squares[DQK, i, i]
    through_pairs(mode, bonus, n, wide, rows, squares, by_key)
    if D:
        decay_gradient(mode, bonus, n, K_, fresh, rows, by_key)
    if bonus:
        bonus_gradient(n, K_, rows, own, u, du, h, at)
    if mode == DELTA:
        for i in range(n):
            for k in range(wide):
                rows[DK, i, k] += rows[DRK, i, k]
