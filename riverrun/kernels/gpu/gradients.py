"""The parallel half of the backward: every chunk's gradients from the states and state gradients around it.

A reader ρ_i with adjoint α_i (q with dy, what corrects with dx) and a writer κ_j with value ε_j meet in the
weight P_ij = α_i · ε_j of a pair and, through the states before and after the chunk, in S α_i and dS ε_j:

    dρ_i = Σ_j P_ij e^{G_i - G_j} κ_j + e^{G_i} S α_i
    dκ_j = Σ_i P_ij e^{G_i - G_j} ρ_i + e^{G_C - G_j} dS ε_j

G_i enters where ρ_i reads and -G_j where κ_j writes, so with ω_i = Σ_ρ ρ_i ⊙ dρ_i - Σ_κ κ_i ⊙ dκ_i and S'
the state after the chunk (so that the sum never leaves the chunk)

    dg_t = Σ_{i ≥ t} ω_i + rowsum(S' ⊙ dS)

`weights` makes P, with decays per head in it; `gradients` finishes one reader or writer before it begins the
next, so that few tiles are held at once. With decays per key a chunk is taken as mild (see `chunk.py`): every
factor is anchored at the chunk's end and taken out of the sums. A second launch, STRONG, leaves at once where
that was true and does the others level by level.
"""

import triton
import triton.language as tl

from .chunk import (
    LEAST,
    heads,
    operand,
    put,
    rates,
    row,
    shifted,
    square,
    tile,
    vector,
    weigh,
)
from .strong import strong_rates, strong_shares


