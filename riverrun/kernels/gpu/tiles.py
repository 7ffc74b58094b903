"""Linear recurrences h_t = a_t h_{t-1} + b_t on tiles of S segments of L steps of C channels, in float32
registers.

A tile is indexed [segment, step, channel] and its time is segment · L + step. Triton spreads threads over
channels, then segments, and keeps the steps of one segment in one thread: the scan over steps is L
multiply-adds, and only one pair a segment is exchanged between threads. A carry (C) links one tile with the
next.

A tile of rows is the same as [step, segment · C + channel]. Complex numbers come from memory in such tiles,
as pairs of neighbouring channels, so that they are loaded 16 bytes at a time as real ones are.

Complex numbers travel as two tensors; where COMPLEX is false the second is the first and nobody reads it.
"""

import torch
import triton
import triton.language as tl

from .launch import cdiv, power_of_2


@triton.jit
def _join(a1, b1, a2, b2):
    return a2 * a1, a2 * b1 + b2


@triton.jit
def _join_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2):
    return (
        ar2 * ar1 - ai2 * ai1,
        ar2 * ai1 + ai2 * ar1,
        ar2 * br1 - ai2 * bi1 + br2,
        ar2 * bi1 + ai2 * br1 + bi2,
    )


@triton.jit
def _join_before(a1, b1, p1, q1, a2, b2, p2, q2):
    """(a, b) as `_join`; (p, q) is all but the last element."""
    return a2 * a1, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton.jit
def _join_before_complex(
    ar1, ai1, br1, bi1, pr1, pi1, qr1, qi1, ar2, ai2, br2, bi2, pr2, pi2, qr2, qi2
):  # fmt: skip
    ar, ai, br, bi = _join_complex(ar1, ai1, br1, bi1, ar2, ai2, br2, bi2)
    pr, pi, qr, qi = _join_complex(ar1, ai1, br1, bi1, pr2, pi2, qr2, qi2)
    return ar, ai, br, bi, pr, pi, qr, qi


@triton.jit
def last(x, AXIS: tl.constexpr):
    """The last entry along axis 1 of (S, L, C) or axis 0 of two."""
    if AXIS == 1:
        i = tl.arange(0, x.shape[1])[None, :, None]
    else:
        i = tl.arange(0, x.shape[0])[:, None]
    return tl.sum(tl.where(i == x.shape[AXIS] - 1, x, 0), AXIS)


@triton.jit
def sweep(a, b, carry):
    """All h of a tile that begins from `carry` (C), the last of them (C), and the product of all a (C)."""
    inner_a, inner_b = tl.associative_scan((a, b), 1, _join)
    seg_a, seg_b = last(inner_a, 1), last(inner_b, 1)
    one, zero = tl.full(seg_a.shape, 1.0, tl.float32), tl.zeros(seg_a.shape, tl.float32)
    through_a, through_b, before_a, before_b = tl.associative_scan((seg_a, seg_b, one, zero), 0, _join_before)
    enter, end = before_a * carry[None, :] + before_b, through_a * carry[None, :] + through_b
    # across threads: once for the carry, and for the product only where somebody uses it
    return inner_a * enter[:, None, :] + inner_b, last(end, 0), last(through_a, 0)


@triton.jit
def enter_rows(seg_a, seg_b, carry, AGAINST: tl.constexpr):
    """From (product, end from zero) of every segment (S · C) what enters it; what leaves the tile and the
    product of all a (C)."""
    C: tl.constexpr = carry.shape[0]
    S: tl.constexpr = seg_a.shape[0] // C
    a, b = tl.reshape(seg_a, [S, C]), tl.reshape(seg_b, [S, C])
    one, zero = tl.full([S, C], 1.0, tl.float32), tl.zeros([S, C], tl.float32)
    through_a, through_b, before_a, before_b = tl.associative_scan(
        (a, b, one, zero), 0, _join_before, reverse=AGAINST
    )
    # across threads: once for the carry, and for the product only where somebody uses it
    left = tl.arange(0, S)[:, None] == (0 if AGAINST else S - 1)
    end = tl.sum(tl.where(left, through_a * carry[None, :] + through_b, 0), 0)
    product = tl.sum(tl.where(left, through_a, 0), 0)
    return tl.reshape(before_a * carry[None, :] + before_b, [S * C]), end, product


