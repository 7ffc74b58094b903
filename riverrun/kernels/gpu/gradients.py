"""The parallel half of the backward: every chunk's gradients from the states and state gradients around it.

A reader ρ_i with adjoint α_i (q with dy, what corrects with dx) and a writer κ_j with value ε_j meet in the
weight P_ij = α_i · ε_j of a pair and, through the states before and after the chunk, in S α_i and dS ε_j:

    dρ_i = Σ_j P_ij e^{G_i - G_j} κ_j + e^{G_i} S α_i
    dκ_j = Σ_i P_ij e^{G_i - G_j} ρ_i + e^{G_C - G_j} dS ε_j

G_i enters where ρ_i reads and -G_j where κ_j writes, so with ω_i = Σ_ρ ρ_i ⊙ dρ_i - Σ_κ κ_i ⊙ dκ_i and S'
the state after the chunk (so that the sum never leaves the chunk)

    dg_t = Σ_{i ≥ t} ω_i + rowsum(S' ⊙ dS)
"""

import triton
import triton.language as tl

from .chunk import (
    LEVELS,
    MILD,
    across_level,
    between,
    decays,
    level,
    put,
    rates,
    segments,
    shifted,
    tile,
    vector,
)


@triton.jit
def suffix(x):
    """Sum over this and all later rows."""
    return tl.sum(x, 0)[None, :] - tl.cumsum(x, 0) + x


