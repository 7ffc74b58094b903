"""Gradients of a block of a matrix memory (see block.py), from those of its y and of the state at its end.

The gradient of log-decays is a balance (Yang et al. 2023, arXiv:2312.06635, app. C): scaling everything
after t by e^g leaves y unchanged if what is read after t and what is written after t are scaled against each
other, so that dg_t = Σ_v S dS at the block's end + Σ_{s ≥ t} (q dq - k dk ...). Sums start afresh in every
block.
"""

from __future__ import annotations

import numpy as np

from . import gemm
from .block import (
    AS,
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
    ONES,
    OUT,
    PREFIX,
    QA,
    QK,
    QS,
    RA,
    RK,
    RS,
    RT,
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
    scale,
    up4,
)
from .gemm import SIDE as C
from .gemm import apart
from .memory import ONE, ZERO, dot, small


@small
def solve_back(mode, n, wide, broad, rows, squares, beta, dbeta, dS, b, at, t, h):
    """Gradients of what is written, DX (then of v), and of what r reads, DR. rows[Y] holds dy."""
    apart()
    m, delta = up4(n), mode == DELTA
    dx, dr = rows[DX], rows[DR]
    solved, square = rows[DX if delta else DR], squares[RK if delta else RA]
    gemm.put(dx, rows[KS], dS, m, broad, wide)
    gemm.add_turned(dx, squares[QK], rows[Y], m, broad, n)
    if not delta:
        gemm.put(dr, rows[AS], dS, m, broad, wide)
        gemm.add_turned(dr, squares[QA], rows[Y], m, broad, n)
    for lo in range((n - 1) // 4 * 4, -1, -4):
        hi = min(lo + 4, n)
        if hi < n:
            gemm.add_turned(solved[lo:], square[hi:, lo:], solved[hi:], 4, broad, n - hi)
        for i in range(hi - 1, lo - 1, -1):
            to, own = solved[i], dr[i]
            for j in range(i + 1, hi):
                weight, row = square[j, i], solved[j]
                for v in range(broad):
                    to[v] += weight * row[v]
            if delta:
                dbeta[at, t + i, h, 0] = dot(to, rows[ERROR, i], broad)
                for v in range(broad):
                    to[v] *= beta[b, t + i, h, 0]
                    own[v] = -to[v]
    if not delta:
        gemm.add_turned(dx, squares[RK], dr, m, broad, n)


@small
def join(out, x, y, width):
    for k in range(width):
        out[k] += x[k] * y[k]


@small
def part(out, x, y, width):
    for k in range(width):
        out[k] -= x[k] * y[k]


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
    prefix, tail = rows[PREFIX], rows[TAIL, 0]
    for k in range(wide):
        tail[k] = prefix[n - 1, k] * dot(S[k], dS[k], broad)
    for i in range(n):
        before, now = prefix[i - 1] if i else rows[ONES, 0], prefix[i]
        to_k, to_a = rows[DK, i], rows[DA, i]
        join(tail, rows[KS, i], to_k, wide)
        if late:
            join(tail, rows[AS, i], to_a, wide)
            scale(to_a, to_a, rows[SUFFIX, i], wide)
        scale(to_k, to_k, rows[SUFFIX, i], wide)
        scale(rows[DQ, i], rows[DQ, i], before if bonus else now, wide)
        if mode:
            scale(rows[DRK, i], rows[DRK, i], before if late else now, wide)
    gemm.scale_add_turned(dS, dS, prefix[n - 1], rows[QS], rows[Y], wide, broad, n)
    if mode:
        gemm.add_turned(dS, rows[RS], rows[DR], wide, broad, n)


@small
def pairs(square, late, strict, x, keys, dx, dkeys, decay, moved, n, wide):
    """Gradients of x and keys through square[i, j] = Σ_k x_ik keys_jk Π_{j < s ≤ i} decay_sk, up to i - 1
    only where x is `late`: it reads before the step's own decay. moved is scratch."""
    apart()
    mask(square, n, strict, ONE)
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
def decay_gradient(mode, bonus, n, wide, fresh, rows, by_key):
    """DG (in its first column for one decay a head) by the balance of reads and writes after each step."""
    apart()
    balance = rows[TAIL, 0]
    for i in range(n - 1, -1, -1):
        dg = rows[DG, i]
        part(balance, rows[K, i], rows[DK, i], wide)
        if not bonus:
            join(balance, rows[Q, i], rows[DQ, i], wide)
        if mode == DELTA:
            join(balance, rows[R, i], rows[DRK, i], wide)
        if mode == DPLR:
            part(balance, rows[A, i], rows[DA, i], wide)
        if fresh and i == 0:  # nothing was there to decay
            dg[:] = 0
        elif by_key:
            scale(dg, balance, rows[ONES, 0], wide)
        else:
            dg[0] = dot(balance, rows[ONES, 0], wide)
        if bonus:
            join(balance, rows[Q, i], rows[DQ, i], wide)
        if mode == DPLR:
            join(balance, rows[R, i], rows[DRK, i], wide)


@small
def bonus_gradient(n, K_, rows, own, u, du, h, at):
    """Through y_i += (Σ_k q_i u k_i) v_i; own[i] = dy_i·v_i."""
    apart()
    weight, total = u[h], du[at, h]
    for i in range(n):
        q, key, dq, dk, factor = rows[Q, i], rows[K, i], rows[DQ, i], rows[DK, i], own[i]
        for k in range(K_):
            dq[k] += factor * weight[k] * key[k]
            dk[k] += factor * weight[k] * q[k]
            total[k] += factor * q[k] * key[k]


@small
def gradients(
    mode, D, fresh, n, K_, wide, broad, rows, columns, squares, beta, dbeta, u, du, S, dS, b, at, t, h
):
    """A prepared and solved block's gradients, from rows[Y] = dy and dS; `fresh`: S is a cleared state."""
    apart()
    bonus = u.shape[1] > 0
    if mode:
        solve_back(mode, n, wide, broad, rows, squares, beta, dbeta, dS, b, at, t, h)
    else:
        gemm.put(rows[DX], rows[KS], dS, up4(n), broad, wide)
        gemm.add_turned(rows[DX], squares[QK], rows[Y], up4(n), broad, n)
    through_state(mode, bonus, n, wide, broad, rows, columns, squares, S, dS)
    own = rows[TAIL, 1]
    for i in range(n):
        own[i] = squares[DQK, i, i]
    early, late, decay, moved = np.int64(bonus), mode == DPLR, rows[DECAY], rows[QS]
    q, r, key, a, dq, dr, dk, da = (
        rows[Q], rows[R], rows[K], rows[A], rows[DQ], rows[DRK], rows[DK], rows[DA]
    )  # fmt: skip
    pairs(squares[DQK], early, early, q, key, dq, dk, decay, moved, n, wide)
    if mode:
        pairs(squares[DRKK], np.int64(late), ONE, r, key, dr, dk, decay, moved, n, wide)
    if late:
        pairs(squares[DQA], ZERO, ZERO, q, a, dq, da, decay, moved, n, wide)
        pairs(squares[DRA], ONE, ONE, r, a, dr, da, decay, moved, n, wide)
    if D:
        decay_gradient(mode, bonus, n, wide, fresh, rows, D > 1)
    if bonus:
        bonus_gradient(n, K_, rows, own, u, du, h, at)
    if mode == DELTA:
        for i in range(n):
            join(rows[DK, i], rows[DRK, i], rows[ONES, 0], wide)
