"""The softmax triple on a GPU: running maximum, weight and weighted sum, and its gradients. See `tiles`.

A program takes one head with all its values and streams tiles of time. A scan gives the maxima; with them
known, d_t = e^{m_{t-1} - m_t} ≤ 1 and w_t = e^{s_t - m_t} ≤ 1 make c and a linear recurrences. Every value's
thread computes the m and c of its head again: a scan of one number a step would leave most threads idle
anyway.

Backward, with D_t = e^{m_t - m_{t+1}} c_t / c_{t+1} ≤ 1 and p_t = w_t / c_t ≤ 1:

    Z_t = dy_t + D_t Z_{t+1}        e_t = (y_t - y_{t+1}) · (Z_t - dy_t) + D_t e_{t+1}
    dv_t = p_t Z_t                  ds_t = p_t ((v_t - y_t) · Z_t + e_t) + ρ_t f_t

where e_t is y_t · Z_t less the decayed sum of all later dy · y, in differences that are small when they
should be. They need more digits of y than half precision keeps, so forward saves what rounding took from y,
in the same dtype.

y does not depend on m; the last m, c and a do. What they ask of the last m, μ = dm - c dc - a · da, goes to
the step that set it: ρ starts as μ at the end and each step keeps the share f_t, 1 if s_t > m_{t-1}, ½ if
equal, else 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from .launch import DEVICE, power_of_2
from .tiles import flags, flat, last, sweep

WIDEST = 1024


@triton.jit
def _top(f1, m1, f2, m2):
    """Flags say that a reset lies in a stretch; what stands left of it does not count."""
    return f1 | f2, tl.where(f2 != 0, m2, tl.maximum(m1, m2))


@triton.jit
def _top_before(f1, m1, p1, q1, f2, m2, p2, q2):
    """(f, m) as `_top`; (p, q) is all but the last element."""
    f, m = _top(f1, m1, f2, m2)
    p, q = _top(f1, m1, p2, q2)
    return f, m, p, q


@triton.jit
def _maxima(s, cut, carry):
    """For a tile (S, L, C): the maximum before each step (and its reset), with it, and the last one (C)."""
    none, low = tl.zeros(s.shape, tl.int32), tl.full(s.shape, float("-inf"), tl.float32)
    f, m, p, q = tl.associative_scan((cut, s, none, low), 1, _top_before)
    sf, sm = last(f, 1), last(m, 1)
    none, low = tl.zeros(sf.shape, tl.int32), tl.full(sf.shape, float("-inf"), tl.float32)
    _, _, ef, em = tl.associative_scan((sf, sm, none, low), 0, _top_before)
    enter = tl.where(ef != 0, em, tl.maximum(em, carry[None, :]))[:, None, :]
    m = tl.where(f != 0, m, tl.maximum(m, enter))
    before = tl.where(p != 0, q, tl.maximum(q, enter))
    return before, m, last(last(m, 1), 0)


@triton.jit
def _forward(
    s, v, m0, c0, a0, reset, y, m1, c1, a1, ms, cs_, rest, T, V,
    H: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, SAVE: tl.constexpr,
    HALF: tl.constexpr,
):  # fmt: skip
    """Grid (B·H). SAVE writes m and c of each step, (B, T, H)."""
    bh, cols = tl.program_id(0), tl.arange(0, C)
    row, same = (bh // H).to(tl.int64) * T, tl.zeros([C], tl.int32)
    u = tl.arange(0, S)[:, None, None] * L + tl.arange(0, L)[None, :, None] + same
    m, c = tl.full([C], float("-inf"), tl.float32), tl.zeros([C], tl.float32)
    a = tl.zeros([C], tl.float32)
    if m0 is not None:
        m, c = tl.load(m0 + bh + same), tl.load(c0 + bh + same)
        a = tl.load(a0 + bh.to(tl.int64) * V + cols, mask=cols < V, other=0.0)
    for t0 in range(0, T, S * L):
        inside = t0 + u < T
        at = (row + t0) * H + bh % H
        s_ = tl.load(s + at + u * H, mask=inside, other=float("-inf")).to(tl.float32)
        v_ = tl.load(v + at * V + u * (H * V) + cols, mask=inside & (cols < V), other=0.0).to(tl.float32)
        cut = tl.zeros(s_.shape, tl.int32)
        if reset is not None:
            cut = flags(reset, row + t0 + u, inside).to(tl.int32)
        before, top, m = _maxima(s_, cut, m)
        decay = tl.where(cut != 0, 0.0, tl.where(before == top, 1.0, tl.exp(before - top)))
        write = tl.where(inside, tl.exp(s_ - top), 0.0)
        cs, c, _ = sweep(decay, write, c)
        as_, a, _ = sweep(decay, write * v_, a)
        exact = as_ / cs
        out = exact.to(y.dtype.element_ty)
        tl.store(y + at * V + u * (H * V) + cols, out, mask=inside & (cols < V))
        if SAVE and HALF:
            lost = (exact - out.to(tl.float32)).to(y.dtype.element_ty)
            tl.store(rest + at * V + u * (H * V) + cols, lost, mask=inside & (cols < V))
        if SAVE:
            tl.store(ms + at + u * H, top, mask=inside & (cols == 0))
            tl.store(cs_ + at + u * H, cs, mask=inside & (cols == 0))
    tl.store(m1 + bh + same, m, mask=cols == 0)
    tl.store(c1 + bh + same, c, mask=cols == 0)
    tl.store(a1 + bh.to(tl.int64) * V + cols, a, mask=cols < V)


@triton.jit
def _share(s, before):
    """The share of m's gradient that belongs to s where m = max(before, s)."""
    return tl.where(s > before, 1.0, tl.where(s == before, 0.5, 0.0))