@triton.jit
def weights(
    value, w, dy, dx, G, lw, lr, seg, dden, Pq, Px, Pa, Pw, own, own_a, T,
    H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, RULE: tl.constexpr,
    DECAY: tl.constexpr, SHIFT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Of each chunk (grid: chunks, B·H) dy εᵀ and dx εᵀ with the values of k, for dplr also with those of a.

    If own is given, those of q of a step with itself go there (B, T, H), of a to own_a, and not to P.
    """
    n, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, h = bh // H, bh % H
    start, N, i = batch * 0 + n * C, bh * tl.num_programs(0) + n, tl.arange(0, C)
    per_head = batch * T * H + h
    if lw is not None:
        lw += bh.to(tl.int64) * T
    if lr is not None:
        lr += bh.to(tl.int64) * T
    if seg is not None:
        seg += batch * T
    q_, x_ = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    a_, w_ = q_, q_
    for j in range(0, V, BV):
        across = j + tl.arange(0, BV)
        dyj = tile(dy + per_head * V, start, T, across, V, H * V, C).to(CT)
        vt = tl.trans(tile(value + per_head * V, start, T, across, V, H * V, C).to(CT))
        q_ += tl.dot(dyj, vt, input_precision=PREC)
        if RULE != "outer":
            dxj = tile(dx + per_head * V, start, T, across, V, H * V, C).to(CT)
            x_ += tl.dot(dxj, vt, input_precision=PREC)
        if RULE == "dplr":
            wt = tl.trans(tile(w + per_head * V, start, T, across, V, H * V, C).to(CT))
            a_ += tl.dot(dyj, wt, input_precision=PREC)
            w_ += tl.dot(dxj, wt, input_precision=PREC)
    if dden is not None:
        q_ += vector(dden + per_head, start, T, H, C)[:, None]
    eye, inside = i[:, None] == i[None, :], i < (T - start).to(tl.int32)
    at = per_head + (start + i) * H
    if own is not None:
        tl.store(own + at, tl.sum(tl.where(eye, q_, 0.0), 1), mask=inside)
    q_ = weigh(q_, G, lw, lr, seg, N, start, T, i, i, C, DECAY, SHIFT, own is None, False)
    tl.store(square(Pq, N, C), q_.to(Pq.dtype.element_ty))
    if RULE != "outer":
        x_ = weigh(x_, G, lw, lr, seg, N, start, T, i, i, C, DECAY, 0, False, False)
        tl.store(square(Px, N, C), x_.to(Px.dtype.element_ty))
    if RULE == "dplr":
        tl.store(own_a + at, tl.sum(tl.where(eye, a_, 0.0), 1), mask=inside)
        a_ = weigh(a_, G, lw, lr, seg, N, start, T, i, i, C, DECAY, 0, False, False)
        tl.store(square(Pa, N, C), a_.to(Pa.dtype.element_ty))
        w_ = weigh(w_, G, lw, lr, seg, N, start, T, i, i, C, DECAY, 0, False, False)
        tl.store(square(Pw, N, C), w_.to(Pw.dtype.element_ty))


@triton.jit
def state_share(
    x, states, start, T, cols,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """x Sᵀ (C, BK)."""
    total = tl.zeros((C, BK), tl.float32)
    for j in range(0, V, BV):
        across = j + tl.arange(0, BV)
        inside = (cols < K)[:, None] & (across < V)[None, :]
        x_ = tile(x, start, T, across, V, H * V, C).to(CT)
        S = tl.load(states + cols[:, None] * V + across[None, :], mask=inside, other=0.0).to(CT)
        total += tl.dot(x_, tl.trans(S), input_precision=PREC)
    return total


@triton.jit
def meeting(states, dstates, cols, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):
    """rowsum(S ⊙ dS)."""
    total = tl.zeros((BK,), tl.float32)
    for j in range(0, V, BV):
        across = j + tl.arange(0, BV)
        inside = (cols < K)[:, None] & (across < V)[None, :]
        at = cols[:, None] * V + across[None, :]
        S = tl.load(states + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(S * tl.load(dstates + at, mask=inside, other=0.0).to(tl.float32), 1)
    return total


@triton.jit
def pair_share(P, N, z, BACK: tl.constexpr, C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr):
    """Σ_j P_ij z_j; BACK with Pᵀ."""
    P_ = tl.load(square(P, N, C)).to(CT)
    return tl.dot(tl.trans(P_) if BACK else P_, z.to(CT), input_precision=PREC)


@triton.jit
def fade(
    sums, end, start, T, cols, WIDTH: tl.constexpr, STRIDE: tl.constexpr, C: tl.constexpr,
    READER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """For readers e^{G - G_C}, EARLY with G before each step, `end` being e^{-G_C}; for writers e^{G_C - G},
    `end` being G_C.

    Made as `operand` and `fading` make the same factors: dg is what is left when pairs cancel, and they
    cancel only if what weighs them is the same to the last bit.
    """
    if EARLY:
        G = shifted(sums, start, T, cols, WIDTH, STRIDE, C)
    else:
        G = tile(sums, start, T, cols, WIDTH, STRIDE, C)
    return tl.exp(G) * end[None, :] if READER else tl.exp(end[None, :] - G)


@triton.jit
def readers(
    k, a, k_out, a_out, dy, dx, dden, states, before, Pq, Px, Pa, Pw, scale, over, sums, in_q, in_b,
    batch, T, h, start, N, cols,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, SHIFT: tl.constexpr, LATE: tl.constexpr, MILD: tl.constexpr,
    STRONG: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of what reads: q, and what corrects (the first again if nothing does), which is k with minus
    dx, or b. Pairs of a step with itself that have weights of their own are not in them; no pairs are if
    STRONG."""
    per_head = batch * T * H + h
    d = state_share(dy, states, start, T, cols, H, K, V, BK, BV, C, CT, PREC)
    if before is not None:
        d += vector(dden + per_head, start, T, H, C)[:, None] * before[None, :]
    d *= in_q
    if not STRONG:
        z = operand(k, k_out, over, batch, T, h, start, cols, H, R, K, C, False) * scale[:, None]
        d += pair_share(Pq, N, z, False, C, CT, PREC)
    e = d
    if RULE != "outer":
        e = state_share(dx + per_head * V, states, start, T, cols, H, K, V, BK, BV, C, CT, PREC) * in_b
        if not STRONG:
            e += pair_share(Px, N, z, False, C, CT, PREC)
    if RULE == "dplr" and not STRONG:
        z = operand(a, a_out, over, batch, T, h, start, cols, H, 1, K, C, False)
        d += pair_share(Pa, N, z, False, C, CT, PREC)
        e += pair_share(Pw, N, z, False, C, CT, PREC)
    if MILD:
        d *= fade(sums, over, start, T, cols, K, H * K, C, True, SHIFT == 1)
        if RULE != "outer":
            e *= fade(sums, over, start, T, cols, K, H * K, C, True, LATE == 1)
    return d, e


@triton.jit
def writers(
    q, k, a, b, q_in, k_out, b_in, a_out, value, w, dstates, after, Pq, Px, Pa, Pw, met, scale, over,
    last, sums, in_k, batch, T, h, start, N, cols,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, GATED: tl.constexpr, SHIFT: tl.constexpr, LATE: tl.constexpr,
    MILD: tl.constexpr, STRONG: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Gradients of what writes: k, still free of delta's β, and a (k's again if there is none); and `met`, to
    which their shares in the state after the chunk are added."""
    d = state_share(value, dstates, start, T, cols, H, K, V, BK, BV, C, CT, PREC)
    if after is not None:
        d += after[None, :]
    d *= in_k
    w_ = d
    if RULE == "dplr":
        w += (batch * T * H + h) * V
        w_ = state_share(w, dstates, start, T, cols, H, K, V, BK, BV, C, CT, PREC) * in_k
        z = operand(a, a_out, over, batch, T, h, start, cols, H, 1, K, C, False)
        met += tl.sum(z * w_, 0)
    if GATED:
        z = operand(k, k_out, over, batch, T, h, start, cols, H, R, K, C, False)
        met += tl.sum(z * d * scale[:, None], 0)
    if not STRONG:
        z = operand(q, q_in, over, batch, T, h, start, cols, H, R, K, C, True)
        d += pair_share(Pq, N, z, True, C, CT, PREC)
        if RULE == "dplr":
            w_ += pair_share(Pa, N, z, True, C, CT, PREC)
            z = operand(b, b_in, over, batch, T, h, start, cols, H, 1, K, C, True)
            d += pair_share(Px, N, z, True, C, CT, PREC)
            w_ += pair_share(Pw, N, z, True, C, CT, PREC)
        if RULE == "delta":
            z = operand(k, b_in, over, batch, T, h, start, cols, H, R, K, C, True)
            d -= pair_share(Px, N, z, True, C, CT, PREC)
    if MILD:
        faded = fade(sums, last, start, T, cols, K, H * K, C, False, False)
        d *= faded
        if RULE == "dplr":
            w_ *= faded
    return d, w_, met


@triton.jit
def gradients(
    q, k, a, b, q_in, k_out, b_in, a_out, u, strengths, g, G, lw, lr, seg, sums, ends, value, w, dy, dx, dden,
    states, nstates, dstates, dnstates, Pq, Px, Pa, Pw, own, own_a, dq, dk, da, db, dg, dweight, du, B, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, STRONG: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (key blocks, chunks, B·H). `value` is v, for delta the errors r without β; `dweight` is dβ or dlw.

    Per-head results (dg per head, dweight) are the key block's share (blocks, B, T, H), summed by the caller.
    b_in are the faded readers that correct: for delta k's. dg may be where `sums` is.
    """
    pk, n, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, h = (bh // H).to(tl.int64), bh % H
    i, cols = tl.arange(0, C), pk * BK + tl.arange(0, BK)
    start = batch * 0 + n * C
    N = bh.to(tl.int64) * tl.num_programs(1) + n
    SHIFT: tl.constexpr = 1 if u is not None else 0  # a bonus reads before the step's own decay
    LATE: tl.constexpr = 1 if RULE == "dplr" else 0  # and so does b
    MILD: tl.constexpr = DECAY == 2 and not STRONG
    per_head = batch * T * H + h
    wide = per_head * K
    share = pk.to(tl.int64) * B * T * H + per_head + (start + i) * H
    here = i < (T - start).to(tl.int32)
    value, dy = value + per_head * V, dy + per_head * V
    states, dstates = states + N * K * V, dstates + N * K * V
    if lw is not None:
        lw += bh.to(tl.int64) * T
    if lr is not None:
        lr += bh.to(tl.int64) * T
    if seg is not None:
        seg += batch * T
    read, reach, leave, through = rates(G, lw, lr, seg, N, start, T, C, DECAY, SHIFT)
    scale = row(strengths, N, C) if RULE == "delta" else tl.full((C,), 1.0, tl.float32)
    # what a state's share is multiplied with; if mild, all of it is then multiplied with `fade`
    in_q, in_b, in_k = read[:, None], reach[:, None], leave[:, None]
    over, last = scale, scale
    total = through + tl.zeros((BK,), tl.float32)
    if DECAY == 2:
        end = tl.load(ends + N * K + cols, mask=cols < K, other=1.0)
        total *= end
    if STRONG:
        if tl.min(end, 0) > LEAST:
            return
        gi = tile(g + wide, start, T, cols, K, H * K, C).to(tl.float32)
        in_q, in_b, in_k = strong_rates(g + wide, gi, in_q, in_b, in_k, start, T, cols, H, K, C, RULE, SHIFT)
    if MILD:
        sums += wide
        final = tl.minimum(C - 1, (T - 1 - start).to(tl.int32))
        last = tl.load(sums + (start + final) * (H * K) + cols, mask=cols < K, other=0.0)
        over = 1.0 / end
        in_q, in_b = in_q * end[None, :], in_b * end[None, :]
    out, late, met, before, after = scale, scale, total, None, None
    if dg is not None:
        met = meeting(states, dstates, cols, K, V, BK, BV) * total
    if nstates is not None:
        before = tl.load(nstates + N * K + cols, mask=cols < K, other=0.0)
        after = tl.load(dnstates + N * K + cols, mask=cols < K, other=0.0)
        met += before * after * total
    d, e = readers(
        k, a, k_out, a_out, dy, dx, dden, states, before, Pq, Px, Pa, Pw, scale, over, sums, in_q,
        in_b, batch, T, h, start, N, cols, H, R, K, V, BK, BV, C, RULE, SHIFT, LATE, MILD, STRONG, CT, PREC,
    )  # fmt: skip
    if STRONG:
        to_q, to_b, to_k, to_a = strong_shares(
            q, k, a, b, Pq, Px, Pa, Pw, scale, gi, batch, T, h, start, N, cols, H, R, K, C, RULE, SHIFT,
            CT, PREC,
        )  # fmt: skip
        d, e = d + to_q, e + to_b
    qf = heads(q, batch, T, h, start, cols, H, R, K, C)
    kf = heads(k, batch, T, h, start, cols, H, R, K, C)
    if dg is not None:
        out = qf * d if DECAY == 2 else tl.sum(qf * d, 1)
        if SHIFT == 1:
            late = out
            out = tl.zeros_like(late)
        if RULE == "delta":
            out -= kf * e if DECAY == 2 else tl.sum(kf * e, 1)
    if own is not None:  # the pair of a step with itself, which knows no decay
        mine = vector(own + per_head, start, T, H, C)[:, None]
        if u is not None:
            uf = tl.load(u + h * K + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
            tl.store(du + N * K + cols, tl.sum(mine * qf * kf, 0), mask=cols < K)
            mine *= uf
        d += mine * kf
    if RULE == "dplr":
        late = heads(b, batch, T, h, start, cols, H, 1, K, C) * e
        put(db + wide, e, start, T, cols, K, H * K, C)
        mine_a = vector(own_a + per_head, start, T, H, C)[:, None]
        d += mine_a * heads(a, batch, T, h, start, cols, H, 1, K, C)
    put(dq + wide, d, start, T, cols, K, H * K, C)
    # k's gradient stays free of delta's β until k · dk was taken, which is dβ
    d, w_, met = writers(
        q, k, a, b, q_in, k_out, b_in, a_out, value, w, dstates, after, Pq, Px, Pa, Pw, met, scale,
        over, last, sums, in_k, batch, T, h, start, N, cols, H, R, K, V, BK, BV, C, RULE, dg is not None,
        SHIFT, LATE, MILD, STRONG, CT, PREC,
    )  # fmt: skip
    if STRONG:
        d, w_ = d + to_k, w_ + to_a
    kf = heads(k, batch, T, h, start, cols, H, R, K, C)
    if dg is not None:
        out -= kf * d * scale[:, None] if DECAY == 2 else tl.sum(kf * d, 1) * scale
    if own is not None:
        d += mine * heads(q, batch, T, h, start, cols, H, R, K, C)
    if dweight is not None:
        tl.store(dweight + share, tl.sum(kf * d, 1), mask=here)
    d *= scale[:, None]
    put(dk + wide, d - e if RULE == "delta" else d, start, T, cols, K, H * K, C)
    if RULE == "dplr":
        out -= heads(a, batch, T, h, start, cols, H, 1, K, C) * w_
        w_ += mine_a * heads(q, batch, T, h, start, cols, H, R, K, C)
        put(da + wide, w_, start, T, cols, K, H * K, C)
    if dg is not None:
        omega = tl.cumsum(out, 0, reverse=True)
        if SHIFT == 1 or RULE == "dplr":
            omega += tl.cumsum(late, 0, reverse=True) - late
        if DECAY == 2:
            put(dg + wide, omega + met[None, :], start, T, cols, K, H * K, C)
        else:
            tl.store(dg + share, omega + tl.sum(met, 0), mask=here)
