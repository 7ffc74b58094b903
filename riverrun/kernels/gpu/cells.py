"""Elman, LSTM, GRU and sLSTM on a GPU: a program keeps one head's recurrent weights on chip for all of time.
Wider heads are in `wide_cells`, a step's arithmetic in `gates`.

A program is (8 sequences, one head). Every step is one small matrix product on tensor cores, R of all gates
(gates · P × P) by h (P × 8), and the gates in float32; x of the next step is on its way meanwhile. Units are
rows and sequences columns, because a matrix instruction takes 16 rows but 8 columns; each thread then has its
units' numbers of all gates. Backward walks against time, makes the gates again from x and the h that entered
each step, and writes dp, the gradients of the gates' arguments. The gradients of R and c are then sums over
batch and time of dp ⊗ h and dp.

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
from .gates import advance, get, optional, retreat
from .launch import DEVICE, cdiv, launch, power_of_2
from .tiles import flat

ROWS = tl.constexpr(8)  # sequences a program: the least that a matrix instruction takes as columns
WIDEST = 128  # P in half precision; half of it in float32: 128 KiB of weights
MANY = 16  # steps
STEPS, PROGRAMS = 64, 512  # of sums over time: at once, and how many
GATES = {"elman": 1, "lstm": 4, "gru": 3, "slstm": 4}
STATES = {"elman": 1, "lstm": 2, "gru": 1, "slstm": 4}


@triton.jit
def _weights(
    R, head, P, H: tl.constexpr, BP: tl.constexpr, GATES: tl.constexpr, TILES: tl.constexpr, DOT: tl.constexpr
):
    """R of all gates, (TILES · BP out, BP in), padded with zeros."""
    i, j = tl.arange(0, TILES * BP)[:, None], tl.arange(0, BP)[None, :]
    at = ((i // BP * H + head) * P + i % BP) * P + j
    return tl.load(R + at, mask=(i // BP < GATES) & (i % BP < P) & (j < P), other=0.0).to(DOT)


@triton.jit
def _apart(x, BP: tl.constexpr, TILES: tl.constexpr):
    """The gates' tiles (BP, ROWS) of x (TILES · BP, ROWS): a thread has its numbers of all of them."""
    x0, x1, x2, x3 = x, x, x, x
    if TILES > 1:
        even, odd = tl.split(tl.permute(tl.reshape(x, (2, 2, BP, ROWS)), (2, 3, 0, 1)))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _together(x0, x1, x2, x3, BP: tl.constexpr, TILES: tl.constexpr):
    """The inverse of `_apart`."""
    x = x0
    if TILES > 1:
        x = tl.join(tl.join(x0, x2), tl.join(x1, x3))
        x = tl.reshape(tl.permute(x, (2, 3, 0, 1)), (TILES * BP, ROWS))
    return x


