"""Elman, LSTM, GRU and sLSTM on a GPU: a program keeps one head's recurrent weights on chip for all of time.
Wider heads are in `wide_cells`, a step's arithmetic in `gates`.

A program is (16 sequences, one head). Every step is one small matrix product a gate, h (16 × P) by R (P × P),
on tensor cores, and the gates in float32; x of the next step is on its way meanwhile. Backward walks against
time, makes the gates again from x and the h that entered each step, and writes dp, the gradients of the
gates' arguments. The gradients of R and c are then sums over batch and time of dp ⊗ h and dp: one matrix
product outside.

States are float32; for half-precision x and R the operands of products are rounded to that dtype, gates never
are. Equations and the order of gates: `riverrun.recurrences.cell`. The idea: Pöppel et al. 2024
(arXiv:2412.07752).
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from . import wide_cells
from .gates import advance, get, get_gates, optional, put_gates, retreat
from .launch import DEVICE
from .tiles import flat

ROWS = tl.constexpr(16)  # sequences a program: the least that a matrix instruction takes
WIDEST = 128  # P in half precision; half of it in float32: 128 KiB of weights
MANY = 16  # steps
GATES = {"elman": 1, "lstm": 4, "gru": 3, "slstm": 4}
STATES = {"elman": 1, "lstm": 2, "gru": 1, "slstm": 4}


@triton.jit
def _matrix(R, gate, h, H, P, BP: tl.constexpr, DOT: tl.constexpr):
    """R[gate, h] (out, in), padded with zeros."""
    i, j = tl.arange(0, BP)[:, None], tl.arange(0, BP)[None, :]
    at = (gate * H + h) * P * P + i * P + j
    return tl.load(R + at, mask=(i < P) & (j < P), other=0.0).to(DOT)


@triton.jit
def _matrices(R, h, H, P, BP: tl.constexpr, DOT: tl.constexpr, GATES: tl.constexpr):
    r0 = _matrix(R, 0, h, H, P, BP, DOT)
    r1, r2, r3 = r0, r0, r0
    if GATES > 1:
        r1, r2 = _matrix(R, 1, h, H, P, BP, DOT), _matrix(R, 2, h, H, P, BP, DOT)
    if GATES > 3:
        r3 = _matrix(R, 3, h, H, P, BP, DOT)
    return r0, r1, r2, r3


@triton.jit
def _read(h, r0, r1, r2, r3, c0, c1, c2, c3, GATES: tl.constexpr, PREC: tl.constexpr):
    """R h + c for every gate."""
    h = h.to(r0.dtype)
    p0 = tl.dot(h, tl.trans(r0), input_precision=PREC) + c0[None, :]
    p1, p2, p3 = p0, p0, p0
    if GATES > 1:
        p1 = tl.dot(h, tl.trans(r1), input_precision=PREC) + c1[None, :]
        p2 = tl.dot(h, tl.trans(r2), input_precision=PREC) + c2[None, :]
    if GATES > 3:
        p3 = tl.dot(h, tl.trans(r3), input_precision=PREC) + c3[None, :]
    return p0, p1, p2, p3


@triton.jit
def _biases(c, h, H, P, BP: tl.constexpr, GATES: tl.constexpr):
    p = tl.arange(0, BP)
    c0 = tl.zeros([BP], tl.float32)
    c1, c2, c3 = c0, c0, c0
    if c is not None:
        c0, c1, c2, c3 = get_gates(c, h * P + p, H * P, p < P, GATES)
    return c0, c1, c2, c3


@triton.jit
def _forward(
    x, R, c, h0, s0, n0, m0, reset, y, h1, s1, n1, m1, ss, ns, ms, B, T, P,
    H: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr, GATES: tl.constexpr, SAVE: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS sequences, H). SAVE writes the s, n, m that enter each step, (B, T, H, P), to ss,
    ns, ms."""
    b, head, p = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, BP)
    inside = (b < B)[:, None] & (p < P)[None, :]
    r0, r1, r2, r3 = _matrices(R, head, H, P, BP, DOT, GATES)
    c0, c1, c2, c3 = _biases(c, head, H, P, BP, GATES)
    row = b.to(tl.int64)[:, None] * T
    once = b[:, None] * (H * P) + head * P + p[None, :]
    at_y = row * (H * P) + head * P + p[None, :]
    at_x = row * (GATES * H * P) + head * P + p[None, :]
    h, s, n = (
        tl.zeros([ROWS, BP], tl.float32),
        tl.zeros([ROWS, BP], tl.float32),
        tl.zeros([ROWS, BP], tl.float32),
    )
    m = tl.full([ROWS, BP], float("-inf"), tl.float32)
    if h0 is not None:
        h = get(h0, once, inside)
        if s0 is not None:
            s = get(s0, once, inside)
        if n0 is not None:
            n, m = get(n0, once, inside), get(m0, once, inside)
    x0, x1, x2, x3 = get_gates(x, at_x, H * P, inside, GATES)
    for t in range(T):
        at_x += GATES * H * P
        ahead = inside & (t + 1 < T)
        next0, next1, next2, next3 = get_gates(x, at_x, H * P, ahead, GATES)
        if reset is not None:
            cut = tl.load(reset + b.to(tl.int64) * T + t, mask=b < B, other=0)[:, None] != 0
            h, s, n = tl.where(cut, 0.0, h), tl.where(cut, 0.0, s), tl.where(cut, 0.0, n)
            m = tl.where(cut, float("-inf"), m)
        if SAVE and (KIND == "lstm" or KIND == "slstm"):
            tl.store(ss + at_y, s, mask=inside)
        if SAVE and KIND == "slstm":
            tl.store(ns + at_y, n, mask=inside)
            tl.store(ms + at_y, m, mask=inside)
        p0, p1, p2, p3 = _read(h, r0, r1, r2, r3, c0, c1, c2, c3, GATES, PREC)
        h, s, n, m = advance(x0, x1, x2, x3, p0, p1, p2, p3, h, s, n, m, inside, KIND)
        tl.store(y + at_y, h.to(y.dtype.element_ty), mask=inside)
        at_y += H * P
        x0, x1, x2, x3 = next0, next1, next2, next3
    tl.store(h1 + once, h, mask=inside)
    if KIND == "lstm" or KIND == "slstm":
        tl.store(s1 + once, s, mask=inside)
    if KIND == "slstm":
        tl.store(n1 + once, n, mask=inside)
        tl.store(m1 + once, m, mask=inside)