@triton.jit
def _backward(
    s, v, m0, c0, a0, reset, y, c1, a1, ms, cs, rest, dy, dm1, dc1, da1, ds, dv, dm0, dc0, da0, T, V,
    H: tl.constexpr, S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """As `_forward`, with u = T - 1 - t for time."""
    bh, cols = tl.program_id(0), tl.arange(0, C)
    row, same, some = (bh // H).to(tl.int64) * T, tl.zeros([C], tl.int32), cols < V
    wide = bh.to(tl.int64) * V + cols
    u = tl.arange(0, S)[:, None, None] * L + tl.arange(0, L)[None, :, None] + same
    Z, e, rho = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    if dm1 is not None:
        rho += tl.load(dm1 + bh + same)
    if dc1 is not None:
        e += tl.load(c1 + bh + same) * tl.load(dc1 + bh + same)
    if da1 is not None:
        da = tl.load(da1 + wide, mask=some, other=0.0)
        Z += tl.load(c1 + bh + same) * da
        e += tl.sum(da * tl.load(a1 + wide, mask=some, other=0.0), 0)
    rho -= e
    top = tl.full([C], float("-inf"), tl.float32)
    if m0 is not None:
        top = tl.load(m0 + bh + same)
    for u0 in range(0, T, S * L):
        t = T - 1 - u0 - u
        inside, after, before = t >= 0, (t >= 0) & (t < T - 1), t > 0
        at = row * H + bh % H
        s_ = tl.load(s + at + t * H, mask=inside, other=0.0).to(tl.float32)
        m_ = tl.load(ms + at + t * H, mask=inside, other=0.0)
        c_ = tl.load(cs + at + t * H, mask=inside, other=1.0)
        next_s = tl.load(s + at + (t + 1) * H, mask=after, other=0.0).to(tl.float32)
        next_m = tl.load(ms + at + (t + 1) * H, mask=after, other=0.0)
        next_c = tl.load(cs + at + (t + 1) * H, mask=after, other=1.0)
        before_m = tl.load(ms + at + (t - 1) * H, mask=before, other=0.0)
        before_m = tl.where(before, before_m, top[None, None, :])
        decay = tl.where(after, tl.exp(tl.minimum(m_ - next_m, 0.0)) * c_ / next_c, 1.0)
        held = tl.where(after, 1.0 - _share(next_s, m_), 1.0)
        if reset is not None:
            cut = flags(reset, row + t + 1, after)
            decay, held = tl.where(cut, 0.0, decay), tl.where(cut, 0.0, held)
            before_m = tl.where(flags(reset, row + t, inside), float("-inf"), before_m)
        where = at * V + t * (H * V) + cols
        v_ = tl.load(v + where, mask=inside & some, other=0.0).to(tl.float32)
        y_ = tl.load(y + where, mask=inside & some, other=0.0).to(tl.float32)
        next_y = tl.load(y + where + H * V, mask=after & some, other=0.0).to(tl.float32)
        if HALF:
            y_ += tl.load(rest + where, mask=inside & some, other=0.0).to(tl.float32)
            next_y += tl.load(rest + where + H * V, mask=after & some, other=0.0).to(tl.float32)
        dy_ = tl.load(dy + where, mask=inside & some, other=0.0).to(tl.float32)
        Zs, Z, _ = sweep(decay, dy_, Z)
        more = tl.sum(tl.where(after, (y_ - next_y) * (Zs - dy_), 0.0), 2)[:, :, None]
        es, e, _ = sweep(decay, more + tl.zeros(dy_.shape, tl.float32), e)
        rhos, rho, _ = sweep(held, tl.zeros(held.shape, tl.float32), rho)
        p = tl.where(inside, tl.exp(s_ - m_) / c_, 0.0)
        tl.store(dv + where, (p * Zs).to(dv.dtype.element_ty), mask=inside & some)
        ds_ = p * (tl.sum((v_ - y_) * Zs, 2)[:, :, None] + es) + rhos * _share(s_, before_m)
        tl.store(ds + at + t * H, ds_.to(ds.dtype.element_ty), mask=inside & (cols == 0))
    if dm0 is not None:
        first = row * H + bh % H + same
        kept = cols >= 0
        if reset is not None:
            kept = tl.load(reset + row + same) == 0
        weight = tl.exp(tl.where(kept, top - tl.load(ms + first), float("-inf"))) / tl.load(cs + first)
        Z, e = weight * Z, weight * e
        tl.store(da0 + wide, Z, mask=some)
        y_ = tl.load(y + first * V + cols, mask=some, other=0.0).to(tl.float32)
        if HALF:
            y_ += tl.load(rest + first * V + cols, mask=some, other=0.0).to(tl.float32)
        tl.store(dc0 + bh + same, e - tl.sum(y_ * Z, 0), mask=cols == 0)
        # of the weights' share, then of the maximum's
        c, a = tl.load(c0 + bh + same), tl.load(a0 + wide, mask=some, other=0.0)
        rho = tl.where(kept, rho * (1.0 - _share(tl.load(s + first).to(tl.float32), top)), 0.0)
        tl.store(dm0 + bh + same, c * e + tl.sum((a - c * y_) * Z, 0) + rho, mask=cols == 0)


def _tile(s: Tensor, v: Tensor) -> dict:
    """As many segments as the threads hold rows of V values at once, and sixteen numbers a thread."""
    B, T, H, V = v.shape
    C, vector = power_of_2(V), 16 // v.element_size()
    warps = 8 if B * H < 200 else 4
    whole = power_of_2(T)
    S = min(max(warps * 32 * vector // C, 1), whole)
    L = min(16 // vector, max(whole // S, 1))
    while warps > 1 and S * C < warps * 32 * vector:
        warps //= 2
    half = v.dtype.itemsize == 2
    return {"H": H, "S": S, "L": L, "C": C, "HALF": half, "num_warps": warps}


def _run(s, v, m, c, a, reset, save):
    B, T, H, V = v.shape
    made = _fake(s, v, m, c, a, reset, save)
    inputs = tuple(flat(x) for x in (s, v, m, c, a, reset))
    _forward[(B * H,)](*inputs, *made, T, V, **_tile(s, v), SAVE=save)
    return made


def _run_backward(s, v, m, c, a, reset, y, m1, c1, a1, ms, cs, rest, dy, dm1, dc1, da1):
    B, T, H, V = v.shape
    dy = torch.zeros_like(y) if dy is None else dy
    out = [
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (s, v, m, c, a)
    ]
    inputs = tuple(flat(x) for x in (s, v, m, c, a, reset, y, c1, a1, ms, cs, rest, dy, dm1, dc1, da1))
    _backward[(B * H,)](*inputs, *out, T, V, **_tile(s, v))
    return *out, None


def _fake(s, v, m, c, a, reset, save):
    B, T, H, V = v.shape
    state = [v.new_empty(shape, dtype=torch.float32) for shape in ((B, H), (B, H), (B, H, V))]
    saved = [v.new_empty((B, T, H) if save else (0,), dtype=torch.float32) for _ in range(2)]
    rest = v.new_empty((B, T, H, V) if save and v.dtype.itemsize == 2 else (0,))
    return v.new_empty(B, T, H, V), *state, *saved, rest


_softmax = define(
    "softmax_gpu", "Tensor s, Tensor v, Tensor? m, Tensor? c, Tensor? a, Tensor? reset",
    4, 3, DEVICE, _run, _run_backward, _fake,
)  # fmt: skip


def softmax(s: Tensor, v: Tensor, state=None, reset: Tensor | None = None):
    m, c, a = (None,) * 3 if state is None else state
    y, m, c, a = _softmax(s, v, m, c, a, reset)
    return y, (m, c, a)


def refuses(v: Tensor) -> str | None:
    """Why no program can hold a row of values, or None."""
    if v.shape[-1] > WIDEST:
        return f"V = {v.shape[-1]} values a head are more than the {WIDEST} of one program; use more heads"
    return None