@triton.jit
def _forward(
    x, R, c, h0, s0, n0, m0, reset, y, h1, s1, n1, m1, ss, ns, ms, B, T, P,
    H: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr, GATES: tl.constexpr, TILES: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS sequences, H). SAVE writes the s, n, m that enter each step, (B, T, H, P), to ss,
    ns, ms."""
    b, head, p = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, BP)
    i = tl.arange(0, TILES * BP)  # units of all gates
    unit, i_inside = i // BP * (H * P) + head * P + i % BP, (i // BP < GATES) & (i % BP < P)
    inside, x_inside = (p < P)[:, None] & (b < B)[None, :], i_inside[:, None] & (b < B)[None, :]
    r = _weights(R, head, P, H, BP, GATES, TILES, DOT)
    bias = tl.zeros([TILES * BP], tl.float32)
    if c is not None:
        bias = get(c, unit, i_inside)
    row = b.to(tl.int64)[None, :] * T * (H * P)
    once = b[None, :] * (H * P) + head * P + p[:, None]
    at_y, at_x = row + head * P + p[:, None], row * GATES + unit[:, None]
    h, s, n = (
        tl.zeros([BP, ROWS], tl.float32),
        tl.zeros([BP, ROWS], tl.float32),
        tl.zeros([BP, ROWS], tl.float32),
    )
    m = tl.full([BP, ROWS], float("-inf"), tl.float32)
    if h0 is not None:
        h = get(h0, once, inside)
        if s0 is not None:
            s = get(s0, once, inside)
        if n0 is not None:
            n, m = get(n0, once, inside), get(m0, once, inside)
    x_ = tl.load(x + at_x, mask=x_inside, other=0.0)
    for t in range(T):
        at_x += GATES * H * P
        x_next = tl.load(x + at_x, mask=x_inside & (t + 1 < T), other=0.0)
        if reset is not None:
            cut = tl.load(reset + b.to(tl.int64) * T + t, mask=b < B, other=0)[None, :] != 0
            h, s, n = tl.where(cut, 0.0, h), tl.where(cut, 0.0, s), tl.where(cut, 0.0, n)
            m = tl.where(cut, float("-inf"), m)
        if SAVE and (KIND == "lstm" or KIND == "slstm"):
            tl.store(ss + at_y, s, mask=inside)
        if SAVE and KIND == "slstm":
            tl.store(ns + at_y, n, mask=inside)
            tl.store(ms + at_y, m, mask=inside)
        x0, x1, x2, x3 = _apart(x_.to(tl.float32), BP, TILES)
        p_ = tl.dot(r, h.to(DOT), input_precision=PREC) + bias[:, None]
        p0, p1, p2, p3 = _apart(p_, BP, TILES)
        h, s, n, m = advance(x0, x1, x2, x3, p0, p1, p2, p3, h, s, n, m, inside, KIND)
        tl.store(y + at_y, h.to(y.dtype.element_ty), mask=inside)
        at_y += H * P
        x_ = x_next
    tl.store(h1 + once, h, mask=inside)
    if KIND == "lstm" or KIND == "slstm":
        tl.store(s1 + once, s, mask=inside)
    if KIND == "slstm":
        tl.store(n1 + once, n, mask=inside)
        tl.store(m1 + once, m, mask=inside)


@triton.jit
def _entering(hs, ss, ns, ms, dy, at, inside, KIND: tl.constexpr):
    """What backward reads of a step beside x."""
    h = tl.load(hs + at, mask=inside, other=0.0)
    s, n, m, dh = h, h, h, tl.load(dy + at, mask=inside, other=0.0)
    if KIND == "lstm" or KIND == "slstm":
        s = tl.load(ss + at, mask=inside, other=0.0)
    if KIND == "slstm":
        n, m = tl.load(ns + at, mask=inside, other=0.0), tl.load(ms + at, mask=inside, other=0.0)
    return h, s, n, m, dh


@triton.jit
def _backward(
    x, R, c, hs, ss, ns, ms, reset, dy, dh1, ds1, dn1, dm1, dx, dq, dh0, ds0, dn0, dm0, B, T, P,
    H: tl.constexpr, BP: tl.constexpr, KIND: tl.constexpr, GATES: tl.constexpr, TILES: tl.constexpr,
    DOT: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """hs, ss, ns, ms are the states that enter each step, after its reset; dq is what the GRU's candidate
    reads from R."""
    b, head, p = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, BP)
    i = tl.arange(0, TILES * BP)
    unit, i_inside = i // BP * (H * P) + head * P + i % BP, (i // BP < GATES) & (i % BP < P)
    inside, x_inside = (p < P)[:, None] & (b < B)[None, :], i_inside[:, None] & (b < B)[None, :]
    r = _weights(R, head, P, H, BP, GATES, TILES, DOT)
    bias = tl.zeros([TILES * BP], tl.float32)
    if c is not None:
        bias = get(c, unit, i_inside)
    row = (b.to(tl.int64)[None, :] * T + T - 1) * (H * P)
    once = b[None, :] * (H * P) + head * P + p[:, None]
    at_y, at_x = row + head * P + p[:, None], row * GATES + unit[:, None]
    dh, ds = optional(dh1, once, inside), optional(ds1, once, inside)
    dn, dm = optional(dn1, once, inside), optional(dm1, once, inside)
    x_ = tl.load(x + at_x, mask=x_inside, other=0.0)
    h, s, n, m, dh_t = _entering(hs, ss, ns, ms, dy, at_y, inside, KIND)
    for i in range(T):
        x_next = tl.load(x + at_x - GATES * H * P, mask=x_inside & (i + 1 < T), other=0.0)
        next_h, next_s, next_n, next_m, next_dh = _entering(
            hs, ss, ns, ms, dy, at_y - H * P, inside & (i + 1 < T), KIND
        )
        dh += dh_t.to(tl.float32)
        x0, x1, x2, x3 = _apart(x_.to(tl.float32), BP, TILES)
        p_ = tl.dot(r, h.to(DOT), input_precision=PREC) + bias[:, None]
        p0, p1, p2, p3 = _apart(p_, BP, TILES)
        d0, d1, d2, d3, to_r, direct, ds, dn, dm = retreat(
            x0, x1, x2, x3, p0, p1, p2, p3, h.to(tl.float32), s.to(tl.float32), n.to(tl.float32),
            m.to(tl.float32), dh, ds, dn, dm, inside, KIND,
        )  # fmt: skip
        d_ = _together(d0, d1, d2, d3, BP, TILES)
        tl.store(dx + at_x, d_.to(dx.dtype.element_ty), mask=x_inside)
        if KIND == "gru":
            tl.store(dq + at_y, to_r.to(dq.dtype.element_ty), mask=inside)
            d_ = _together(d0, d1, to_r, d3, BP, TILES)
        dh = direct + tl.dot(tl.trans(r), d_.to(DOT), input_precision=PREC)
        if reset is not None:
            cut = tl.load(reset + b.to(tl.int64) * T + T - 1 - i, mask=b < B, other=0)[None, :] != 0
            dh, ds = tl.where(cut, 0.0, dh), tl.where(cut, 0.0, ds)
            dn, dm = tl.where(cut, 0.0, dn), tl.where(cut, 0.0, dm)
        at_x -= GATES * H * P
        at_y -= H * P
        x_, h, s, n, m, dh_t = x_next, next_h, next_s, next_n, next_m, next_dh
    if dh0 is not None:
        tl.store(dh0 + once, dh, mask=inside)
        if ds0 is not None:
            tl.store(ds0 + once, ds, mask=inside)
        if dn0 is not None:
            tl.store(dn0 + once, dn, mask=inside)
            tl.store(dm0 + once, dm, mask=inside)


def _launch(kind: str, x: Tensor, R: Tensor):
    """Grid, sizes and switches of both kernels."""
    B, T, _, H, P = x.shape
    half = x.dtype == R.dtype and x.dtype.itemsize == 2
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype] if half else tl.float32
    BP = _padded(P)
    gates = GATES[kind]
    switches = {"H": H, "BP": BP, "KIND": kind, "GATES": gates, "TILES": 1 if gates == 1 else 4}
    switches |= {"DOT": dot, "PREC": "tf32x3"}
    switches |= {"num_warps": max(1, BP // 16), "num_stages": 1}  # a warp has 16 rows of every gate
    return (cdiv(B, ROWS.value), H), (B, T, P), switches


def _padded(P: int) -> int:
    return max(16, power_of_2(P))


def _pad(states, count: int = 4) -> tuple:
    """Four states, with None for those the cell lacks."""
    return (*states, *[None] * (count - len(states)))


def _run(kind: str, *args):
    x, R, c, *states, reset, save = args
    x, R, c, reset, *states = (flat(v) for v in (x, R, c, reset, *states))
    y, *rest = _fake(kind, x, R, c, *states, reset, save)
    last, saved = rest[: STATES[kind]], rest[STATES[kind] :]
    if wide(x, R, False):
        wide_cells.forward(
            kind, GATES[kind], x, R, c, _pad(states), reset, y, _pad(last), _pad(saved, 3), save
        )
        return y, *rest
    grid, sizes, switches = _launch(kind, x, R)
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
    if wide(x, R, True):
        dx = wide_cells.backward(kind, GATES[kind], *given, saved, reset, dy, dlast, dq, _pad(dstates))
    else:
        dx = torch.empty_like(x)
        grid, sizes, switches = _launch(kind, x, R)
        _backward[grid](*given, *saved, reset, dy, *dlast, dx, dq, *_pad(dstates), *sizes, **switches)
    dR, dc = (_outer_sums if x.shape[-1] > WIDEST else _sums_by_head)(dx, dq, hs)
    return dx, dR.to(R.dtype), None if c is None else dc.to(c.dtype), *dstates, None


def _outer_sums(dx: Tensor, dq: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
    """Σ over batch and time of dp ⊗ h by gate and head, and Σ dp."""
    gates = [dx[:, :, g] if dq is None or g < 2 else dq for g in range(dx.shape[2])]
    h = h.flatten(0, 1).transpose(0, 1)
    dR = torch.stack([torch.bmm(d.flatten(0, 1).permute(1, 2, 0), h) for d in gates])
    return dR, torch.stack([d.sum((0, 1), dtype=torch.float32) for d in gates])


@triton.jit
def _sums(
    dx, dq, h, dR, dc, N, LENGTH, P,
    H: tl.constexpr, BP: tl.constexpr, GATES: tl.constexpr, STEPS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """`_outer_sums` of a stretch of LENGTH of the N steps of all sequences. Grid (stretches, GATES, H)."""
    part, gate, head, p = tl.program_id(0), tl.program_id(1), tl.program_id(2), tl.arange(0, BP)
    total, bias = tl.zeros([BP, BP], tl.float32), tl.zeros([BP], tl.float32)
    for start in range(part * LENGTH, tl.minimum(N, (part + 1) * LENGTH), STEPS):
        n = (start + tl.arange(0, STEPS)).to(tl.int64)[:, None]
        inside = (n < N) & (p < P)[None, :]
        at = n * (H * P) + head * P + p[None, :]
        h_ = tl.load(h + at, mask=inside, other=0.0)
        at_x = n * (GATES * H * P) + (gate * H + head) * P + p[None, :]
        if dq is None:
            d = tl.load(dx + at_x, mask=inside, other=0.0)
        else:
            d = tl.load(dx + at_x, mask=inside & (gate < 2), other=0.0)
            d += tl.load(dq + at, mask=inside & (gate == 2), other=0.0)
        total += tl.dot(tl.trans(d), h_, input_precision=PREC)
        bias += tl.sum(d.to(tl.float32), 0)
    here = (part * GATES + gate) * H + head
    at = (here * P + p[:, None]) * P + p[None, :]
    tl.store(dR + at, total, mask=(p < P)[:, None] & (p < P)[None, :])
    tl.store(dc + here * P + p, bias, mask=p < P)


def _sums_by_head(dx: Tensor, dq: Tensor | None, h: Tensor) -> tuple[Tensor, Tensor]:
    """`_outer_sums` of narrow heads, each of which would leave a library's matrix product one program."""
    B, T, gates, H, P = dx.shape
    parts = min(cdiv(PROGRAMS, gates * H), cdiv(B * T, 256))
    length = cdiv(cdiv(B * T, parts), STEPS) * STEPS
    parts = cdiv(B * T, length)
    dR, dc = (dx.new_empty(parts, gates, H, *s, dtype=torch.float32) for s in ((P, P), (P,)))
    args = (dx, dq, h, dR, dc, B * T, length, P)
    launch(_sums, (parts, gates, H), args, (H, _padded(P), gates, STEPS, "tf32x3"), 4, 3, wgmma=False)
    return dR.sum(0), dc.sum(0)


