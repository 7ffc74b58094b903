"""Gradients of chunks in which decays per key are too strong for one anchor: level by level (see `chunk.py`),
each with anchors of its own, whose factors serve the pairs of all tensors."""

import triton
import triton.language as tl

from .chunk import LEVELS, between, heads, level, shifted, square


@triton.jit
def strong_rates(
    g, gi, in_q, in_b, in_k, start, T, cols,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, RULE: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """What a state's share is multiplied with, with decays per key in it."""
    G, last = tl.cumsum(gi, 0), tl.sum(gi, 0)
    early = tl.cumsum(shifted(g, start, T, cols, K, H * K, C), 0)
    in_q = in_q * tl.exp(early if SHIFT == 1 else G)
    return in_q, in_b * tl.exp(early if RULE == "dplr" else G), in_k * tl.exp(last[None, :] - G)


@triton.jit
def met_both_ways(
    P, N, reader, writer, read, write, at, C: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr
):
    """Σ_j P_ij e^{G_i - G_j} writer_j and Σ_i P_ij e^{G_i - G_j} reader_i over the pairs `at` of a level."""
    P_ = tl.where(at, tl.load(square(P, N, C)), 0.0).to(CT)
    ours = tl.dot(P_, (writer * write).to(CT), input_precision=PREC)
    theirs = tl.dot(tl.trans(P_), (reader * read).to(CT), input_precision=PREC)
    return read * ours, write * theirs


@triton.jit
def strong_shares(
    q, k, a, b, Pq, Px, Pa, Pw, scale, g, batch, T, h, start, N, cols,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, C: tl.constexpr, RULE: tl.constexpr,
    SHIFT: tl.constexpr, CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """What pairs give to q, to what corrects, to k and to a."""
    i = tl.arange(0, C)
    q_ = heads(q, batch, T, h, start, cols, H, R, K, C)
    k_ = heads(k, batch, T, h, start, cols, H, R, K, C)
    written = k_ * scale[:, None]
    own = tl.where(i[:, None] == i[None, :], tl.load(square(Pq, N, C)).to(tl.float32), 0.0)
    own = tl.sum(own, 1)[:, None]
    to_q, to_k = own * written, own * q_
    to_b, to_a = tl.zeros_like(to_q), tl.zeros_like(to_q)
    if RULE == "dplr":
        a_ = heads(a, batch, T, h, start, cols, H, 1, K, C)
        b_ = heads(b, batch, T, h, start, cols, H, 1, K, C)
    for tier in range(0, LEVELS(C)):
        at, f = level(tier, C), between(g, tier, 0, C)
        early = between(g, tier, 1, C) if SHIFT == 1 or RULE == "dplr" else f
        read = early if SHIFT == 1 else f
        x, y = met_both_ways(Pq, N, q_, written, read, f, at, C, CT, PREC)
        to_q, to_k = to_q + x, to_k + y
        if RULE == "delta":
            x, y = met_both_ways(Px, N, k_, written, f, f, at, C, CT, PREC)
            to_b, to_k = to_b + x, to_k - y
        if RULE == "dplr":
            x, y = met_both_ways(Px, N, b_, written, early, f, at, C, CT, PREC)
            to_b, to_k = to_b + x, to_k + y
            x, y = met_both_ways(Pa, N, q_, a_, f, f, at, C, CT, PREC)
            to_q, to_a = to_q + x, to_a + y
            x, y = met_both_ways(Pw, N, b_, a_, early, f, at, C, CT, PREC)
            to_b, to_a = to_b + x, to_a + y
    return to_q, to_b, to_k, to_a
