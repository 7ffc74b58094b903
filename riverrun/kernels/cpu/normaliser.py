"""What mlstm adds to a block of outer: gates, and a normaliser that is read and written as S is.

    m_t = max(f_t + m_{t-1}, i_t)    g_t = f_t + m_{t-1} - m_t    w_t = e^{i_t - m_t}
    n_t = e^{g_t} n_{t-1} + w_t k_t        d_t = n_t · q_t        y_t = S_tᵀ q_t / max(|d_t|, e^{-m_t})

n is what S would hold for one more column of v, of ones: in a block (see head.py)

    d = P (Q n) + A 1        n ← P_n n + Kᵀ s

and backwards, with D and what dQ, dK and dg are made of counting that column too,

    dd_t = - (y_t · dy_t) / d_t where |d_t| is the maximum        dS_tᵀ q_t = dy_t / max(|d_t|, e^{-m_t})
    dn ← P_n dn + Qᵀ (P dd)        d log w_t = k_t · dk_t        df = dg        di = d log w

m only rescales: S e^m and n e^m do not depend on it. So no m has a gradient of its own but the last, where
the state is used, and those of which e^{-m} is cut off at e^60. These go back along whichever of f + m and i
was the maximum, half of them to each where both are equal.
Source: Beck et al. 2024 (xLSTM, arXiv:2405.04517) eq. 15-27.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import head
from .elementary import exp
from .gemm import SIDE as C
from .gemm import apart
from .head import AFTER, BETA, FREE, OWN, PSUM, QK, SEEN, SUM, TOP, WHOLE, E, K, P, Q, Y
from .memory import ZERO, dot, fetch, small


class Norm(NamedTuple):
    """Arrays of the forward. n comes as the state of one value column that it is, (B, H, 1, K)."""

    i: np.ndarray
    n: np.ndarray  # before the first step
    m: np.ndarray  # (B, H)
    n_last: np.ndarray  # to be filled, as what follows
    m_last: np.ndarray
    saved: np.ndarray  # n every SEGMENT steps, (B, H segments, 1, K)
    tops: np.ndarray  # every m, (B, T, H)
    sums: np.ndarray  # every d


class Back(NamedTuple):
    """What the backward takes and, in the last two, gives besides."""

    y: np.ndarray
    S: np.ndarray  # the last one
    dn: np.ndarray  # gradients of the last n and m
    dm: np.ndarray
    dn_first: np.ndarray  # (parts B, H, 1, K)
    di: np.ndarray  # (parts B, T, H, 1)


@small
def gate(f, i, b, t, h, m):
    """g_t, log w_t and m_t, from the m before."""
    kept, new = f[b, t, h, 0] + m, i[b, t, h, 0]
    m = new if kept < new else kept
    return kept - m, new - m, m


@small
def gates(f, i, b, t, h, n, m, squares, vectors):
    """Decays, w s, and M with columns times w; running maxima. m is the one before."""
    apart()
    own, weight, top = vectors[OWN], vectors[BETA], vectors[TOP]
    for s in range(n):
        own[s], weight[s], m = gate(f, i, b, t + s, h, m)
        top[s] = m
    for s in range(n):
        weight[s] = exp(weight[s])
    head.decays(n, squares, vectors)
    for s in range(n):
        vectors[AFTER, s] *= weight[s]
        row = squares[SEEN, s]
        for j in range(n):
            row[j] *= weight[j]


@small
def last(first, every, fresh, b, t, h):
    """m before step t."""
    if fresh:
        return first.dtype.type(0)
    return every[b, t - 1, h] if t else first[b, h]


@small
def again(constant, g, beta, norm, fresh, b, t, h, n, squares, vectors):
    """Decays of a block that the forward has been through, of any of the three memories."""
    if beta is not None and not constant:
        head.given(g, beta, b, t, h, n, vectors)
        head.decays(n, squares, vectors)
    if norm is not None:
        gates(g, norm.i, b, t, h, n, last(norm.m, norm.tops, fresh, b, t, h), squares, vectors)


@small
def floor(m, s):
    """e^{-m_s}, at most e^60 as the definition has it and never 0, which nothing can be divided by."""
    return max(exp(min(-m[s], m.dtype.type(60))), np.finfo(m.dtype).tiny)


@small
def part(x, y):
    """Of the gradient of max(x, y) x's part: half where both are equal."""
    return 1.0 if x > y else 0.5 if x == y else 0.0


@small
def divide(norm, n, wide, broad, rows, squares, vectors):
    """d, and rows[Y] divided; norm moves to the block's end."""
    apart()
    total = vectors[SUM]
    for s in range(n):
        own, row = total.dtype.type(0), squares[QK, s]
        for j in range(C):
            own += row[j]
        total[s] = vectors[P, s] * dot(rows[Q, s], norm, wide) + own
    for s in range(n):
        to, size, least = rows[Y, s], abs(total[s]), floor(vectors[TOP], s)
        weight = least if size < least else size
        for v in range(broad):
            to[v] /= weight
    head.gather(norm, vectors[WHOLE], norm, vectors[AFTER], rows[K], wide, n)


@small
def unused(S, dS, b, h, lo, V):
    """What the gradient of the last m owes to S, or n, being scaled by it."""
    apart()
    total = dS.dtype.type(0)
    for k in range(S.shape[2]):
        row, to = S[b, h, k], dS[k]
        for v in range(V):
            total -= to[v] * row[lo + v]
    return total


@small
def begin(norm, back, dS, dn, b, h, lo, V):
    """Load dn; the gradient of the last m that is not S's and n's. All but S's is the first part's."""
    free = unused(back.S, dS, b, h, lo, V)
    dn[:] = 0
    if lo == 0:
        keys = norm.n.shape[3]
        fetch(dn, back.dn, b, h, ZERO, keys)
        free += back.dm[b, h] + unused(norm.n_last, dn, b, h, ZERO, keys)
    return free


@small
def undivide(sums, b, t, h, n, broad, rows, vectors):
    """From rows[Y] = dy and rows[E] = y to the gradients of what was divided and of d, and what reaches m."""
    apart()
    for s in range(n):
        to, d, m = rows[Y, s], sums[b, t + s, h], vectors[TOP, s]
        size, least = abs(d), floor(vectors[TOP], s)
        weight = least if size < least else size
        loss, share = dot(to, rows[E, s], broad), part(size, least)
        vectors[FREE, s] = (share - 1) * loss if m < -60 else 0 * m
        vectors[SUM, s] = -share * loss / d if share else 0 * d
        vectors[PSUM, s] = vectors[P, s] * vectors[SUM, s]
        for v in range(broad):
            to[v] /= weight


@small
def route(f, norm, df, di, free, fresh, b, at, t, h, n, vectors):
    """Add what reaches the maximum to df and di, from `free` at the block's end; return it at its start."""
    i, m = norm.i, last(norm.m, norm.tops, fresh, b, t, h)
    for s in range(n - 1, -1, -1):
        free += vectors[FREE, s]
        kept, new = f[b, t + s, h, 0] + (vectors[TOP, s - 1] if s else m), i[b, t + s, h, 0]
        share = part(kept, new)
        df[at, t + s, h, 0] += share * free
        di[at, t + s, h, 0] += (1 - share) * free
        free *= share
    return free
