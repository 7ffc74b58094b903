"""Softmax attention of one step on a GPU, over a cache of which only so many steps count: decoding.

    y_h = Σ_s softmax_s(q_hᵀ k_s / sqrt(K)) v_s    start ≤ s ≤ filled    head h reads group h // R

q: (B, H, K)    kv: (B, 2G, n, K), keys above values    start, filled: (B)    y: (B, H, K)

A cache is cut into parts, so that one sequence fills the chip; each part gives its mean and the log of its
weight, and a second launch adds them. How much of n counts is read on the GPU: the same launches do for every
step, so a CUDA graph can hold them. All of it is summed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DEVICE, cdiv, launch, power_of_2, scratch
from .plan import processors

BLOCK = tl.constexpr(64)  # steps of a tile
WIDEST = 256  # of a head
LEAST = 4  # tiles a part of a full cache
TOGETHER = tl.constexpr(32)  # parts that are added at once


@triton.jit
def parts(
    q, kv, start, filled, means, logs, n, LENGTH,
    G: tl.constexpr, R: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    CT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (parts of LENGTH steps, B·G). means (B·G, parts, R, K), logs (B·G, parts, R): -inf of nothing."""
    part, bg = tl.program_id(0), tl.program_id(1)
    b, g = (bg // G).to(tl.int64), bg % G
    r, c, i = tl.arange(0, BR), tl.arange(0, BK), tl.arange(0, BLOCK)
    inside = (r < R)[:, None] & (c < K)[None, :]
    q_ = tl.load(q + ((b * G + g) * R + r[:, None]) * K + c[None, :], mask=inside, other=0.0).to(CT)
    low = tl.maximum(tl.load(start + b), part * LENGTH).to(tl.int32)
    high = tl.minimum(tl.load(filled + b) + 1, (part + 1) * LENGTH).to(tl.int32)
    keys, values = kv + (b * 2 * G + g) * n * K, kv + (b * 2 * G + G + g) * n * K
    scale = 1.4426950408889634 / tl.sqrt(K * 1.0)  # weights are powers of two
    top, weight = tl.full([BR], float("-inf"), tl.float32), tl.zeros([BR], tl.float32)
    total = tl.zeros([BR, BK], tl.float32)
    for s0 in range(low // BLOCK * BLOCK, high, BLOCK):
        s = s0 + i
        counts = (s >= low) & (s < high)
        at, known = s.to(tl.int64)[:, None] * K + c[None, :], counts[:, None] & (c < K)[None, :]
        k_ = tl.load(keys + at, mask=known, other=0.0).to(CT)
        v_ = tl.load(values + at, mask=known, other=0.0).to(CT)
        score = tl.dot(q_, tl.trans(k_), input_precision=PREC) * scale
        score = tl.where(counts[None, :], score, float("-inf"))
        new = tl.maximum(top, tl.max(score, 1))
        safe = tl.where(new == float("-inf"), 0.0, new)  # while nothing counts
        fade, share = tl.exp2(top - safe), tl.exp2(score - safe[:, None])
        weight = weight * fade + tl.sum(share, 1)
        total = total * fade[:, None] + tl.dot(share.to(CT), v_, input_precision=PREC)
        top = new
    here = bg.to(tl.int64) * tl.num_programs(0) + part
    some = tl.where(weight > 0.0, weight, 1.0)
    tl.store(means + (here * R + r[:, None]) * K + c[None, :], total / some[:, None], mask=inside)
    tl.store(logs + here * R + r, top + tl.log2(some), mask=r < R)


@triton.jit
def add(means, logs, y, PARTS, R: tl.constexpr, K: tl.constexpr, BK: tl.constexpr):
    """Grid (R, B·G)."""
    r, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p, c = tl.arange(0, TOGETHER), tl.arange(0, BK)
    top, weight, total = float("-inf"), 0.0, tl.zeros([BK], tl.float32)
    for p0 in range(0, PARTS, TOGETHER):
        here = (bg * PARTS + p0 + p) * R + r
        known = p0 + p < PARTS
        log = tl.load(logs + here, mask=known, other=float("-inf"))
        at, inside = here[:, None] * K + c[None, :], known[:, None] & (c < K)[None, :]
        mean = tl.load(means + at, mask=inside, other=0.0)
        new = tl.maximum(top, tl.max(log, 0))
        safe = tl.where(new == float("-inf"), 0.0, new)
        fade, share = tl.exp2(top - safe), tl.exp2(log - safe)
        total = total * fade + tl.sum(share[:, None] * mean, 0)
        weight = weight * fade + tl.sum(share, 0)
        top = new
    tl.store(y + (bg * R + r) * K + c, (total / weight).to(y.dtype.element_ty), mask=c < K)


def attend(q: Tensor, kv: Tensor, start: Tensor, filled: Tensor) -> Tensor:
    """y for the step that is the last to count."""
    (B, H, K), G, n = q.shape, kv.shape[1] // 2, kv.shape[2]
    R = H // G
    most = max(1, 4 * processors(q.device) // (B * G))
    length = cdiv(cdiv(n, most), BLOCK.value * LEAST) * BLOCK.value * LEAST
    count = cdiv(n, length)
    means, logs = scratch(q.device, (torch.float32, B * G, count, R, K), (torch.float32, B * G, count, R))
    y, half = torch.empty_like(q), q.dtype == kv.dtype and q.dtype.itemsize == 2
    numbers = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[q.dtype] if half else tl.float32
    BR, BK = max(16, power_of_2(R)), max(16, power_of_2(K))
    args = (q.contiguous(), kv, start, filled, means, logs, n, length)
    constants, stages = (G, R, K, BR, BK, numbers, "tf32x3"), 2 if half else 1
    launch(parts, (count, B * G), args, constants, 4, stages, wgmma=False)
    launch(add, (R, B * G), (means, logs, y, count), (R, K, BK), 4, wgmma=False)
    return y


def refuses(q: Tensor, kv: Tensor) -> str | None:
    """Why the kernel cannot run q (B, 1, H, K) over kv, or None."""
    if q.device.type != DEVICE:
        return f"it runs on {DEVICE}, q is on {q.device.type}"
    if torch.float64 in (q.dtype, kv.dtype):
        return "it computes in float32, and an argument is float64"
    return f"it holds heads of at most {WIDEST} numbers, not {q.shape[-1]}" if q.shape[-1] > WIDEST else None