@triton.jit
def sweep_rows(a, b, carry):
    """`sweep` on a tile of rows."""
    inner_a, inner_b = tl.associative_scan((a, b), 0, _join)
    enter, end, product = enter_rows(last(inner_a, 0), last(inner_b, 0), carry, False)
    return inner_a * enter[None, :] + inner_b, end, product


@triton.jit
def sweep_complex(ar, ai, br, bi, cr, ci):
    """`sweep_rows` on real and imaginary parts: h, carry and product, each as two tensors."""
    C: tl.constexpr = cr.shape[0]
    S: tl.constexpr = ar.shape[1] // C
    iar, iai, ibr, ibi = tl.associative_scan((ar, ai, br, bi), 0, _join_complex)
    sar, sai = tl.reshape(last(iar, 0), [S, C]), tl.reshape(last(iai, 0), [S, C])
    sbr, sbi = tl.reshape(last(ibr, 0), [S, C]), tl.reshape(last(ibi, 0), [S, C])
    one, zero = tl.full([S, C], 1.0, tl.float32), tl.zeros([S, C], tl.float32)
    tar, tai, tbr, tbi, par, pai, pbr, pbi = tl.associative_scan(
        (sar, sai, sbr, sbi, one, zero, zero, zero), 0, _join_before_complex
    )
    er = tl.reshape(par * cr[None, :] - pai * ci[None, :] + pbr, [S * C])[None, :]
    ei = tl.reshape(par * ci[None, :] + pai * cr[None, :] + pbi, [S * C])[None, :]
    hr, hi = iar * er - iai * ei + ibr, iar * ei + iai * er + ibi
    endr, endi = tar * cr[None, :] - tai * ci[None, :] + tbr, tar * ci[None, :] + tai * cr[None, :] + tbi
    return hr, hi, last(endr, 0), last(endi, 0), last(tar, 0), last(tai, 0)


@triton.jit
def flags(reset, at, inside):
    """reset (uint8) at these times, false where not inside."""
    return tl.load(reset + at, mask=inside, other=0) != 0


@triton.jit
def spread(x, C: tl.constexpr):
    """What is known by (step, segment) for every channel of a tile of rows."""
    L: tl.constexpr = x.shape[0]
    S: tl.constexpr = x.shape[1]
    return tl.reshape(tl.broadcast_to(x[:, :, None], [L, S, C]), [L, S * C])


def shape(T: int, channels: int, batch: int, vector: int, steps: int) -> tuple[int, int, int, int]:
    """(S, L, C, warps) by rule: every thread one load of `vector` channels wide and at most `steps` deep.

    C is as wide as leaves a program for nearly every multiprocessor, and sixteen at least. S · C is what the
    threads hold at once, so that none of a segment's steps go to another thread.
    """
    C = min(128, max(power_of_2(channels), 2))
    while C > 16 and batch * cdiv(channels, C) < 128:
        C //= 2
    warps, whole = 4, power_of_2(T)
    S = max(1, min(warps * 32 * vector // C, whole))
    L = max(1, min(steps, whole // S))
    while warps > 1 and warps * 32 * vector > S * C:
        warps //= 2
    return S, L, C, warps


def flat(x: torch.Tensor | None) -> torch.Tensor | None:
    """Contiguous; complex numbers as pairs in a last axis, flags as bytes."""
    if x is None:
        return None
    x = x.contiguous()
    if x.dtype == torch.bool:
        return x.view(torch.uint8)
    return torch.view_as_real(x) if x.is_complex() else x