def _fake(kind: str, *args):
    x, save = args[0], args[-1]
    B, T, _, H, P = x.shape
    y = x.new_empty(B, T, H, P)
    last = [x.new_empty(B, H, P, dtype=torch.float32) for _ in range(STATES[kind])]
    shape = (B, T, H, P) if save else (0,)
    # an LSTM's cells are rounded as its outputs are; float16 does not reach as far as a sum over steps
    dtype = x.dtype if kind == "lstm" and x.dtype == torch.bfloat16 else torch.float32
    saved = [x.new_empty(shape, dtype=dtype) for _ in range(STATES[kind] - 1)]
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


def wide(x: Tensor, R: Tensor, back: bool) -> bool:
    """Whether many programs share a head: where one multiprocessor does not hold R, and where it does not
    hold R both ways round, forwards if there are steps enough to pay for the sharing."""
    half = x.dtype == R.dtype and x.dtype.itemsize == 2
    P, widest = x.shape[-1], WIDEST if half else WIDEST // 2
    return P > widest or (2 * P > widest and (back or x.shape[1] >= MANY))


def refuses(x: Tensor, R: Tensor) -> str | None:
    """Why no kernel takes a head of this width, or None."""
    if x.shape[-1] > wide_cells.WIDEST:
        return (
            f"a head of P = {x.shape[-1]} has more recurrent weights than the chip holds; "
            f"it takes at most {wide_cells.WIDEST}: use more heads"
        )
    return None