@triton.jit
def _entering(x, hs, ss, ns, ms, dy, at_x, at_y, stride, inside, KIND: tl.constexpr, GATES: tl.constexpr):
    """Everything backward reads at one step."""
    x0, x1, x2, x3 = get_gates(x, at_x, stride, inside, GATES)
    h, dh = get(hs, at_y, inside), get(dy, at_y, inside)
    s, n, m = h, h, h
    if KIND == "lstm" or KIND == "slstm":
        s = get(ss, at_y, inside)
    if KIND == "slstm":
        n, m = get(ns, at_y, inside), get(ms, at_y, inside)
    return x0, x1, x2, x3, h, s, n, m, dh


@triton.jit
def _backward(
    x, R, c, hs, ss, ns, ms, reset, dy, dh1, ds1, dn1, dm1, dx, dq, dh0, ds0, dn0, dm0, B, T, P,
    H: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr, GATES: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr, HOLD: tl.constexpr,
):  # fmt: skip
    """hs, ss, ns, ms are the states that enter each step, after its reset; dq is what the GRU's candidate
    reads from R.

    Both ways round, large weights do not fit a multiprocessor: unless HOLD they are read from cache at every
    step.
    """
    b, head, p = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, BP)
    inside = (b < B)[:, None] & (p < P)[None, :]
    r0, r1, r2, r3 = _matrices(R, head, H, P, BP, DOT, GATES)
    c0, c1, c2, c3 = _biases(c, head, H, P, BP, GATES)
    row = b.to(tl.int64)[:, None] * T + T - 1
    once = b[:, None] * (H * P) + head * P + p[None, :]
    at_y = row * (H * P) + head * P + p[None, :]
    at_x = row * (GATES * H * P) + head * P + p[None, :]
    dh, ds = optional(dh1, once, inside), optional(ds1, once, inside)
    dn, dm = optional(dn1, once, inside), optional(dm1, once, inside)
    x0, x1, x2, x3, h, s, n, m, dh_t = _entering(
        x, hs, ss, ns, ms, dy, at_x, at_y, H * P, inside, KIND, GATES
    )
    for i in range(T):
        ahead = inside & (i + 1 < T)
        next0, next1, next2, next3, next_h, next_s, next_n, next_m, next_dh = _entering(
            x, hs, ss, ns, ms, dy, at_x - GATES * H * P, at_y - H * P, H * P, ahead, KIND, GATES
        )
        dh += dh_t
        if not HOLD:
            r0, r1, r2, r3 = _matrices(R, head, H, P, BP, DOT, GATES)
        p0, p1, p2, p3 = _read(h, r0, r1, r2, r3, c0, c1, c2, c3, GATES, PREC)
        d0, d1, d2, d3, to_r, direct, ds, dn, dm = retreat(
            x0, x1, x2, x3, p0, p1, p2, p3, h, s, n, m, dh, ds, dn, dm, inside, KIND
        )
        put_gates(dx, at_x, H * P, inside, d0, d1, d2, d3, GATES)
        if KIND == "gru":
            tl.store(dq + at_y, to_r.to(dq.dtype.element_ty), mask=inside)
        d2 = to_r
        dh = direct + tl.dot(d0.to(DOT), r0, input_precision=PREC)
        if GATES > 1:
            dh += tl.dot(d1.to(DOT), r1, input_precision=PREC) + tl.dot(d2.to(DOT), r2, input_precision=PREC)
        if GATES > 3:
            dh += tl.dot(d3.to(DOT), r3, input_precision=PREC)
        if reset is not None:
            cut = tl.load(reset + b.to(tl.int64) * T + T - 1 - i, mask=b < B, other=0)[:, None] != 0
            dh, ds = tl.where(cut, 0.0, dh), tl.where(cut, 0.0, ds)
            dn, dm = tl.where(cut, 0.0, dn), tl.where(cut, 0.0, dm)
        at_x -= GATES * H * P
        at_y -= H * P
        x0, x1, x2, x3, h, s, n, m, dh_t = (
            next0, next1, next2, next3, next_h, next_s, next_n, next_m, next_dh,
        )  # fmt: skip
    if dh0 is not None:
        tl.store(dh0 + once, dh, mask=inside)
        if ds0 is not None:
            tl.store(ds0 + once, ds, mask=inside)
        if dn0 is not None:
            tl.store(dn0 + once, dn, mask=inside)
            tl.store(dm0 + once, dm, mask=inside)