@triton.jit
def meet_state(
    value, w, dy, dx, base, states, dstates, start, T, cols,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    RULE: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What needs the values: pair weights P and their transposes T, the states' share of the gradients,
    rowsum(S ⊙ dS)."""
    Pq, Pa = tl.zeros((C, C), tl.float32), tl.zeros((C, C), tl.float32)
    Px, Pw, Tq, Tx, Ta, Tw = Pq, Pq, Pq, Pq, Pq, Pq
    dq_, dk_ = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    da_, db_ = dq_, dq_
    ends = tl.zeros((BK,), tl.float32)
    # P and its transpose are two products: Triton before 3.7.1 miscompiles, on Hopper, a product whose left
    # operand is the transpose of a product
    for j in range(0, V, BV):
        across = j + tl.arange(0, BV)
        at = cols[:, None] * V + across[None, :]
        inside = (cols < K)[:, None] & (across < V)[None, :]
        S, dS = tl.load(states + at, mask=inside, other=0.0), tl.load(dstates + at, mask=inside, other=0.0)
        ends += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
        St, dSt = tl.trans(S.to(CT)), tl.trans(dS.to(CT))
        dy_ = tile(dy + base, start, T, across, V, H * V, C).to(CT)
        v_ = tile(value + base, start, T, across, V, H * V, C).to(CT)
        dyt, vt = tl.trans(dy_), tl.trans(v_)
        Pq += tl.dot(dy_, vt, input_precision=PREC)
        Tq += tl.dot(v_, dyt, input_precision=PREC)
        dq_ += tl.dot(dy_, St, input_precision=PREC)
        dk_ += tl.dot(v_, dSt, input_precision=PREC)
        if RULE != "outer":
            x_ = tile(dx + base, start, T, across, V, H * V, C).to(CT)
            xt = tl.trans(x_)
            Px += tl.dot(x_, vt, input_precision=PREC)
            Tx += tl.dot(v_, xt, input_precision=PREC)
            db_ += tl.dot(x_, St, input_precision=PREC)
        if RULE == "dplr":
            w_ = tile(w + base, start, T, across, V, H * V, C).to(CT)
            wt = tl.trans(w_)
            Pa += tl.dot(dy_, wt, input_precision=PREC)
            Ta += tl.dot(w_, dyt, input_precision=PREC)
            Pw += tl.dot(x_, wt, input_precision=PREC)
            Tw += tl.dot(w_, xt, input_precision=PREC)
            da_ += tl.dot(w_, dSt, input_precision=PREC)
    return Pq, Tq, Px, Tx, Pa, Ta, Pw, Tw, dq_, dk_, da_, db_, ends


@triton.jit
def decay_gradient(q, k, a, b, dq, dk, da, db, ends, RULE: tl.constexpr, SHIFT: tl.constexpr):
    """dg per key from readers and writers with their gradients; what reads before a step's own decay counts
    later."""
    omega, later = -k * dk, q * dq
    if SHIFT == 0:
        omega += q * dq
    if RULE == "delta":
        omega += k * db
    if RULE == "dplr":
        omega -= a * da
        later = b * db
    omega = suffix(omega) + ends[None, :]
    if SHIFT == 1 or RULE == "dplr":
        omega += suffix(later) - later
    return omega


@triton.jit
def meet_keys(
    Pq, Px, Pa, Pw, Tq, Tx, Ta, Tw, q, k, a, b, g, G, G_before, last, scale, see, seen,
    C: tl.constexpr, BK: tl.constexpr, RULE: tl.constexpr, SHIFT: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """All pairs' share of dq, dk, da, db with decays per key: at once if they are mild, else level by
    level."""
    EARLY: tl.constexpr = SHIFT == 1 or RULE == "dplr"
    dq, dk = tl.zeros((C, BK), tl.float32), tl.zeros((C, BK), tl.float32)
    da, db = dq, dq
    if tl.min(last, 0) > MILD:
        fr, fw = tl.exp(G - last[None, :]), tl.exp(last[None, :] - G)
        fb = tl.exp(G_before - last[None, :]) if EARLY else fr
        dq, dk, da, db = meet(
            Pq, Px, Pa, Pw, Tq, Tx, Ta, Tw, q, k, a, b, fb if SHIFT == 1 else fr, fr, fb, fw, scale,
            see, seen, RULE, CT, PREC,
        )  # fmt: skip
    else:
        for tier in range(0, LEVELS(C)):
            f = between(g, tier, 0, C)
            early = between(g, tier, 1, C) if EARLY else f
            part = meet(
                Pq, Px, Pa, Pw, Tq, Tx, Ta, Tw, q, k, a, b, early if SHIFT == 1 else f, f, early, f, scale,
                level(tier, C) & see, across_level(tier, C) & seen, RULE, CT, PREC,
            )  # fmt: skip
            dq, dk, da, db = dq + part[0], dk + part[1], da + part[2], db + part[3]
    return dq, dk, da, db


@triton.jit
def between_steps(
    G, lw, see, seen, start, T, H: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, SHIFT: tl.constexpr
):
    """Decays per head and write weights of all pairs, and their transpose."""
    i = tl.arange(0, C)
    rate = tl.zeros((C, C), tl.float32) + 1.0
    etar = rate
    if DECAY == 1:
        Gs, Gq = decays(G, start, T, i, H), decays(G, start, T, i - SHIFT, H)
        rate = tl.exp(tl.where(see, Gq[:, None] - Gs[None, :], 0.0))
        etar = tl.exp(tl.where(seen, Gq[None, :] - Gs[:, None], 0.0))
    if lw is not None:
        write = tl.exp(vector(lw, start, T, H, C))
        rate *= write[None, :]
        etar *= write[:, None]
    return rate, etar


@triton.jit
def gradients(
    q, k, a, b, u, beta, g, G, lw, seg, value, w, dy, dx, dden, states, nstates, dstates, dnstates,
    dq, dk, da, db, dg, dweight, du, B, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, RULE: tl.constexpr, DECAY: tl.constexpr, NORM: tl.constexpr, CT: tl.constexpr,
    PREC: tl.constexpr,
):  # fmt: skip
    """Grid (chunks, key blocks, B·H). `value` is v, for delta the errors r without β; `dweight` is dβ or dlw.

    Per-head results (dg per head, dweight) are the key block's share (blocks, B, T, H), summed by the caller.
    """
    n, pk, bh = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, h = (bh // H).to(tl.int64), bh % H
    GH: tl.constexpr = H // R
    i, cols = tl.arange(0, C), pk * BK + tl.arange(0, BK)
    start = batch * 0 + n * C
    N = bh.to(tl.int64) * tl.num_programs(0) + n
    group, wide = (batch * T * GH + h // R) * K, (batch * T * H + h) * K
    per_head = batch * T * H + h
    SHIFT: tl.constexpr = 1 if u is not None else 0  # a bonus reads before the step's own decay
    Pq, Tq, Px, Tx, Pa, Ta, Pw, Tw, dq_, dk_, da_, db_, ends = meet_state(
        value, w, dy, dx, per_head * V,
        states + N * K * V, dstates + N * K * V, start, T, cols, H, K, V, BK, BV, C, RULE, CT, PREC,
    )  # fmt: skip
    if NORM:
        fed = vector(dden + per_head, start, T, H, C)
        before_n = tl.load(nstates + N * K + cols, mask=cols < K, other=0.0)
        after_n = tl.load(dnstates + N * K + cols, mask=cols < K, other=0.0)
        Pq += fed[:, None]
        Tq += fed[None, :]
        dq_ += fed[:, None] * before_n[None, :]
        dk_ += after_n[None, :]
        ends += before_n * after_n
    if RULE == "delta":  # what corrects is k, with minus dx
        Px, Tx, db_ = -Px, -Tx, -db_
    if G is not None:
        G += per_head
    if lw is not None:
        lw += per_head
    see, seen = i[:, None] > i[None, :], i[:, None] < i[None, :]
    if seg is not None:
        seg += batch * T
        number, _, _ = segments(seg, start, T, C)
        together = number[:, None] == number[None, :]
        see, seen = see & together, seen & together
    read, reach, leave, through = rates(G, lw, seg, start, T, H, C, DECAY, SHIFT)
    qf = tile(q + group, start, T, cols, K, GH * K, C).to(tl.float32)
    kf = tile(k + group, start, T, cols, K, GH * K, C).to(tl.float32)
    af, bf = kf, kf
    if RULE == "dplr":
        af = tile(a + wide, start, T, cols, K, H * K, C).to(tl.float32)
        bf = tile(b + wide, start, T, cols, K, H * K, C).to(tl.float32)
    # the states' share, with the factors of what reads (f) and of what is written
    if DECAY == 2:
        gi = tile(g + wide, start, T, cols, K, H * K, C).to(tl.float32)
        Gi, last = tl.cumsum(gi, 0), tl.sum(gi, 0)
        Gb = Gi
        if RULE == "dplr" or SHIFT == 1:
            Gb = tl.cumsum(shifted(g + wide, start, T, cols, K, H * K, C), 0)
        fr, fb = tl.exp(Gi) * reach[:, None], tl.exp(Gb) * reach[:, None]
        fq, fw = fb if SHIFT == 1 else fr, tl.exp(last[None, :] - Gi) * leave[:, None]
        ends *= through * tl.exp(last)
    else:
        rate, etar = between_steps(G, lw, see, seen, start, T, H, C, DECAY, SHIFT)
        fq, fr, fb, fw = read[:, None], reach[:, None], reach[:, None], leave[:, None]
        ends *= through
    dq_, dk_, da_, db_ = dq_ * fq, dk_ * fw, da_ * fw, db_ * (fb if RULE == "dplr" else fr)
    if RULE == "dplr":
        ends += tl.sum(af * da_, 0)
    scale = tl.full((C,), 1.0, tl.float32)
    if RULE == "delta":
        scale = vector(beta + per_head, start, T, H, C)
    ends += tl.sum(kf * dk_ * scale[:, None], 0)
    # the pairs' share; dk_ stays free of delta's β until the end, because k · dk_ is then dβ
    if DECAY == 2:
        part = meet_keys(
            Pq.to(CT), Px.to(CT), Pa.to(CT), Pw.to(CT), Tq.to(CT), Tx.to(CT), Ta.to(CT), Tw.to(CT),
            qf, kf, af, bf, gi, Gi, Gb, last, scale, see, seen, C, BK, RULE, SHIFT, CT, PREC,
        )  # fmt: skip
        dq_, dk_, da_, db_ = dq_ + part[0], dk_ + part[1], da_ + part[2], db_ + part[3]
    else:
        kx = (kf * scale[:, None]).to(CT)
        dq_ += tl.dot(tl.where(see, Pq * rate, 0.0).to(CT), kx, input_precision=PREC)
        dk_ += tl.dot(tl.where(seen, Tq * etar, 0.0).to(CT), qf.to(CT), input_precision=PREC)
        if RULE == "delta":
            db_ += tl.dot(tl.where(see, Px * rate, 0.0).to(CT), kx, input_precision=PREC)
            dk_ += tl.dot(tl.where(seen, Tx * etar, 0.0).to(CT), kf.to(CT), input_precision=PREC)
    eye = i[:, None] == i[None, :]
    own = tl.sum(tl.where(eye, Pq, 0.0), 1)
    share = pk.to(tl.int64) * B * T * H + per_head + (start + i) * H
    if dg is not None:  # the pair of a step with itself knows no decay and is left out
        omega = decay_gradient(qf, kf, af, bf, dq_, dk_ * scale[:, None], da_, db_, ends, RULE, SHIFT)
        if DECAY == 2:
            put(dg + wide, omega, start, T, cols, K, H * K, C)
        else:
            tl.store(dg + share, tl.sum(omega, 1), mask=i < (T - start).to(tl.int32))
    if lw is not None:
        own *= tl.exp(vector(lw, start, T, H, C))
    if u is not None:
        uf = tl.load(u + h * K + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]
        tl.store(du + N * K + cols, tl.sum(own[:, None] * qf * kf, 0), mask=cols < K)
        dq_, dk_ = dq_ + own[:, None] * uf * kf, dk_ + own[:, None] * uf * qf
    else:
        dq_, dk_ = dq_ + (own * scale)[:, None] * kf, dk_ + own[:, None] * qf
    if RULE == "dplr":
        own_a = tl.sum(tl.where(eye, Pa, 0.0), 1)
        dq_, da_ = dq_ + own_a[:, None] * af, da_ + own_a[:, None] * qf
        put(da + wide, da_, start, T, cols, K, H * K, C)
        put(db + wide, db_, start, T, cols, K, H * K, C)
    if dweight is not None:
        tl.store(dweight + share, tl.sum(kf * dk_, 1), mask=i < (T - start).to(tl.int32))
    if RULE == "delta":
        dk_ = dk_ * scale[:, None] + db_
    put(dq + wide, dq_, start, T, cols, K, H * K, C)
    put(dk + wide, dk_, start, T, cols, K, H * K, C)


@triton.jit
def meet(
    Pq, Px, Pa, Pw, Tq, Tx, Ta, Tw, q, k, a, b, fq, fk, fb, write, scale, mask, ksam,
    RULE: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One part's share of dq, dk (free of delta's β), da and db; f* are the readers' factors, T* are P*
    transposed."""
    kx, qx = (k * write * scale[:, None]).to(CT), (q * fq).to(CT)
    dq = tl.dot(tl.where(mask, Pq, 0.0).to(CT), kx, input_precision=PREC)
    dk = tl.dot(tl.where(ksam, Tq, 0.0).to(CT), qx, input_precision=PREC)
    da, db = dq, dq
    if RULE == "delta":
        db = fk * tl.dot(tl.where(mask, Px, 0.0).to(CT), kx, input_precision=PREC)
        dk += tl.dot(tl.where(ksam, Tx, 0.0).to(CT), (k * fk).to(CT), input_precision=PREC)
    if RULE == "dplr":
        ax, bx = (a * write).to(CT), (b * fb).to(CT)
        db = tl.dot(tl.where(mask, Px, 0.0).to(CT), kx, input_precision=PREC)
        dk += tl.dot(tl.where(ksam, Tx, 0.0).to(CT), bx, input_precision=PREC)
        dq += tl.dot(tl.where(mask, Pa, 0.0).to(CT), ax, input_precision=PREC)
        da = tl.dot(tl.where(ksam, Ta, 0.0).to(CT), qx, input_precision=PREC)
        db += tl.dot(tl.where(mask, Pw, 0.0).to(CT), ax, input_precision=PREC)
        da += tl.dot(tl.where(ksam, Tw, 0.0).to(CT), bx, input_precision=PREC)
        da, db = da * write, db * fb
    return dq * fq, dk * write, da, db
