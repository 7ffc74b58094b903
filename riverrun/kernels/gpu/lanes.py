"""Linear recurrences on tiles whose lanes are channels, [step, segment · LANES + channel], in float32
registers.

A warp holds one segment, LENGTH steps of LANES neighbouring channels, every thread the steps of one of them.
So a scan over steps stays in a thread, only one pair a segment goes from warp to warp, and what is the same
for all channels is the same for a warp. Triton would rather give a thread as many neighbouring channels as
one load takes; it does not if it cannot know how they are aligned. So addresses have a `shift` of 0 added
that is not compiled in.

For what is done often with what was read once (`selective`); where loads are all there is, `tiles`.
"""

import triton
import triton.language as tl

from .tiles import enter_rows

LANES = tl.constexpr(32)
LENGTH = tl.constexpr(16)


@triton.jit
def places(S: tl.constexpr):
    """Of a tile from step 0: times, those by (step, segment); channels of the tile, and of one segment."""
    i, j = tl.arange(0, LENGTH)[:, None], tl.arange(0, S * LANES)[None, :]
    first = tl.program_id(0) * LANES
    seg = tl.arange(0, S)[None, :] * LENGTH + i
    return j // LANES * LENGTH + i, seg, first + j % LANES, first + tl.arange(0, LANES)


@triton.jit
def sweep_before(a, b, carry, AGAINST: tl.constexpr):
    """The h that enters each step of a tile, with time or AGAINST it, the h that leaves the tile, and the
    product of all a."""
    step = tl.arange(0, LENGTH)[:, None]
    p, q = tl.zeros(a.shape, tl.float32), tl.zeros(a.shape, tl.float32)
    seg_a, seg_b = tl.full([a.shape[1]], 1.0, tl.float32), tl.zeros([a.shape[1]], tl.float32)
    for i in tl.static_range(LENGTH):
        here = step == (LENGTH - 1 - i if AGAINST else i)
        p, q = tl.where(here, seg_a[None, :], p), tl.where(here, seg_b[None, :], q)
        a_, b_ = tl.sum(tl.where(here, a, 0), 0), tl.sum(tl.where(here, b, 0), 0)
        seg_a, seg_b = a_ * seg_a, a_ * seg_b + b_
    enter, end, product = enter_rows(seg_a, seg_b, carry, AGAINST)
    return p * enter[None, :] + q, end, product


@triton.jit
def _halve(x):
    """(rows, S, K, N): rows r and r + half of them, each summed over the halves of N, side by side in K."""
    R: tl.constexpr = x.shape[0] // 2
    S: tl.constexpr = x.shape[1]
    K: tl.constexpr = x.shape[2]
    N: tl.constexpr = x.shape[3] // 2
    halves = tl.sum(tl.reshape(x, [2, R, S, K, 2, N]), 4)
    one, other = tl.split(tl.permute(halves, (1, 2, 3, 4, 0)))
    first = tl.arange(0, 2)[None, None, None, :, None] == 0
    return tl.reshape(tl.where(first, one[:, :, :, None, :], other[:, :, :, None, :]), [R, S, 2 * K, N])


@triton.jit
def sums(x, y):
    """Over channels, those of two tiles: (S, 2 LENGTH). Every exchange between lanes halves what is left,
    which takes 62 of them, where a sum for each of the 32 takes 160."""
    tl.static_assert(2 * LENGTH == LANES)
    S: tl.constexpr = x.shape[1] // LANES
    z = tl.reshape(tl.permute(tl.join(x, y), (2, 0, 1)), [2 * LENGTH, S, 1, LANES])
    for _ in tl.static_range(5):
        z = _halve(z)
    return tl.reshape(z, [S, 2 * LENGTH])
