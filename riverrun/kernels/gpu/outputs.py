"""What the memories without corrections give, every chunk at once, from the states before (or after) it.

    y  = e^G q S + A v              A = tril(q kᵀ D)
    dv = e^{G_C - G} k dS + Aᵀ dy   with the gradient dS of the state after the chunk

Both are one kernel: x reads the state, x and z make the pairs, whose values v are.
"""

import triton
import triton.language as tl

from .chunk import put, rates, square, tile, vector, weigh


@triton.jit
def outputs(
    x, z, v, G, lw, m, seg, A, states, nstates, y, den, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr, REVERSE: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, chunks, B·H). (x, z, v) is (q, k, v), or (k, q, dy) if REVERSE.

    A has what `chunk.pairs` made of decays per key or a bonus, and x then comes with the decays per key
    multiplied in; else A is None. nstates: y is divided by the normaliser (mLSTM), whose sums go to den.
    """
    pv, n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, h = bh // H, bh % H
    GH: tl.constexpr = H // R
    i, rows, cols = tl.arange(0, C), tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    start, N = batch * 0 + n * C, bh * tl.num_programs(1) + n
    group, values, per_head = (batch * T * GH + h // R) * K, (batch * T * H + h) * V, batch * T * H + h
    if G is not None:
        G += per_head
    if lw is not None:
        lw += per_head
    if seg is not None:
        seg += batch * T
    x_ = tile(x + group, start, T, rows, K, GH * K, C).to(CT)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    S = tl.load(states + (N * K + rows[:, None]) * V + cols[None, :], mask=inside, other=0.0).to(CT)
    v_ = tile(v + values, start, T, cols, V, H * V, C).to(CT)
    if A is None:
        z_ = tile(z + group, start, T, rows, K, GH * K, C).to(CT)
        pair = tl.dot(x_, tl.trans(z_), input_precision=PREC)
        pair = weigh(pair, G, lw, seg, start, T, H, C, DECAY, 0, REVERSE)
    elif REVERSE:
        pair = tl.trans(tl.load(square(A, N, C)))
    else:
        pair = tl.load(square(A, N, C))
    read, reach, leave, through = rates(G, lw, seg, start, T, H, C, DECAY, SHIFT)
    factor = leave if REVERSE else read
    out = tl.dot(x_, S, input_precision=PREC)
    if DECAY == 1 or seg is not None:
        out *= factor[:, None]
    out = tl.dot(pair.to(CT), v_, out, input_precision=PREC)
    if nstates is not None:
        norm = tl.load(nstates + N * K + rows, mask=rows < K, other=0.0)
        weight = tl.sum(x_.to(tl.float32) * norm[None, :], 1) * factor + tl.sum(pair, 1)
        tl.store(den + per_head + (start + i) * H, weight, mask=(i < (T - start).to(tl.int32)) & (pv == 0))
        out /= tl.maximum(tl.abs(weight), tl.exp(-vector(m + per_head, start, T, H, C)))[:, None]
    put(y + values, out, start, T, cols, V, H * V, C)
