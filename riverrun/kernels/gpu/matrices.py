"""What of every chunk depends neither on values nor on the state: decays multiplied into keys, and the
matrices between its steps.

`fading` is for decays per key only; `pairs` makes the matrices, and `inverse` is the correction's.
"""

import triton
import triton.language as tl

from .chunk import (
    LEAST,
    LEVELS,
    between,
    decays,
    heads,
    level,
    operand,
    put,
    row,
    segments,
    square,
    tile,
)


@triton.jit
def inverse(L, C: tl.constexpr, FT: tl.constexpr, PREC: tl.constexpr):
    """(I + L)^{-1} for strictly lower triangular L (C, C), by blocks of 1, 2, 4, … steps.

    Two neighbouring diagonal blocks with inverses in D and the block N between them invert to D - D N D; all
    pairs of blocks of one size are one product, of numbers in FT. That is substitution by blocks: no powers
    of L, which could be huge.
    """
    i = tl.arange(0, C)
    D = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - tl.where(level(0, C), L, 0.0)
    for tier in range(1, LEVELS(C)):
        N, F = tl.where(level(tier, C), L, 0.0).to(FT), D.to(FT)
        D -= tl.dot(tl.dot(F, N, input_precision=PREC).to(FT), F, input_precision=PREC)
    return D


