"""What the matrix-memory kernels share: tiles of a chunk, its decays and segments, and the matrices between
its steps.

A chunk is C steps. G is the cumulative log-decay inside it, per head or per key, never increasing because g ≤
0. Between step j and a later step i the factor is e^{G_i - G_j}. Per head that is one (C, C) tile. Per key it
must be split between the two operands of a matrix product, so that neither part can overflow:

    Σ_k x_ik y_jk e^{G_ik - G_jk} = (x_i ⊙ e^{G_i - G_r}) · (y_j ⊙ e^{G_r - G_j})

A chunk whose decays over all its steps stay above e^-60 ("mild") takes r = C: the left part is at most e^60,
far from float32's end at e^88, the right at most 1. A launch treats all as mild, a second one (STRONG) takes
up the others; in those the pairs of each level l = 0, 1, … of a
dyadic hierarchy apart: pairs whose steps fall into the two halves of one block of 2^{l+1} steps, with r the
last step of the first half, j ≤ r < i, so that both exponents are ≤ 0 however strong the decay. Every pair
belongs to exactly one level; a step reads in a level or is read, never both, so one factor tile serves both.
Their exponents are sums of g over the steps between (a product with a 0/1 matrix), not differences of G,
which would cancel.

A reset starts a new segment; `seg` counts resets along time. Pairs of different segments are masked; a state
from before the chunk reaches the steps of the chunk's first segment only ("carried"), a step reaches the next
chunk's state if no reset follows it ("kept").
"""

import triton
import triton.language as tl


@triton.constexpr_function
def LEVELS(C):
    """log2 C."""
    return C.bit_length() - 1


LEAST = tl.constexpr(8.75651076269652e-27)  # e^-60: a chunk's decay down to which one product holds it


@triton.jit
def tile(x, start, T, cols, WIDTH: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr):
    """x[start + i, cols] for i < C of a (T, ·) matrix; zero past T and past WIDTH."""
    i = tl.arange(0, C)
    mask = (i < (T - start).to(tl.int32))[:, None] & (cols < WIDTH)[None, :]
    return tl.load(x + start * STRIDE + i[:, None] * STRIDE + cols[None, :], mask=mask, other=0.0)


@triton.jit
def put(x, value, start, T, cols, WIDTH: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr):
    """The inverse of `tile`."""
    i = tl.arange(0, C)
    mask = (i < (T - start).to(tl.int32))[:, None] & (cols < WIDTH)[None, :]
    tl.store(
        x + start * STRIDE + i[:, None] * STRIDE + cols[None, :], value.to(x.dtype.element_ty), mask=mask
    )


@triton.jit
def vector(x, start, T, STRIDE: tl.constexpr, C: tl.constexpr):
    """x[start + i] in float32 for i < C, zero past T."""
    i = tl.arange(0, C)
    return tl.load(x + start * STRIDE + i * STRIDE, mask=i < (T - start).to(tl.int32), other=0.0).to(
        tl.float32
    )


@triton.jit
def decays(G, start, T, rows, STRIDE: tl.constexpr):
    """Per-head G at the chunk's `rows`: past T the last one, before the chunk 0."""
    at = tl.minimum(rows, (T - 1 - start).to(tl.int32))
    return tl.load(G + start * STRIDE + at * STRIDE, mask=rows >= 0, other=0.0)


