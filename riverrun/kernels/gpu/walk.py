"""The sequential half of the matrix memories: one program walks the chunks of a head's block of values, state
on chip.

`accumulate` makes the states of a memory without corrections, or, against time, their gradients. `forward`
goes with time through corrected ones and may write outputs, states before each chunk, errors; `reverse` goes
against it with the state's gradient; `join` passes states over segments that were walked at the same time.
Equations: `memory.py`.
"""

import triton
import triton.language as tl

from .chunk import block, copied_ahead, put, put_block, rates, row, square, tile, vector


@triton.jit
def accumulate(
    x, y, G, lw, lr, fed, ends, seg, S0, n0, states, nstates, S1, n1, total, T, CHUNKS,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr, REVERSE: tl.constexpr, LOCAL: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """S ← what is left of S + (weighted x)ᵀ y: x, y are k, v, or, against time (REVERSE), q and dy.

    Grid (key blocks · value blocks, parts of CHUNKS chunks, B·H). states[n] is S before it takes chunk n.
    With a normaliser (nstates) the sum of weighted x goes along, times `fed` if that is given. LOCAL walks
    every part from zero and writes its final S to S1 and its decay to `total`; otherwise part s starts from
    S0[s] and the last to be walked writes S1. With decays per key x comes with them multiplied in.
    """
    ps, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts, count = tl.num_programs(1), tl.cdiv(T, C)
    pk, pv = tl.program_id(0) // tl.cdiv(V, BV), tl.program_id(0) % tl.cdiv(V, BV)
    batch, h = bh // H, bh % H
    GH: tl.constexpr = H // R
    rows, cols = pk * BK + tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    group, values = (batch * T * GH + h // R) * K, (batch * T * H + h) * V
    per_head, here = batch * T * H + h, bh * parts + ps
    if lw is not None:
        lw += bh * T
    if lr is not None:
        lr += bh * T
    if seg is not None:
        seg += batch * T
    S, norm = tl.zeros((BK, BV), tl.float32), tl.zeros((BK,), tl.float32)
    if S0 is not None:
        S = block(S0, here, rows, cols, K, V)
        if n0 is not None:
            norm = tl.load(n0 + here * K + rows, mask=rows < K, other=0.0)
    product = tl.full((BK,), 1.0, tl.float32)
    chunks = tl.minimum(CHUNKS, count - ps * CHUNKS)
    for step in range(0, chunks):
        n = ps * CHUNKS + (chunks - 1 - step if REVERSE else step)
        start, N = batch * 0 + n * C, bh * count + n
        if states is not None:
            put_block(states, S, N, rows, cols, True, K, V)
            if nstates is not None:
                tl.store(nstates + N * K + rows, norm, mask=(rows < K) & (pv == 0))
        x_ = tile(x + group, start, T, rows, K, GH * K, C).to(CT)
        y_ = tile(y + values, start, T, cols, V, H * V, C)
        read, reach, leave, through = rates(G, lw, lr, seg, N, start, T, C, DECAY, SHIFT)
        factor = tl.zeros((BK,), tl.float32) + through
        weight = read if REVERSE else leave
        if DECAY == 2:
            factor *= tl.load(ends + N * K + rows, mask=rows < K, other=0.0)
        if DECAY == 1 or seg is not None:
            y_ = y_.to(tl.float32) * weight[:, None]
        S = S * factor[:, None] + tl.dot(tl.trans(x_), y_.to(CT), input_precision=PREC)
        if nstates is not None or n1 is not None:
            if fed is not None:
                weight *= vector(fed + per_head, start, T, H, C)
            norm = norm * factor + tl.sum(x_.to(tl.float32) * weight[:, None], 0)
        product *= factor
    if LOCAL:
        put_block(S1, S, here, rows, cols, True, K, V)
        if total is not None:
            tl.store(total + here * K + rows, product, mask=(rows < K) & (pv == 0))
        if n1 is not None:
            tl.store(n1 + here * K + rows, norm, mask=(rows < K) & (pv == 0))
    elif S1 is not None:
        last = (ps == 0) if REVERSE else (ps == parts - 1)
        put_block(S1, S, bh, rows, cols, last, K, V)
        if n1 is not None:
            tl.store(n1 + bh * K + rows, norm, mask=(rows < K) & (pv == 0) & last)


@triton.jit
def forward(
    q, k, v, b_in, a_out, ends, strengths, G, seg, A, Aa, Lk, W, S0, y, S1, states, errors, T, CHUNKS, PARTS,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, LOCAL: tl.constexpr, WIDTH: tl.constexpr,
    CARRY: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """delta and dplr. With decays per key q and k come with them multiplied in, as b_in (for delta
    k's) and a_out do (see `matrices.fading`).

    Grid (value blocks, parts of CHUNKS chunks, B·H). Optional outputs are None. LOCAL walks a part from
    zero and writes its final state (K, WIDTH) to S1; columns past the values' blocks start as the identity
    and write nothing, so that they end as the part's transition. Otherwise part s of PARTS starts from S0[s]
    and the last one writes S1. CARRY: values wait in registers, not in shared memory, for their chunk.
    """
    pv, ps, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    count = tl.cdiv(T, C)
    batch, h = bh // H, bh % H
    GH: tl.constexpr = H // R
    rows, cols = tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    group, wide, values = (batch * T * GH + h // R) * K, (batch * T * H + h) * K, (batch * T * H + h) * V
    here = bh * PARTS + ps
    if seg is not None:
        seg += batch * T
    S = tl.zeros((BK, BV), tl.float32)
    if LOCAL:
        S = tl.where(rows[:, None] == cols[None, :] - (WIDTH - K), 1.0, 0.0)
    elif S0 is not None:
        S = block(S0, here, rows, cols, K, V)
    if CARRY:
        v_ = tile(v + values, batch * 0 + ps * CHUNKS * C, T, cols, V, H * V, C)
    for step in range(0, tl.minimum(CHUNKS, count - ps * CHUNKS)):
        n = ps * CHUNKS + step
        start, N = batch * 0 + n * C, bh * count + n
        if states is not None:
            put_block(states, S, N, rows, cols, True, K, V)
        k_ = tile(k + group, start, T, rows, K, GH * K, C).to(CT)
        if CARRY:
            next_v = tile(v + values, start + C, T, cols, V, H * V, C)
        else:
            v_ = tile(v + values, start, T, cols, V, H * V, C)
        Sc = S.to(CT)
        read, reach, leave, through = rates(G, None, None, seg, N, start, T, C, DECAY, 0)
        factor = tl.zeros((BK,), tl.float32) + through
        if DECAY == 2:
            decay = tl.load(ends + N * K + rows, mask=rows < K, other=0.0)
            factor *= decay
            if RULE == "delta":
                Sc = copied_ahead(S, decay).to(CT)
        # what is written: e, and for dplr also w, what b removed
        if RULE == "delta":
            reader = tile(b_in + wide, start, T, rows, K, H * K, C).to(CT) if DECAY == 2 else k_
            e = v_.to(tl.float32) - tl.dot(reader, Sc, input_precision=PREC) * reach[:, None]
            e = tl.dot(tl.load(square(W, N, C)).to(CT), e.to(CT), input_precision=PREC)
            if errors is not None:
                put(errors + values, e, start, T, cols, V, H * V, C)
            e *= row(strengths, N, C)[:, None]
        else:
            e = v_.to(tl.float32)
            b_ = tile(b_in + wide, start, T, rows, K, H * K, C).to(CT)
            w = tl.dot(tl.load(square(Lk, N, C)).to(CT), v_.to(CT), input_precision=PREC)
            w += tl.dot(b_, Sc, input_precision=PREC) * reach[:, None]
            w = tl.dot(tl.load(square(W, N, C)).to(CT), w.to(CT), input_precision=PREC)
            if errors is not None:
                put(errors + values, w, start, T, cols, V, H * V, C)
        if y is not None:
            q_ = tile(q + group, start, T, rows, K, GH * K, C).to(CT)
            out = tl.dot(q_, Sc, input_precision=PREC) * read[:, None]
            out += tl.dot(tl.load(square(A, N, C)).to(CT), e.to(CT), input_precision=PREC)
            if RULE == "dplr":
                out += tl.dot(tl.load(square(Aa, N, C)).to(CT), w.to(CT), input_precision=PREC)
            put(y + values, out, start, T, cols, V, H * V, C)
        S = S * factor[:, None] + tl.dot(tl.trans(k_), (e * leave[:, None]).to(CT), input_precision=PREC)
        if RULE == "dplr":
            a_ = tile(a_out + wide, start, T, rows, K, H * K, C).to(CT)
            S += tl.dot(tl.trans(a_), (w * leave[:, None]).to(CT), input_precision=PREC)
        if CARRY:
            v_ = next_v
    if LOCAL:
        put_block(S1, S, here, rows, cols, True, K, WIDTH)
    elif S1 is not None:
        put_block(S1, S, bh, rows, cols, ps == PARTS - 1, K, V)


@triton.jit
def reverse(
    q, k, b_in, a_out, ends, strengths, G, seg, A, Aa, Lk, W, dy, dS1, dv, dx, dstates, dS0, T, CHUNKS, PARTS,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, LOCAL: tl.constexpr, CARRY: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid as `forward`. dstates[n] is the gradient of the state after chunk n. LOCAL: from zero, every part
    but the first, only dS0 written."""
    pv, ps, bh = tl.program_id(0), tl.program_id(1) + LOCAL, tl.program_id(2).to(tl.int64)
    count = tl.cdiv(T, C)
    batch, h = bh // H, bh % H
    GH: tl.constexpr = H // R
    rows, cols = tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    group, wide, values = (batch * T * GH + h // R) * K, (batch * T * H + h) * K, (batch * T * H + h) * V
    here = bh * PARTS + ps
    if seg is not None:
        seg += batch * T
    S = tl.zeros((BK, BV), tl.float32)
    if dS1 is not None:
        S = block(dS1, here, rows, cols, K, V)
    chunks = tl.minimum(CHUNKS, count - ps * CHUNKS)
    if CARRY:
        dy_ = tile(dy + values, batch * 0 + (ps * CHUNKS + chunks - 1) * C, T, cols, V, H * V, C).to(CT)
    for step in range(0, chunks):
        n = ps * CHUNKS + chunks - 1 - step
        start, N = batch * 0 + n * C, bh * count + n
        if dstates is not None:
            put_block(dstates, S, N, rows, cols, True, K, V)
        q_ = tile(q + group, start, T, rows, K, GH * K, C).to(CT)
        if CARRY:
            next_dy = tile(dy + values, tl.maximum(start - C, 0), T, cols, V, H * V, C).to(CT)
        else:
            dy_ = tile(dy + values, start, T, cols, V, H * V, C).to(CT)
        read, reach, leave, through = rates(G, None, None, seg, N, start, T, C, DECAY, 0)
        factor = tl.zeros((BK,), tl.float32) + through
        if DECAY == 2:
            decay = tl.load(ends + N * K + rows, mask=rows < K, other=0.0)
            factor *= decay
        Sc = S.to(CT)
        if DECAY == 2 and RULE == "delta" and LOCAL:  # with outputs it takes more registers than there are
            Sc = copied_ahead(S, decay).to(CT)
        k_ = tile(k + group, start, T, rows, K, GH * K, C).to(CT)
        de = tl.dot(k_, Sc, input_precision=PREC) * leave[:, None]
        de += tl.dot(tl.trans(tl.load(square(A, N, C))).to(CT), dy_, input_precision=PREC)
        if RULE == "delta":
            x = de * row(strengths, N, C)[:, None]
            x = tl.dot(tl.trans(tl.load(square(W, N, C))).to(CT), x.to(CT), input_precision=PREC)
            de = x
        else:
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
            reader = tile(b_in + wide, start, T, rows, K, H * K, C).to(CT) if DECAY == 2 else k_
            S -= tl.dot(tl.trans(reader), (x * reach[:, None]).to(CT), input_precision=PREC)
        else:
            b_ = tile(b_in + wide, start, T, rows, K, H * K, C).to(CT)
            S += tl.dot(tl.trans(b_), (x * reach[:, None]).to(CT), input_precision=PREC)
        if CARRY:
            dy_ = next_dy
    if dS0 is not None:
        put_block(dS0, S, here if LOCAL else bh, rows, cols, LOCAL or ps == 0, K, V)


@triton.jit
def join(
    local, total, nlocal, S0, n0, starts, nstarts, PARTS, WIDTH,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, AT: tl.constexpr,
    REVERSE: tl.constexpr, TRANSITION: tl.constexpr, LW: tl.constexpr,
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
        if nlocal is not None:
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
            if nlocal is not None:
                tl.store(nstarts + part * K + rows, norm, mask=(rows < K) & (pv == 0))
                norm = D * norm + tl.load(nlocal + part * K + rows, mask=rows < K, other=0.0)