@triton.jit
def put_inverse(W, L, N, C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """W[N] = (I + L)^{-1}. Where bfloat16 is multiplied, in float16: as fine as tf32 and several times as
    fast; once more in tf32 if a number left float16's range (keys much longer than one)."""
    if CT == tl.bfloat16:
        D = inverse(L, C, tl.float16, PREC)
        tl.store(square(W, N, C), D.to(W.dtype.element_ty))
        outside = tl.where(tl.abs(D) < 32768.0, 0, 1)  # 1 for what is no number, too
        if tl.max(tl.max(outside, 1), 0) > 0:
            tl.store(square(W, N, C), inverse(L, C, tl.float32, PREC).to(W.dtype.element_ty))
    else:
        tl.store(square(W, N, C), inverse(L, C, tl.float32, PREC).to(W.dtype.element_ty))


@triton.jit
def fading(
    q, k, a, b, g, q_in, k_out, b_in, a_out, sums, ends, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, RULE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """With decays per key, the tiles that meet the state, decays multiplied in.

    Grid (key blocks, chunks, B·H). *_in is for what reads the state before the chunk (b_in is k's for delta,
    which has no b), *_out for what is written to the one after it; ends = e^{G_C} (B·H, chunks, K); sums = G,
    if wanted.
    """
    n, bh = tl.program_id(1), tl.program_id(2)
    batch, h = (bh // H).to(tl.int64), bh % H
    start, N = batch * 0 + n * C, bh.to(tl.int64) * tl.num_programs(1) + n
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    wide = (batch * T * H + h) * K
    g_ = tile(g + wide, start, T, cols, K, H * K, C).to(tl.float32)
    # one sum for all: of steps added in another order, what weighs a pair would not be the same in its two
    # gradients, which cancel in dg
    i, G = tl.arange(0, C)[:, None], tl.cumsum(g_, 0)
    last = tl.sum(tl.where(i == C - 1, G, 0.0), 0)
    tl.store(ends + N * K + cols, tl.exp(last), mask=cols < K)
    if sums is not None:
        put(sums + wide, G, start, T, cols, K, H * K, C)
    read, write = tl.exp(G), tl.exp(last[None, :] - G)
    early = read
    if SHIFT == 1 or RULE == "dplr":
        past = tl.gather(G, tl.broadcast_to(tl.maximum(i - 1, 0), C, BK), 0)
        early = tl.exp(tl.where(i > 0, past, 0.0))
    q_ = heads(q, batch, T, h, start, cols, H, R, K, C)
    put(q_in + wide, q_ * (early if SHIFT == 1 else read), start, T, cols, K, H * K, C)
    k_ = heads(k, batch, T, h, start, cols, H, R, K, C)
    put(k_out + wide, k_ * write, start, T, cols, K, H * K, C)
    if RULE == "delta":
        put(b_in + wide, k_ * read, start, T, cols, K, H * K, C)
    if RULE == "dplr":
        put(b_in + wide, heads(b, batch, T, h, start, cols, H, 1, K, C) * early, start, T, cols, K, H * K, C)
        a_ = heads(a, batch, T, h, start, cols, H, 1, K, C)
        put(a_out + wide, a_ * write, start, T, cols, K, H * K, C)


@triton.jit
def pairs(
    q, k, a, b, q_in, k_out, b_in, a_out, u, strengths, g, G, seg, A, Aa, Lk, W, ends, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, ALL: tl.constexpr, C: tl.constexpr,
    RULE: tl.constexpr, DECAY: tl.constexpr, STRONG: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """The matrices of one chunk and head; see `memory.py` for the rules. Grid (chunks, B·H).

    outer   A  = q kᵀ (j ≤ i; with a bonus j < i, and u on the diagonal)
    delta   A  = q kᵀ,    W = (I + tril(k kᵀ, -1) β)^{-1}
    dplr    A  = q kᵀ,    Aa = q aᵀ,    Lk = tril(b kᵀ, -1),    W = (I - tril(b aᵀ, -1))^{-1}

    With decays per key from what `fading` made (*_in, *_out), as if all chunks were mild; STRONG makes those
    that are not again, without it.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    batch, h = (bh // H).to(tl.int64), bh % H
    start, N = batch * 0 + n * C, bh.to(tl.int64) * tl.num_programs(0) + n
    i = tl.arange(0, C)
    if STRONG:
        every = tl.arange(0, ALL)
        if tl.min(tl.load(ends + N * K + every, mask=every < K, other=1.0), 0) > LEAST:
            return
    A_ = tl.zeros((C, C), tl.float32)
    X_, Y_, Z_ = A_, A_, A_
    diagonal, diagonal_a = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    SHIFT: tl.constexpr = 1 if u is not None else 0  # a bonus reads before the step's own decay
    for j in range(0, K, BK):
        cols = j + tl.arange(0, BK)
        over = tl.full((BK,), 1.0, tl.float32)
        if q_in is not None:
            over = 1.0 / tl.load(ends + N * K + cols, mask=cols < K, other=1.0)
        # writers are moved to the readers' anchor: there are more readers, which products take as they lie
        q_ = operand(q, q_in, over, batch, T, h, start, cols, H, R, K, C, False)
        k_ = operand(k, k_out, over, batch, T, h, start, cols, H, R, K, C, True)
        a_, b_ = q_, k_
        if RULE == "delta":
            b_ = operand(k, b_in, over, batch, T, h, start, cols, H, R, K, C, False)
        if RULE == "dplr":
            a_ = operand(a, a_out, over, batch, T, h, start, cols, H, 1, K, C, True)
            b_ = operand(b, b_in, over, batch, T, h, start, cols, H, 1, K, C, False)
        if SHIFT == 1:
            uf = tl.load(u + h * K + cols, mask=cols < K, other=0.0).to(tl.float32)
            k_raw = heads(k, batch, T, h, start, cols, H, R, K, C)
            diagonal += tl.sum(heads(q, batch, T, h, start, cols, H, R, K, C) * k_raw * uf[None, :], 1)
        if STRONG:
            if SHIFT == 0:
                diagonal += tl.sum(q_ * k_, 1)
            diagonal_a += tl.sum(q_ * a_, 1)
            g_ = tile(g + (batch * T * H + h) * K, start, T, cols, K, H * K, C).to(tl.float32)
            for tier in range(0, LEVELS(C)):
                f = between(g_, tier, 0, C)
                early = between(g_, tier, 1, C) if SHIFT == 1 or RULE == "dplr" else f
                fq, fb = early if SHIFT == 1 else f, early if RULE == "dplr" else f
                x = meet(q_ * fq, k_ * f, a_ * f, b_ * fb, RULE, CT, PREC)
                at = level(tier, C)
                A_, X_ = A_ + tl.where(at, x[0], 0.0), X_ + tl.where(at, x[1], 0.0)
                Y_, Z_ = Y_ + tl.where(at, x[2], 0.0), Z_ + tl.where(at, x[3], 0.0)
        else:
            x = meet(q_, k_, a_, b_, RULE, CT, PREC)
            A_, X_, Y_, Z_ = A_ + x[0], X_ + x[1], Y_ + x[2], Z_ + x[3]
    eye = i[:, None] == i[None, :]
    if STRONG or SHIFT == 1:
        A_ = tl.where(eye, diagonal[:, None], A_)
    if STRONG:
        Z_ = tl.where(eye, diagonal_a[:, None], Z_)
    if seg is not None:
        seg += batch * T
    finish(
        A_, X_, Y_, Z_, strengths, G, seg, A, Aa, Lk, W, N, start, T, C, RULE, DECAY, SHIFT, CT, PREC,
    )  # fmt: skip


@triton.jit
def finish(
    A_, X_, Y_, Z_, strengths, G, seg, A, Aa, Lk, W, N, start, T,
    C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Decays per head, masks and inverses of the matrices of `pairs`, which are then written."""
    i = tl.arange(0, C)
    strict, eye = i[:, None] > i[None, :], i[:, None] == i[None, :]
    if DECAY == 1:
        Gs = decays(G, N, i, C)
        rate = tl.exp(tl.where(strict, Gs[:, None] - Gs[None, :], 0.0))
        X_ *= rate
        if SHIFT == 1:
            Gb1 = decays(G, N, i - 1, C)
            rate = tl.exp(tl.where(strict, Gb1[:, None] - Gs[None, :], 0.0))
        A_ *= rate
    if seg is not None:
        number, before, final = segments(seg, start, T, C)
        strict = strict & (number[:, None] == number[None, :])
    tl.store(square(A, N, C), tl.where(strict | eye, A_, 0.0).to(A.dtype.element_ty))
    if RULE == "delta":
        X_ = tl.where(strict, X_, 0.0) * row(strengths, N, C)[None, :]
        put_inverse(W, X_, N, C, CT, PREC)
    if RULE == "dplr":
        tl.store(square(Aa, N, C), tl.where(strict | eye, Z_, 0.0).to(Aa.dtype.element_ty))
        tl.store(square(Lk, N, C), tl.where(strict, Y_, 0.0).to(Lk.dtype.element_ty))
        put_inverse(W, tl.where(strict, -X_, 0.0), N, C, CT, PREC)


@triton.jit
def meet(q, k, a, b, RULE: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """q kᵀ, the rule's own b kᵀ (delta) or b aᵀ (dplr), and dplr's b kᵀ and q aᵀ."""
    kt, qx = tl.trans(k.to(CT)), q.to(CT)
    A = tl.dot(qx, kt, input_precision=PREC)
    X, Y, Z = A, A, A
    if RULE == "delta":
        X = tl.dot(b.to(CT), kt, input_precision=PREC)
    if RULE == "dplr":
        at, bx = tl.trans(a.to(CT)), b.to(CT)
        X = tl.dot(bx, at, input_precision=PREC)
        Y = tl.dot(bx, kt, input_precision=PREC)
        Z = tl.dot(qx, at, input_precision=PREC)
    return A, X, Y, Z