@triton.jit
def shifted(g, start, T, cols, WIDTH: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr):
    """The tile one step earlier, without what is before the chunk: its running sum leaves each step's own
    out."""
    i = tl.arange(0, C)
    mask = ((i > 0) & (i <= (T - start).to(tl.int32)))[:, None] & (cols < WIDTH)[None, :]
    return tl.load(g + (start - 1) * STRIDE + i[:, None] * STRIDE + cols[None, :], mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def segments(seg, start, T, C: tl.constexpr):
    """The chunk's segment numbers, the one before it and its last one."""
    at = tl.minimum(tl.arange(0, C), (T - 1 - start).to(tl.int32))
    end = tl.minimum(C - 1, (T - 1 - start).to(tl.int32))
    before = tl.load(seg + start - 1, mask=start > 0, other=0)
    return tl.load(seg + start + at), before, tl.load(seg + start + end)


@triton.jit
def rates(G, lw, seg, start, T, H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr):
    """Per step: what the state before the chunk weighs where it is read for y (SHIFT: before the step's own
    decay) and where it is corrected, what a write weighs in the state after the chunk; and what is left of
    the former in the latter. Decays per head, write weights and segments only: those per key are in the
    tiles."""
    i = tl.arange(0, C)
    reach, leave, through = tl.full((C,), 1.0, tl.float32), tl.full((C,), 1.0, tl.float32), 1.0
    if seg is not None:
        number, before, final = segments(seg, start, T, C)
        reach, leave = tl.where(number == before, 1.0, 0.0), tl.where(number == final, 1.0, 0.0)
        through = tl.where(final == before, 1.0, 0.0)
    read = reach
    if DECAY == 1:
        Gi = decays(G, start, T, i, H)
        end = tl.load(G + (start + tl.minimum(C - 1, (T - 1 - start).to(tl.int32))) * H)
        read *= tl.exp(decays(G, start, T, i - 1, H)) if SHIFT == 1 else tl.exp(Gi)
        reach *= tl.exp(Gi)
        leave *= tl.exp(end - Gi + vector(lw, start, T, H, C)) if lw is not None else tl.exp(end - Gi)
        through *= tl.exp(end)
    return read, reach, leave, through


@triton.jit
def edge(
    G, lw, seg, start, T, rows, H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr,
    LEAVE: tl.constexpr,
):  # fmt: skip
    """The factor of `rates` with which these rows of a chunk read the state, or LEAVE for it."""
    end = tl.minimum(C - 1, (T - 1 - start).to(tl.int32))
    factor = tl.zeros(rows.shape, tl.float32) + 1.0
    if DECAY == 1:
        if LEAVE:
            gap = tl.load(G + (start + end) * H) - decays(G, start, T, rows, H)
            if lw is not None:
                gap += tl.load(lw + (start + rows) * H, mask=rows <= end, other=0.0)
        else:
            gap = decays(G, start, T, rows - SHIFT, H)
        factor = tl.exp(gap)
    if seg is not None:
        number = tl.load(seg + start + tl.minimum(rows, end))
        if LEAVE:
            other = tl.load(seg + start + end)
        else:
            other = tl.load(seg + start - 1, mask=start > 0, other=0)
        factor = tl.where(number == other, factor, 0.0)
    return factor


@triton.jit
def weigh(
    pair, G, lw, seg, start, T, rows, cols, H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    SHIFT: tl.constexpr, OWN: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """q kᵀ (or k qᵀ) of these steps of a chunk with decays per head and write weights, where the pair is
    seen; OWN: a step sees itself."""
    reads, writes = (cols, rows) if TRANSPOSED else (rows, cols)
    ahead = cols[None, :] - rows[:, None] if TRANSPOSED else rows[:, None] - cols[None, :]
    see = ahead >= (0 if OWN else 1)
    end = tl.minimum(C - 1, (T - 1 - start).to(tl.int32))
    if seg is not None:
        left = tl.load(seg + start + tl.minimum(rows, end))
        see = see & (left[:, None] == tl.load(seg + start + tl.minimum(cols, end))[None, :])
    if DECAY == 1:
        read, write = decays(G, start, T, reads - SHIFT, H), decays(G, start, T, writes, H)
        if lw is not None:
            write -= tl.load(lw + (start + writes) * H, mask=writes <= end, other=0.0)
        gap = read[None, :] - write[:, None] if TRANSPOSED else read[:, None] - write[None, :]
        return pair * tl.exp(tl.where(see, gap, float("-inf")))
    else:
        return tl.where(see, pair, 0.0)


@triton.jit
def block(x, n, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The n-th (ROWS, COLS) matrix of x at rows and cols in float32, zero outside."""
    inside = (rows < ROWS)[:, None] & (cols < COLS)[None, :]
    at = (n * ROWS + rows[:, None]) * COLS + cols[None, :]
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put_block(x, value, n, rows, cols, wanted, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The inverse of `block`, if wanted."""
    inside = (rows < ROWS)[:, None] & (cols < COLS)[None, :] & wanted
    tl.store(x + (n * ROWS + rows[:, None]) * COLS + cols[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def between(g, tier, SHIFT: tl.constexpr, C: tl.constexpr):
    """e^(sum of g from each step to the one it is anchored at on level tier); SHIFT leaves a reader's own
    step out."""
    i = tl.arange(0, C)
    at, s = ((((i >> tier) | 1) << tier) - 1)[:, None], i[None, :]
    row = i[:, None]
    inside = ((s > at) & (s <= row - SHIFT)) | ((s > row) & (s <= at))
    return tl.exp(tl.dot(tl.where(inside, 1.0, 0.0), g, input_precision="tf32x3"))


@triton.jit
def level(tier, C: tl.constexpr):
    """(C, C) mask of the pairs that level tier takes: row reads, column is read."""
    i = tl.arange(0, C)
    row, col = i[:, None] >> tier, i[None, :] >> tier
    return (row == col + 1) & ((row & 1) == 1)


@triton.jit
def across_level(tier, C: tl.constexpr):
    """`level` transposed."""
    i = tl.arange(0, C)
    row, col = i[:, None] >> tier, i[None, :] >> tier
    return (col == row + 1) & ((col & 1) == 1)


@triton.jit
def running_sum(g, G, T, WIDTH: tl.constexpr, BW: tl.constexpr, C: tl.constexpr):
    """G = the sum of g (B, T, WIDTH) over each chunk's steps so far, in float32."""
    start = tl.program_id(0).to(tl.int64) * C
    cols = tl.program_id(1) * BW + tl.arange(0, BW)
    at = tl.program_id(2).to(tl.int64) * T * WIDTH
    x = tile(g + at, start, T, cols, WIDTH, WIDTH, C).to(tl.float32)
    put(G + at, tl.cumsum(x, 0), start, T, cols, WIDTH, WIDTH, C)


@triton.jit
def inverse(L, C: tl.constexpr, PREC: tl.constexpr):
    """(I + L)^{-1} for strictly lower triangular L (C, C), by blocks of 1, 2, 4, … steps.

    Two neighbouring diagonal blocks with inverses in D and the block N between them invert to D - D N D; all
    pairs of blocks of one size are one product. That is substitution by blocks: no powers of L, which could
    be huge.
    """
    i = tl.arange(0, C)
    D = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - tl.where(level(0, C), L, 0.0)
    for tier in range(1, LEVELS(C)):
        N = tl.where(level(tier, C), L, 0.0)
        D -= tl.dot(tl.dot(D, N, input_precision=PREC), D, input_precision=PREC)
    return D


@triton.jit
def square(x, n, C: tl.constexpr):
    """Pointers to the n-th (C, C) matrix of x."""
    i = tl.arange(0, C)
    return x + n * C * C + i[:, None] * C + i[None, :]


@triton.jit
def heads(x, batch, T, h, start, cols, H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr):
    """The tile of x (B, T, H / R, K) that head h uses, in float32."""
    GH: tl.constexpr = H // R
    return tile(x + (batch * T * GH + h // R) * K, start, T, cols, K, GH * K, C).to(tl.float32)


@triton.jit
def operand(
    x, faded, over, batch, T, h, start, cols,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, READER: tl.constexpr,
):  # fmt: skip
    """x as it meets pairs in a product: with its factor if decays are per key and mild. `faded` are anchored
    at the chunk's start for readers, from where `over` moves them to its end."""
    if faded is None:
        return heads(x, batch, T, h, start, cols, H, R, K, C)
    else:
        z = heads(faded, batch, T, h, start, cols, H, 1, K, C)
        return z * over[None, :] if READER else z


@triton.jit
def fading(
    q, k, a, b, g, q_in, k_out, b_in, a_out, sums, ends, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, RULE: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """With decays per key, the tiles that meet the state, decays multiplied in. Grid (key blocks, chunks, B·H).

    *_in is for what reads the state before the chunk (b_in is k's for delta, which has no b), *_out for what
    is written to the one after it; ends = e^{G_C} (B·H, chunks, K); sums = G, if wanted.
    """
    n, bh = tl.program_id(1), tl.program_id(2)
    batch, h = (bh // H).to(tl.int64), bh % H
    start, N = batch * 0 + n * C, bh.to(tl.int64) * tl.num_programs(1) + n
    cols = tl.program_id(0) * BK + tl.arange(0, BK)
    wide = (batch * T * H + h) * K
    g_ = tile(g + wide, start, T, cols, K, H * K, C).to(tl.float32)
    G, last = tl.cumsum(g_, 0), tl.sum(g_, 0)
    tl.store(ends + N * K + cols, tl.exp(last), mask=cols < K)
    if sums is not None:
        put(sums + wide, G, start, T, cols, K, H * K, C)
    read, write = tl.exp(G), tl.exp(last[None, :] - G)
    early = read
    if SHIFT == 1 or RULE == "dplr":
        early = tl.exp(tl.cumsum(shifted(g + wide, start, T, cols, K, H * K, C), 0))
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
    q, k, a, b, q_in, k_out, b_in, a_out, u, beta, g, G, seg, A, Aa, Lk, W, ends, T,
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
        q_ = operand(q, q_in, over, batch, T, h, start, cols, H, R, K, C, True)
        k_ = operand(k, k_out, over, batch, T, h, start, cols, H, R, K, C, False)
        a_, b_ = q_, k_
        if RULE == "delta":
            b_ = operand(k, b_in, over, batch, T, h, start, cols, H, R, K, C, True)
        if RULE == "dplr":
            a_ = operand(a, a_out, over, batch, T, h, start, cols, H, 1, K, C, False)
            b_ = operand(b, b_in, over, batch, T, h, start, cols, H, 1, K, C, True)
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
        A_, X_, Y_, Z_, beta, G, seg, A, Aa, Lk, W, N, batch * T * H + h, start, T, H, C, RULE, DECAY, SHIFT,
        PREC,
    )  # fmt: skip


@triton.jit
def finish(
    A_, X_, Y_, Z_, beta, G, seg, A, Aa, Lk, W, N, per_head, start, T,
    H: tl.constexpr, C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Decays per head, masks and inverses of the matrices of `pairs`, which are then written."""
    i = tl.arange(0, C)
    strict, eye = i[:, None] > i[None, :], i[:, None] == i[None, :]
    if DECAY == 1:
        Gs = decays(G + per_head, start, T, i, H)
        rate = tl.exp(tl.where(strict, Gs[:, None] - Gs[None, :], 0.0))
        X_ *= rate
        if SHIFT == 1:
            Gb1 = decays(G + per_head, start, T, i - 1, H)
            rate = tl.exp(tl.where(strict, Gb1[:, None] - Gs[None, :], 0.0))
        A_ *= rate
    if seg is not None:
        number, before, final = segments(seg, start, T, C)
        strict = strict & (number[:, None] == number[None, :])
    tl.store(square(A, N, C), tl.where(strict | eye, A_, 0.0).to(A.dtype.element_ty))
    if RULE == "delta":
        beta_ = vector(beta + per_head, start, T, H, C)
        X_ = tl.where(strict, X_, 0.0) * beta_[None, :]
        tl.store(square(W, N, C), inverse(X_, C, PREC).to(W.dtype.element_ty))
    if RULE == "dplr":
        tl.store(square(Aa, N, C), tl.where(strict | eye, Z_, 0.0).to(Aa.dtype.element_ty))
        tl.store(square(Lk, N, C), tl.where(strict, Y_, 0.0).to(Lk.dtype.element_ty))
        tl.store(square(W, N, C), inverse(tl.where(strict, -X_, 0.0), C, PREC).to(W.dtype.element_ty))


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