def _launch(kind: str, x: Tensor, R: Tensor):
    """Grid, sizes and switches of both kernels, and whether backward can hold the weights."""
    B, T, _, H, P = x.shape
    half = x.dtype == R.dtype and x.dtype.itemsize == 2
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype] if half else tl.float32
    BP = max(16, triton.next_power_of_2(P))
    switches = {"H": H, "BP": BP, "KIND": kind, "GATES": GATES[kind], "DOT": dot, "PREC": "tf32x3"}
    # bytes of one gate's padded weights: what decides about warps, and whether both ways round can be held
    small = BP * BP * (2 if half else 4) <= 8192
    switches |= {"num_warps": 4 if small else 8, "num_stages": 1}
    return (triton.cdiv(B, ROWS.value), H), (B, T, P), switches, small


def _pad(states, count: int = 4) -> tuple:
    """Four states, with None for those the cell lacks."""
    return (*states, *[None] * (count - len(states)))


def _run(kind: str, *args):
    x, R, c, *states, reset, save = args
    x, R, c, reset, *states = (flat(v) for v in (x, R, c, reset, *states))
    y, *rest = _fake(kind, x, R, c, *states, reset, save)
    last, saved = rest[: STATES[kind]], rest[STATES[kind] :]
    if wide(x, R):
        wide_cells.forward(
            kind, GATES[kind], x, R, c, _pad(states), reset, y, _pad(last), _pad(saved, 3), save
        )
        return y, *rest
    grid, sizes, switches, _ = _launch(kind, x, R)
    _forward[grid](
        x, R, c, *_pad(states), reset, y, *_pad(last), *_pad(saved, 3), *sizes, **switches, SAVE=save
    )  # fmt: skip
    return y, *rest


