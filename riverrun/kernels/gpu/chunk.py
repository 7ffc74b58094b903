"""What the matrix-memory kernels share: tiles of a chunk, its decays and segments.

A chunk is C steps. G is the cumulative log-decay inside it, per head or per key, never increasing because g ≤
0. Between step j and a later step i the factor is e^{G_i - G_j}. Per head that is one (C, C) tile. Per key it
must be split between the two operands of a matrix product, so that neither part can overflow:

    Σ_k x_ik y_jk e^{G_ik - G_jk} = (x_i ⊙ e^{G_i - G_r}) · (y_j ⊙ e^{G_r - G_j})

A chunk whose decays over all its steps stay above e^-60 ("mild") takes r = C: the left part is at most e^60,
far from float32's end at e^88, the right at most 1. A launch treats all as mild, a second one (STRONG) takes
up the others and takes the pairs of each level l = 0, 1, … of a dyadic hierarchy apart: pairs whose steps
fall into the two halves of one block of 2^{l+1} steps, with r the last step of the first half, j ≤ r < i, so
that both exponents are ≤ 0 however strong the decay. Every pair belongs to exactly one level; a step reads in
a level or is read, never both, so one factor tile serves both.
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
def decays(G, N, rows, C: tl.constexpr):
    """Per-head G (B·H·chunks, C) at these rows of chunk N: past T the last one, before the chunk 0."""
    return tl.load(G + N * C + rows, mask=rows >= 0, other=0.0)


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
def rates(G, lw, lr, seg, N, start, T, C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr):
    """Per step: what the state before the chunk weighs where it is read for y (SHIFT: before the step's own
    decay) and where it is corrected, what a write weighs in the state after the chunk; and what is left of
    the former in the latter. Decays per head, write weights and segments only: those per key are in the
    tiles."""
    i = tl.arange(0, C)
    reach, leave, through = tl.full((C,), 1.0, tl.float32), tl.full((C,), 1.0, tl.float32), 1.0
    if seg is not None:
        number, before, after = segments(seg, start, T, C)
        reach, leave = tl.where(number == before, 1.0, 0.0), tl.where(number == after, 1.0, 0.0)
        through = tl.where(after == before, 1.0, 0.0)
    read = reach
    if DECAY == 1:
        Gi, end = row(G, N, C), tl.load(G + N * C + C - 1)
        gap = decays(G, N, i - 1, C) if SHIFT == 1 else Gi
        read *= tl.exp(gap + vector(lr, start, T, 1, C)) if lr is not None else tl.exp(gap)
        reach *= tl.exp(Gi)
        leave *= tl.exp(end - Gi + vector(lw, start, T, 1, C)) if lw is not None else tl.exp(end - Gi)
        through *= tl.exp(end)
    return read, reach, leave, through


@triton.jit
def copied_ahead(S, decay):
    """S (rows, ·), as if a product needed `decay` (rows), a number from 0 to 1 that this chunk loads.

    Triton copies ahead what the operands of products need. Any other load of a loop is waited for by the
    first fence before a product, some 0.4 µs a chunk.
    """
    return S + 0.0 * decay[:, None]


@triton.jit
def edge(
    G, lw, seg, N, start, T, rows, C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr,
    LEAVE: tl.constexpr,
):  # fmt: skip
    """The factor of `rates` with which these rows of a chunk read the state, or LEAVE for it."""
    end = tl.minimum(C - 1, (T - 1 - start).to(tl.int32))
    factor = tl.zeros(rows.shape, tl.float32) + 1.0
    if DECAY == 1:
        if LEAVE:
            gap = tl.load(G + N * C + C - 1) - decays(G, N, rows, C)
            if lw is not None:
                gap += tl.load(lw + start + rows, mask=rows <= end, other=0.0)
        else:
            gap = decays(G, N, rows - SHIFT, C)
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
    pair, G, lw, lr, seg, N, start, T, rows, cols, C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr,
    OWN: tl.constexpr, TRANSPOSED: tl.constexpr,
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
        read, write = decays(G, N, reads - SHIFT, C), decays(G, N, writes, C)
        if lw is not None:
            write -= tl.load(lw + start + writes, mask=writes <= end, other=0.0)
        if lr is not None:
            read += tl.load(lr + start + reads, mask=reads <= end, other=0.0)
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
def by_chunk(g, beta, G, strengths, T, H: tl.constexpr, BH: tl.constexpr, C: tl.constexpr):
    """What is per head, (B, T, H), as kernels read it: (B·H, chunks, C) in float32. G has the sums of g over
    each chunk's steps so far, past T the last one; strengths has β, past T zero. Either may be None."""
    n, batch, i = tl.program_id(0), tl.program_id(2).to(tl.int64), tl.arange(0, C)
    cols = tl.program_id(1) * BH + tl.arange(0, BH)
    start, N = batch * 0 + n * C, (batch * H + cols) * tl.num_programs(0) + n
    at, inside = N[None, :] * C + i[:, None], (cols < H)[None, :]
    if g is not None:
        g_ = tile(g + batch * T * H, start, T, cols, H, H, C).to(tl.float32)
        tl.store(G + at, tl.cumsum(g_, 0), mask=inside)
    if beta is not None:
        beta_ = tile(beta + batch * T * H, start, T, cols, H, H, C).to(tl.float32)
        tl.store(strengths + at, beta_, mask=inside)


@triton.jit
def row(x, N, C: tl.constexpr):
    """x[N] of a (·, C) matrix."""
    return tl.load(x + N * C + tl.arange(0, C))


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
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, MOVED: tl.constexpr,
):  # fmt: skip
    """x as it meets pairs in a product: with its factor if decays are per key and mild. `faded` are anchored
    at the chunk's start for readers, at its end for writers; MOVED by `over`, one side meets the other."""
    if faded is None:
        return heads(x, batch, T, h, start, cols, H, R, K, C)
    else:
        z = heads(faded, batch, T, h, start, cols, H, 1, K, C)
        return z * over[None, :] if MOVED else z
