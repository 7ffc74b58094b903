"""What the memories without corrections give, every chunk at once, from the states before (or after) it.

    y  = e^G q S + A v              A = tril(q kᵀ D)
    dv = e^{G_C - G} k dS + Aᵀ dy   with the gradient dS of the state after the chunk

Both are one kernel: x reads the state, x and z make the pairs, whose values v are.
"""

import triton
import triton.language as tl

from .chunk import edge, put, square, tile, weigh


@triton.jit
def outputs(
    x, z, v, G, lw, lr, m, seg, A, states, nstates, y, den, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, ROWS: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr, REVERSE: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, chunks · C / ROWS, B·H). (x, z, v) is (q, k, v), or (k, q, dy) if REVERSE.

    A has what `matrices.pairs` made of decays per key or a bonus, and x then comes with the decays per key
    multiplied in; else A is None. nstates: y is divided by the normaliser (mLSTM), whose sums go to den.
    """
    PARTS: tl.constexpr = C // ROWS
    pv, n, bh = tl.program_id(0), tl.program_id(1) // PARTS, tl.program_id(2).to(tl.int64)
    part = tl.program_id(1) % PARTS
    batch, h = bh // H, bh % H
    GH: tl.constexpr = H // R
    i, keys, cols = tl.arange(0, ROWS), tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    start, N = batch * 0 + n * C, bh * (tl.num_programs(1) // PARTS) + n
    group, values, per_head = (batch * T * GH + h // R) * K, (batch * T * H + h) * V, batch * T * H + h
    if lw is not None:
        lw += bh * T
    if lr is not None:
        lr += bh * T
    if seg is not None:
        seg += batch * T
    rows, here = part * ROWS + i, start + part * ROWS
    x_ = tile(x + group, here, T, keys, K, GH * K, ROWS).to(CT)
    inside = (keys < K)[:, None] & (cols < V)[None, :]
    S = tl.load(states + (N * K + keys[:, None]) * V + cols[None, :], mask=inside, other=0.0).to(CT)
    out = tl.dot(x_, S, input_precision=PREC)
    factor = edge(G, lw, seg, N, start, T, rows, C, DECAY, SHIFT, REVERSE)
    if DECAY == 1 or seg is not None:
        out *= factor[:, None]
    weight = factor
    if nstates is not None:
        norm = tl.load(nstates + N * K + keys, mask=keys < K, other=0.0)
        weight *= tl.sum(x_.to(tl.float32) * norm[None, :], 1)
    if A is None:
        for other in range(part if REVERSE else 0, PARTS if REVERSE else part + 1):
            there = start + other * ROWS
            z_ = tile(z + group, there, T, keys, K, GH * K, ROWS).to(CT)
            v_ = tile(v + values, there, T, cols, V, H * V, ROWS).to(CT)
            pair = tl.dot(x_, tl.trans(z_), input_precision=PREC)
            at = other * ROWS + i
            pair = weigh(pair, G, lw, lr, seg, N, start, T, rows, at, C, DECAY, 0, True, REVERSE)
            out += tl.dot(pair.to(CT), v_, input_precision=PREC)
            if nstates is not None:
                weight += tl.sum(pair, 1)
    else:
        v_ = tile(v + values, start, T, cols, V, H * V, C).to(CT)
        pair = tl.load(square(A, N, C)).to(CT)
        out += tl.dot(tl.trans(pair) if REVERSE else pair, v_, input_precision=PREC)
    if nstates is not None:
        past = per_head + (here + i) * H
        inside = here + i < T
        tl.store(den + past, weight, mask=inside & (pv == 0))
        out /= tl.maximum(tl.abs(weight), tl.exp(-tl.load(m + past, mask=inside, other=0.0)))[:, None]
    put(y + values, out, here, T, cols, V, H * V, ROWS)
