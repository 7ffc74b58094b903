"""The sequential half of the matrix memories: one program walks the chunks of a head's block of values, state
on chip.

`forward` goes with time and may write outputs, states before each chunk, errors; `reverse` goes against it
with the state's gradient; `join` passes states over segments that were walked at the same time. Equations:
`memory.py`.
"""

import triton
import triton.language as tl

from .chunk import block, column, put, put_block, put_column, rates, square, tile, vector, weigh


@triton.jit
def forward(
    q, k, v, k_in, b_in, a_out, ends, beta, G, lw, m, seg, A, Aa, Lk, W,
    S0, n0, y, den, S1, n1, states, nstates, errors, total, T, CHUNKS,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr,
    LOCAL: tl.constexpr, WIDTH: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """With decays per key q and k come with them multiplied in, as k_in, b_in and a_out do (see
    `chunk.pairs`).

    Grid (value blocks, parts of CHUNKS chunks, B·H). Optional outputs are None. LOCAL walks every part from a
    zero state and writes its final one (K, WIDTH) to S1; columns past the values' blocks start as the
    identity and write nothing, so that they end as the part's transition; `total` gets the part's decay.
    Otherwise part s starts from S0[s] and the last one writes S1.
    """
    pv, ps, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts, count = tl.num_programs(1), tl.cdiv(T, C)
    batch, h = bh // H, bh % H
    GH: tl.constexpr = H // R
    i, rows, cols = tl.arange(0, C), tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    group, wide, values = (batch * T * GH + h // R) * K, (batch * T * H + h) * K, (batch * T * H + h) * V
    per_head, here = batch * T * H + h, bh * parts + ps
    if G is not None:
        G += per_head
    if lw is not None:
        lw += per_head
    if seg is not None:
        seg += batch * T
    S, norm = tl.zeros((BK, BV), tl.float32), tl.zeros((BK, 32), tl.float32)
    if LOCAL and RULE != "outer":
        S = tl.where(rows[:, None] == cols[None, :] - (WIDTH - K), 1.0, 0.0)
    if not LOCAL and S0 is not None:
        S = block(S0, here, rows, cols, K, V)
        norm = column(n0, here, rows, K) if NORM else norm
    first = tl.where(tl.arange(0, 32) == 0, 1.0, 0.0)[None, :]
    product = tl.full((BK,), 1.0, tl.float32)
    for step in range(0, tl.minimum(CHUNKS, count - ps * CHUNKS)):
        n = ps * CHUNKS + step
        start, N = batch * 0 + n * C, bh * count + n
        if states is not None:
            put_block(states, S, N, rows, cols, True, K, V)
            if NORM:
                put_column(nstates, norm, N, rows, pv == 0, K)
        k_ = tile(k + group, start, T, rows, K, GH * K, C).to(CT)
        v_ = tile(v + values, start, T, cols, V, H * V, C)
        Sc = S.to(CT)
        read, reach, leave, through = rates(G, lw, seg, start, T, H, C, DECAY, SHIFT)
        factor = tl.zeros((BK,), tl.float32) + through
        if DECAY == 2:
            factor *= tl.load(ends + N * K + rows, mask=rows < K, other=0.0)
        # what is written: e, and for dplr also w, what b removed
        e = v_.to(tl.float32)
        if RULE == "delta":
            reader = tile(k_in + wide, start, T, rows, K, H * K, C).to(CT) if DECAY == 2 else k_
            e -= tl.dot(reader, Sc, input_precision=PREC) * reach[:, None]
            e = tl.dot(tl.load(square(W, N, C)).to(CT), e.to(CT), input_precision=PREC)
            if errors is not None:
                put(errors + values, e, start, T, cols, V, H * V, C)
            e *= vector(beta + per_head, start, T, H, C)[:, None]
        if RULE == "dplr":
            b_ = tile(b_in + wide, start, T, rows, K, H * K, C).to(CT)
            w = tl.dot(tl.load(square(Lk, N, C)).to(CT), v_.to(CT), input_precision=PREC)
            w += tl.dot(b_, Sc, input_precision=PREC) * reach[:, None]
            w = tl.dot(tl.load(square(W, N, C)).to(CT), w.to(CT), input_precision=PREC)
            if errors is not None:
                put(errors + values, w, start, T, cols, V, H * V, C)
        if y is not None:
            q_ = tile(q + group, start, T, rows, K, GH * K, C).to(CT)
            if A is None:  # per head and no bonus: cheaper to make here than to read
                pair = tl.dot(q_, tl.trans(k_), input_precision=PREC)
                pair = weigh(pair, G, lw, seg, start, T, H, C, DECAY, False)
            else:
                pair = tl.load(square(A, N, C))
            out = tl.dot(q_, Sc, input_precision=PREC) * read[:, None]
            out += tl.dot(pair.to(CT), e.to(CT), input_precision=PREC)
            if RULE == "dplr":
                out += tl.dot(tl.load(square(Aa, N, C)).to(CT), w.to(CT), input_precision=PREC)
            if NORM:
                weight = tl.sum(tl.dot(q_, norm.to(CT), input_precision=PREC), 1) * read + tl.sum(pair, 1)
                inside = (i < (T - start).to(tl.int32)) & (pv == 0)
                tl.store(den + per_head + (start + i) * H, weight, mask=inside)
                out /= tl.maximum(tl.abs(weight), tl.exp(-vector(m + per_head, start, T, H, C)))[:, None]
            put(y + values, out, start, T, cols, V, H * V, C)
        S = S * factor[:, None] + tl.dot(tl.trans(k_), (e * leave[:, None]).to(CT), input_precision=PREC)
        if RULE == "dplr":
            a_ = tile(a_out + wide, start, T, rows, K, H * K, C).to(CT)
            S += tl.dot(tl.trans(a_), (w * leave[:, None]).to(CT), input_precision=PREC)
        if NORM:
            norm = norm * factor[:, None]
            norm += tl.dot(tl.trans(k_), (leave[:, None] * first).to(CT), input_precision=PREC)
        product *= factor
    if LOCAL:
        put_block(S1, S, here, rows, cols, True, K, WIDTH)
        tl.store(total + here * K + rows, product, mask=(rows < K) & (pv == 0))
        if NORM:
            put_column(n1, norm, here, rows, pv == 0, K)
    elif S1 is not None:
        put_block(S1, S, bh, rows, cols, ps == parts - 1, K, V)
        if NORM:
            put_column(n1, norm, bh, rows, (pv == 0) & (ps == parts - 1), K)


@triton.jit
def reverse(
    q, k, k_in, b_in, a_out, ends, beta, G, lw, seg, A, Aa, Lk, W,
    dy, dden, dS1, dn1, dv, dx, dstates, dnstates, dS0, dn0, T, CHUNKS,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr, NORM: tl.constexpr,
    LOCAL: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid as `forward`. dstates[n] is the gradient of the state after chunk n. LOCAL: from zero, only dS0
    written."""
    pv, ps, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts, count = tl.num_programs(1), tl.cdiv(T, C)
    batch, h = bh // H, bh % H
    GH: tl.constexpr = H // R
    rows, cols = tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    group, wide, values = (batch * T * GH + h // R) * K, (batch * T * H + h) * K, (batch * T * H + h) * V
    per_head, here = batch * T * H + h, bh * parts + ps
    if G is not None:
        G += per_head
    if lw is not None:
        lw += per_head
    if seg is not None:
        seg += batch * T
    S, norm = tl.zeros((BK, BV), tl.float32), tl.zeros((BK, 32), tl.float32)
    if not LOCAL and dS1 is not None:
        S = block(dS1, here, rows, cols, K, V)
        norm = column(dn1, here, rows, K) if NORM else norm
    first = tl.where(tl.arange(0, 32) == 0, 1.0, 0.0)[None, :]
    chunks = tl.minimum(CHUNKS, count - ps * CHUNKS)
    for step in range(0, chunks):
        n = ps * CHUNKS + chunks - 1 - step
        start, N = batch * 0 + n * C, bh * count + n
        if dstates is not None:
            put_block(dstates, S, N, rows, cols, True, K, V)
            if NORM:
                put_column(dnstates, norm, N, rows, pv == 0, K)
        q_ = tile(q + group, start, T, rows, K, GH * K, C).to(CT)
        dy_ = tile(dy + values, start, T, cols, V, H * V, C).to(CT)
        read, reach, leave, through = rates(G, lw, seg, start, T, H, C, DECAY, SHIFT)
        factor = tl.zeros((BK,), tl.float32) + through
        if DECAY == 2:
            factor *= tl.load(ends + N * K + rows, mask=rows < K, other=0.0)
        if RULE != "outer" or not LOCAL:
            Sc = S.to(CT)
            k_ = tile(k + group, start, T, rows, K, GH * K, C).to(CT)
            if A is None:
                pair = tl.dot(k_, tl.trans(q_), input_precision=PREC)
                pair = weigh(pair, G, lw, seg, start, T, H, C, DECAY, True)
            else:
                pair = tl.trans(tl.load(square(A, N, C)))
            de = tl.dot(k_, Sc, input_precision=PREC) * leave[:, None]
            de += tl.dot(pair.to(CT), dy_, input_precision=PREC)
            if RULE == "delta":
                x = de * vector(beta + per_head, start, T, H, C)[:, None]
                x = tl.dot(tl.trans(tl.load(square(W, N, C))).to(CT), x.to(CT), input_precision=PREC)
                de = x
            if RULE == "dplr":
                a_ = tile(a_out + wide, start, T, rows, K, H * K, C).to(CT)
                x = tl.dot(a_, Sc, input_precision=PREC) * leave[:, None]
                x += tl.dot(tl.trans(tl.load(square(Aa, N, C))).to(CT), dy_, input_precision=PREC)
                x = tl.dot(tl.trans(tl.load(square(W, N, C))).to(CT), x.to(CT), input_precision=PREC)
                de += tl.dot(tl.trans(tl.load(square(Lk, N, C))).to(CT), x.to(CT), input_precision=PREC)
                if dx is not None:
                    put(dx + values, x, start, T, cols, V, H * V, C)
            if dv is not None:
                put(dv + values, de, start, T, cols, V, H * V, C)
        S = S * factor[:, None]
        S += tl.dot(tl.trans(q_), (dy_.to(tl.float32) * read[:, None]).to(CT), input_precision=PREC)
        if RULE == "delta":
            reader = tile(k_in + wide, start, T, rows, K, H * K, C).to(CT) if DECAY == 2 else k_
            S -= tl.dot(tl.trans(reader), (x * reach[:, None]).to(CT), input_precision=PREC)
        if RULE == "dplr":
            b_ = tile(b_in + wide, start, T, rows, K, H * K, C).to(CT)
            S += tl.dot(tl.trans(b_), (x * reach[:, None]).to(CT), input_precision=PREC)
        if NORM:
            fed = vector(dden + per_head, start, T, H, C) * read
            norm = norm * factor[:, None]
            norm += tl.dot(tl.trans(q_), (fed[:, None] * first).to(CT), input_precision=PREC)
    if dS0 is not None:
        put_block(dS0, S, here if LOCAL else bh, rows, cols, LOCAL or ps == 0, K, V)
        if NORM:
            put_column(dn0, norm, here if LOCAL else bh, rows, (pv == 0) & (LOCAL or ps == 0), K)


@triton.jit
def join(
    local, total, nlocal, S0, n0, starts, nstarts, PARTS, WIDTH,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, AT: tl.constexpr,
    REVERSE: tl.constexpr, TRANSITION: tl.constexpr, NORM: tl.constexpr, LW: tl.constexpr,
):  # fmt: skip
    """starts[s], the state segment s begins with: S ← D_s S + local_s, D the segment's decay or its (K, K)
    transition.

    REVERSE goes from the last segment to the first with D transposed. Grid (value blocks, B·H). Transitions
    stand at column AT of `total`, whose rows are LW wide; decays are K numbers a segment.
    """
    pv, bh = tl.program_id(0), tl.program_id(1)
    rows, cols, inner = tl.arange(0, BK), pv * BV + tl.arange(0, BV), tl.arange(0, BK)
    inside = (rows < K)[:, None] & (cols < V)[None, :]
    S = tl.zeros((BK, BV), tl.float32)
    norm = tl.zeros((BK,), tl.float32)
    if S0 is not None:
        S = tl.load(S0 + (bh.to(tl.int64) * K + rows[:, None]) * V + cols[None, :], mask=inside, other=0.0)
        if NORM:
            norm = tl.load(n0 + bh * K + rows, mask=rows < K, other=0.0)
    for step in range(0, PARTS):
        s = PARTS - 1 - step if REVERSE else step
        part = bh.to(tl.int64) * PARTS + s
        tl.store(starts + (part * K + rows[:, None]) * V + cols[None, :], S, mask=inside)
        new = tl.load(local + (part * K + rows[:, None]) * WIDTH + cols[None, :], mask=inside, other=0.0)
        if TRANSITION:
            if REVERSE:
                at = inner[None, :] * LW + AT + rows[:, None]
            else:
                at = rows[:, None] * LW + AT + inner[None, :]
            D = tl.load(
                total + part * K * LW + at, mask=(rows < K)[:, None] & (inner < K)[None, :], other=0.0
            )
            S = tl.dot(D, S, input_precision="tf32x3") + new
        else:
            D = tl.load(total + part * K + rows, mask=rows < K, other=0.0)
            S = D[:, None] * S + new
            if NORM:
                tl.store(nstarts + part * K + rows, norm, mask=(rows < K) & (pv == 0))
                norm = D * norm + tl.load(nlocal + part * K + rows, mask=rows < K, other=0.0)
