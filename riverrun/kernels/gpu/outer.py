"""Outer-product memory and mLSTM on a GPU, as operators; the kernels and the plan are in `memory.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import memory, step
from .launch import cdiv, launch, power_of_2
from .plan import Inputs, length
from .tape import define


def _forward(q, k, v, g, u, state, reset, save):
    if step.fits(v, save):
        return *step.outer(q, k, v, g, u, state, reset), v.new_empty(0)
    x = Inputs("outer", q, k, v, g, u=u, state=state, reset=reset)
    made = memory.pairs(x)
    y, S, _, _ = memory.run(x, made)
    return y, S, made.A if save and made.A is not None else v.new_empty(0)


def _backward(q, k, v, g, u, state, reset, y, S, A, dy, dS):
    x = Inputs("outer", q, k, v, g, u=u, state=state, reset=reset, back=True)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    made = memory.pairs(x, (A, None, None, None))
    d = memory.run_backward(x, made, dy, None, None if dS is None else dS.contiguous(), None)
    return d["q"], d["k"], d["v"], d["g"], d["u"], like(d["state"], state), None


def like(gradient: Tensor, x: Tensor | None) -> Tensor | None:
    return None if x is None else gradient.to(x.dtype)


def fake_state(k: Tensor, v: Tensor) -> Tensor:
    return v.new_empty(v.shape[0], v.shape[2], k.shape[3], v.shape[3], dtype=torch.float32)


def fake_pairs(x: Tensor, *others: Tensor) -> Tensor:
    bf16 = all(t.dtype == torch.bfloat16 for t in (x, *others))
    C = length(bf16, False)
    B, T, H = x.shape[:3]
    return x.new_empty(B * H, cdiv(T, C), C, C, dtype=torch.bfloat16 if bf16 else torch.float32)


def _fake(q, k, v, g, u, state, reset, save):
    stored = save and (u is not None or (g is not None and g.dim() == 4))
    return torch.empty_like(v), fake_state(k, v), fake_pairs(v, q, k) if stored else v.new_empty(0)


_outer = define(
    "outer_gpu", "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? u, Tensor? state, Tensor? reset",
    2, 1, _forward, _backward, _fake,
)  # fmt: skip


def outer(q, k, v, g=None, u=None, state: Tensor | None = None, reset: Tensor | None = None):
    y, S = _outer(q, k, v, g, u, state, reset)
    return y, S


@triton.jit
def larger(f1, i1, f2, i2):
    return f1 + f2, tl.maximum(i1 + f2, i2)


@triton.jit
def stabilise(f, i, m0, reset, m, g, lw, mT, T, H: tl.constexpr, BT: tl.constexpr):
    """m_t = max(f_t + m_{t-1}, i_t), g = f_t + m_{t-1} - m_t and lw = i_t - m_t (B, H, T) of one batch row
    and head; mT is the last m."""
    batch, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    base = batch * T * H + h
    carry = tl.load(m0 + batch * H + h) if m0 is not None else 0.0
    at = tl.arange(0, BT)
    for start in range(0, T, BT):
        t = start + at
        inside = t < T
        ft = tl.load(f + base + t * H, mask=inside, other=0.0).to(tl.float32)
        it = tl.load(i + base + t * H, mask=inside, other=float("-inf")).to(tl.float32)
        decay, floor = ft, it
        if reset is not None:  # the maximum before this step is 0, whatever came before
            fresh = tl.load(reset + batch * T + t, mask=inside, other=0) != 0
            decay, floor = tl.where(fresh, float("-inf"), ft), tl.where(fresh, tl.maximum(ft, it), it)
        total, best = tl.associative_scan((decay, floor), 0, larger)
        mt = tl.maximum(total + carry, best)
        tl.store(m + base + t * H, mt, mask=inside)
        tl.debug_barrier()  # the maxima of the steps before are other threads'
        last = tl.load(m + base + (t - 1) * H, mask=inside & (at > 0), other=0.0)
        last = tl.where(at > 0, last, carry)
        if reset is not None:
            last = tl.where(fresh, 0.0, last)
        tl.store(g + base + t * H, ft + last - mt, mask=inside)
        tl.store(lw + (batch * H + h) * T + t, it - mt, mask=inside)
        carry = tl.sum(tl.where(at == BT - 1, mt, 0.0), 0)
    tl.store(mT + batch * H + h, carry)


@triton.jit
def unnormalise(
    y, dy, den, m, lr, dden, T, ROWS, H: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr
):
    """Row by row lr = -log of what y was divided by, and the gradient of its denominator times that divisor,
    because what meets it is multiplied with e^lr, as dy is."""
    row, cols = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, BV)
    at, inside = row[:, None] * V + cols[None, :], (row < ROWS)[:, None] & (cols < V)[None, :]
    g = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(den + row, mask=row < ROWS, other=1.0)
    floor = tl.exp(-tl.load(m + row, mask=row < ROWS, other=0.0))
    weight = tl.maximum(tl.abs(d), floor)
    past = (row // (T * H) * H + row % H) * T + row // H % T
    tl.store(lr + past, -tl.log(weight), mask=row < ROWS)
    # where both are equal each side of the maximum gets half, as torch.maximum has it
    share = tl.where(tl.abs(d) > floor, 1.0, tl.where(tl.abs(d) == floor, 0.5, 0.0))
    sign = tl.where(d < 0, -1.0, 1.0)
    tl.store(dden + row, -tl.sum(g * out, 1) * share * sign, mask=row < ROWS)


def stabilised(f: Tensor, i: Tensor, m0: Tensor | None, reset: Tensor | None) -> tuple[Tensor, ...]:
    """m and g (B, T, H), lw (B, H, T) and the last m (B, H), float32 all."""
    B, T, H = f.shape
    m, g, lw, mT = (torch.empty(s, device=f.device) for s in ((B, T, H), (B, T, H), (B, H, T), (B, H)))
    flag = None if reset is None else reset.contiguous().view(torch.uint8)
    m0 = None if m0 is None else m0.float().contiguous()
    BT = min(1024, max(16, power_of_2(T)))
    launch(stabilise, (B * H,), (f.contiguous(), i.contiguous(), m0, flag, m, g, lw, mT, T), (H, BT), 4)
    return m, g, lw, mT


def _mlstm_forward(q, k, v, f, i, S, n, m0, reset, save):
    if step.fits(v, save):
        B, T, H = f.shape
        rows = [v.new_empty(*s, dtype=torch.float32) for s in ((B, T, H), (B, T, H), (B, H, T), (B, T, H))]
        state = (S, n, m0) if S is not None else (None, None, None)
        return *step.mlstm(q, k, v, f, i, state, reset), *rows
    m, g, lw, mT = stabilised(f, i, m0, reset)
    x = Inputs("outer", q, k, v, g, lw=lw, m=m, state=S, norm=n, reset=reset)
    y, S, n, den = memory.run(x, memory.pairs(x))
    return y, S, n, mT, m, g, lw, den


def _mlstm_backward(q, k, v, f, i, S0, n0, m0, reset, y, S, n, mT, m, g, lw, den, dy, dS, dn, dm):
    lr, dden = torch.empty_like(lw), torch.empty_like(m)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    _, T, H, V = y.shape
    sizes, rows = (H, V, power_of_2(V), 16), m.numel()
    launch(unnormalise, (cdiv(rows, 16),), (y, dy, den, m, lr, dden, T, rows), sizes, 4)
    x = Inputs("outer", q, k, v, g, lw=lw, lr=lr, m=m, state=S0, norm=n0, reset=reset, back=True)
    touched = not (dS is None and dn is None and dm is None)
    if touched:
        dS, dn, dm = (
            torch.zeros_like(t) if d is None else d.contiguous() for d, t in ((dS, S), (dn, n), (dm, mT))
        )
    d = memory.run_backward(x, memory.pairs(x), dy, dden, dS, dn)
    df, di = d["g"], d["weight"]
    dm0 = None
    if m0 is not None:
        dm0 = df[:, 0].clone() if reset is None else df[:, 0].masked_fill(reset[:, :1], 0)
    if touched:
        free = dm - (dS * S).sum((-1, -2)) - (dn * n).sum(-1)
        to_f, to_i, first = route(f, i, m, m0, reset, free)
        df, di, dm0 = df + to_f, di + to_i, None if m0 is None else dm0 + first
    state = (like(d["state"], S0), like(d["norm"], n0), like(dm0, m0))
    return d["q"], d["k"], d["v"], df.to(f.dtype), di.to(i.dtype), *state, None


def route(f, i, m, m0, reset, free):
    """Where the maximum came from: the gradient `free` (B, H) of the last m, given to f, i and the first m.

    No other m has a gradient of its own: S e^m and n e^m do not depend on m, so neither does y.
    """
    first = torch.zeros_like(m[:, 0]) if m0 is None else m0.float()
    last = torch.cat([first[:, None], m[:, :-1]], 1)
    last = last if reset is None else last.masked_fill(reset[..., None], 0)
    kept, new = f.float() + last, i.float()
    share = (kept > new).float() + 0.5 * (kept == new).float()
    chain = share if reset is None else share.masked_fill(reset[..., None], 0)
    onward = chain.flip(1).cumprod(1).flip(1)  # from step t back to before it, all the way from the end
    arrives = torch.cat([onward[:, 1:], torch.ones_like(onward[:, :1])], 1) * free[:, None]
    return share * arrives, (1 - share) * arrives, onward[:, 0] * free


def _mlstm_fake(q, k, v, f, i, S, n, m, reset, save):
    B, T, H, _ = v.shape
    S = fake_state(k, v)
    m, g, den = (v.new_empty(B, T, H, dtype=torch.float32) for _ in range(3))
    n, lw = torch.empty_like(S[..., 0]), m.new_empty(B, H, T)
    return torch.empty_like(v), S, n, m[:, 0].clone(), m, g, lw, den


_mlstm = define(
    "mlstm_gpu",
    "Tensor q, Tensor k, Tensor v, Tensor f, Tensor i, Tensor? S, Tensor? n, Tensor? m, Tensor? reset",
    4, 4, _mlstm_forward, _mlstm_backward, _mlstm_fake,
)  # fmt: skip


def mlstm(q, k, v, f, i, state: tuple[Tensor, Tensor, Tensor] | None = None, reset: Tensor | None = None):
    y, *state = _mlstm(q, k, v, f, i, *(state or (None, None, None)), reset)
    return y, tuple(state)