def _run_backward(kind: str, *args):
    x, R, c, *rest = args
    count = STATES[kind]
    states, reset, y, rest = rest[:count], rest[count], rest[count + 1], rest[count + 2 :]
    saved, dy, dlast = rest[count : 2 * count - 1], rest[2 * count - 1], rest[2 * count :]
    x, R, c, reset, *dlast = (flat(v) for v in (x, R, c, reset, *dlast))
    first = torch.zeros_like(y[:, 0]) if states[0] is None else states[0].to(y.dtype)
    hs = torch.cat([first[:, None], y[:, :-1]], 1)
    if reset is not None:
        hs.masked_fill_(reset.bool()[..., None, None], 0)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    dq = torch.empty_like(y) if kind == "gru" else None
    dstates = [None if s is None else s.new_empty(s.shape) for s in states]
    given, saved, dlast = (x, R, c, hs), _pad(saved, 3), _pad(dlast)
    if wide(x, R):
        dx = wide_cells.backward(kind, GATES[kind], *given, saved, reset, dy, dlast, dq, _pad(dstates))
    else:
        dx = torch.empty_like(x)
        grid, sizes, switches, small = _launch(kind, x, R)
        _backward[grid](
            *given, *saved, reset, dy, *dlast, dx, dq, *_pad(dstates), *sizes, **switches, HOLD=small
        )
    gates = [dx[:, :, g] if dq is None or g < 2 else dq for g in range(GATES[kind])]
    dR = torch.stack([_outer_sum(d, hs, R.dtype) for d in gates])
    dc = None if c is None else torch.stack([d.sum((0, 1), dtype=torch.float32) for d in gates]).to(c.dtype)
    return dx, dR, dc, *dstates, None


def _outer_sum(d: Tensor, h: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ over batch and time of d ⊗ h by head: (H, P, P)."""
    wide = torch.promote_types(d.dtype, h.dtype)
    d, h = (v.to(wide).flatten(0, 1) for v in (d, h))
    return torch.bmm(d.permute(1, 2, 0), h.transpose(0, 1)).to(dtype)


def _fake(kind: str, *args):
    x, save = args[0], args[-1]
    B, T, _, H, P = x.shape
    y = x.new_empty(B, T, H, P)
    last = [x.new_empty(B, H, P, dtype=torch.float32) for _ in range(STATES[kind])]
    shape = (B, T, H, P) if save else (0,)
    saved = [x.new_empty(shape, dtype=torch.float32) for _ in range(STATES[kind] - 1)]
    return y, *last, *saved


def _define(kind: str):
    count = STATES[kind]
    states = ", ".join(f"Tensor? state{i}" for i in range(count))
    return define(
        f"{kind}_gpu", f"Tensor x, Tensor R, Tensor? c, {states}, Tensor? reset",
        1 + count, count - 1, DEVICE, partial(_run, kind), partial(_run_backward, kind), partial(_fake, kind),
    )  # fmt: skip


_CELLS = {kind: _define(kind) for kind in GATES}


def _cell(kind: str, x: Tensor, R: Tensor, c: Tensor | None = None, state=None, reset: Tensor | None = None):
    states = (None,) * STATES[kind] if state is None else state
    y, *last = _CELLS[kind](x, R, c, *states, reset)
    return y, tuple(last)


elman, lstm, gru, slstm = (partial(_cell, kind) for kind in GATES)


def wide(x: Tensor, R: Tensor) -> bool:
    """Whether many programs share a head: where one multiprocessor does not hold R, and where it does not
    hold R both ways round and there are steps enough to pay for the sharing."""
    half = x.dtype == R.dtype and x.dtype.itemsize == 2
    P, widest = x.shape[-1], WIDEST if half else WIDEST // 2
    return P > widest or (2 * P > widest and x.shape[1] >= MANY)


def refuses(x: Tensor, R: Tensor) -> str | None:
    """Why no kernel takes a head of this width, or None."""
    if x.shape[-1] > wide_cells.WIDEST:
        return (
            f"a head of P = {x.shape[-1]} has more recurrent weights than the chip holds; "
            f"it takes at most {wide_cells.WIDEST}: use more heads"
        )
    return None
