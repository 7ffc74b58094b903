"""The selective state space on a GPU: the T × E × N states exist in registers only. See `lanes`.

A program takes one sequence's block of channels and streams tiles of time; for each of the N states in turn
it makes the decays a = e^{dt A_n}, or that + low (1 - that), and inputs dt x B_n of the tile, sweeps them
and adds C_n h to y. The state that leaves each tile is kept, so that backward, which goes through the
tiles against time, can sweep any tile's h again. Where channels are too few to fill the chip, time is cut in
pieces as in `scan`: a first pass says what each of them does to a state, a scan what enters it. With
s = ∂a/∂(dt A_n), which is a or (1 - low) e^{dt A_n}:

    g_t = C_t dy_t + f_{t+1}      f_t = a_t g_t
    (f_T is the gradient of the last state, f_0 that of the first)
    dx = dt Σ_n g B_n    ddt = Σ_n g (s h_{t-1} A_n + x B_n)    dA_n = Σ_t g s h_{t-1} dt    dB_n = Σ_e g dt x
    dC_n = Σ_e dy h    dlow_n = Σ_t g (1 - e^{dt A_n}) h_{t-1}

The sums over channels are written once a channel block and the sums over batch once a sequence, and added in
a fixed order afterwards. Source: Gu & Dao 2023 (arXiv:2312.00752), algorithm 2 and appendix D.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import scan
from .lanes import LANES, LENGTH, places, sums, sweep_before
from .launch import cdiv, launch
from .tape import define
from .tiles import flags, flat, spread, sweep_rows

LOG2E = tl.constexpr(1.4426950408889634)
SEGMENTS = 4  # of a tile, a warp each
PROGRAMS = 528  # that a chip of 132 multiprocessors holds at once


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _exp(x):
    """e^x for x ≤ 0. The chip's own may be 2^-22 off, near 0 at every step to the same side, and a decay near
    1 enters a state as often as it has steps to remember: so near 0 the series, all but 1e-8 of it."""
    p = 1 / 120 + x * (1 / 720)
    p = 1 / 6 + x * (1 / 24 + x * p)
    return tl.where(tl.abs(x) < 0.25, 1 + x * (1 + x * (0.5 + x * p)), tl.exp2(x * LOG2E))


@triton.jit
def _decay(dt, A, low, EXACT: tl.constexpr):
    """e^{dt A} and a."""
    raised = _exp(dt * A) if EXACT else tl.exp2(dt * (A * LOG2E))
    a = raised
    if low is not None:
        a += low * (1 - raised)  # exactly 1 where dt is 0, as past the end
    return raised, a


@triton.jit
def _so_far(products, ends, at, inside):
    """A piece's end and product up to a tile, those of no steps outside."""
    return _load(ends, at, inside), tl.load(products + at, mask=inside, other=1.0)


@triton.jit(do_not_specialize=["shift"])
def _forward(
    x, dt, A, B, C, low, start, reset, products, between, y, final, states, T, E, N, TILES, PIECES, shift,
    S: tl.constexpr, SAVE: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, batch, pieces of TILES tiles). states: (batch, tiles or 2 a piece, N, E), what
    leaves every tile, or two of a piece in turn. products, between: (batch, pieces - 1, N, E); SUMMARY writes
    there what a piece's decays multiply to and what it ends with if it begins with zeros, and no y; else
    between is what enters the pieces but the first."""
    row, piece = tl.program_id(1).to(tl.int64), tl.program_id(2)
    t, seg, channel, c = places(S)
    here, inner = channel < E, c < E
    tiles, link = tl.cdiv(T, S * LENGTH), (row * (PIECES - 1) + piece) * N * E + c
    EXACT: tl.constexpr = low is not None and x.dtype.element_ty == tl.float32
    for k in range(piece * TILES, tl.minimum(tiles, (piece + 1) * TILES)):
        t0, first = k * S * LENGTH, k == piece * TILES
        live, inside = t0 + seg < T, (t0 + t < T) & here
        base, at, at_n = (row * T + t0) * E, t * E + channel + shift, row * N * T + t0 + seg
        dt_ = _load(dt + base, at, inside)
        drive, total = dt_ * _load(x + base, at, inside), tl.zeros(t.shape, tl.float32)
        slot, slot_before = row * tiles + k, row * tiles + k - 1
        if not SAVE:
            slot, slot_before = (row * PIECES + piece) * 2 + k % 2, (row * PIECES + piece) * 2 + (k + 1) % 2
        for n in range(N):
            # what is read comes first, since no load passes the barriers of a sweep
            A_, B_ = _load(A, n * E + channel, here), _load(B, at_n + n * T, live)
            low_ = None if low is None else _load(low, n * E + channel, here)
            if SUMMARY:
                carry, product = _so_far(products, between, link + n * E, inner & (not first))
            else:
                C_ = _load(C, at_n + n * T, live)
                carry = _load(states, (slot_before * N + n) * E + c, inner & (not first))
                if between is not None:
                    carry += _load(between, link + (n - N) * E, inner & first & (piece > 0))
                if start is not None:
                    carry += _load(start, (row * N + n) * E + c, inner & first & (piece == 0))
            _, a = _decay(dt_, A_, low_, EXACT)
            if reset is not None:
                a = tl.where(spread(flags(reset, row * T + t0 + seg, live), LANES), 0.0, a)
            h, carry, through = sweep_rows(a, drive * spread(B_, LANES), carry)
            if SUMMARY:
                tl.store(between + link + n * E, carry, mask=inner)
                tl.store(products + link + n * E, product * through, mask=inner)
            else:
                total += h * spread(C_, LANES)
                tl.store(states + (slot * N + n) * E + c, carry, mask=inner)
                if k == tiles - 1:
                    tl.store(final + (row * N + n) * E + c, carry, mask=inner)
        if not SUMMARY:
            tl.store(y + base + at, total.to(y.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # a state may be read by another thread than wrote it


@triton.jit(do_not_specialize=["shift"])
def _backward(
    x, dt, A, B, C, low, start, reset, states, dy, dfinal, products, between, dx, ddt, dA, dBC, dlow, flow,
    T, E, N, TILES, PIECES, shift, S: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """As `_forward`, tiles and pieces against time, f for h. dBC: (2, channel blocks, batch, N, T) and dA,
    dlow: (batch, pieces, S, N, E) are parts; flow: (batch, pieces, N, E) ends as the f before each piece."""
    block, row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    blocks, batch = tl.num_programs(0).to(tl.int64), tl.num_programs(1)
    t, seg, channel, c = places(S)
    here, inner = channel < E, c < E
    tiles, link = tl.cdiv(T, S * LENGTH), (row * (PIECES - 1) + piece) * N * E + c
    mine = (row * PIECES + piece) * N * E
    # of a segment's channels, and of the sums for B and for C of its steps
    parts = mine * S + tl.arange(0, S * LANES)[None, :] // LANES * N * E + channel
    q = tl.arange(0, 2 * LENGTH)[None, :]
    u = tl.arange(0, S)[:, None] * LENGTH + q % LENGTH
    part = ((q // LENGTH * blocks + block) * batch + row) * N * T + u
    EXACT: tl.constexpr = low is not None and x.dtype.element_ty == tl.float32
    for i in range(piece * TILES, tl.minimum(tiles, (piece + 1) * TILES)):
        k, first = tiles - 1 - i, i == piece * TILES
        t0 = k * S * LENGTH
        live, inside = t0 + seg < T, (t0 + t < T) & here
        base, at, at_n = (row * T + t0) * E, t * E + channel + shift, row * N * T + t0 + seg
        dt_, dy_ = _load(dt + base, at, inside), _load(dy + base, at, inside)
        if not SUMMARY:
            x_ = _load(x + base, at, inside)
            drive, gB, gA = dt_ * x_, tl.zeros(t.shape, tl.float32), tl.zeros(t.shape, tl.float32)
        for n in range(N):
            A_, C_ = _load(A, n * E + channel, here), _load(C, at_n + n * T, live)
            low_ = None if low is None else _load(low, n * E + channel, here)
            if SUMMARY:
                f, product = _so_far(products, between, link + n * E, inner & (not first))
            else:
                B_ = spread(_load(B, at_n + n * T, live), LANES)
                h = _load(states, ((row * tiles + k - 1) * N + n) * E + c, inner & (k > 0))
                f = _load(flow, mine + n * E + c, inner & (not first))
                sum_A = _load(dA, parts + n * E, here & (not first))
                if low is not None:
                    sum_low = _load(dlow, parts + n * E, here & (not first))
                if start is not None:
                    h += _load(start, (row * N + n) * E + c, inner & (k == 0))
                if between is not None:
                    f += _load(between, link + (n - N) * E, inner & first & (piece > 0))
                if dfinal is not None:
                    f += _load(dfinal, (row * N + n) * E + c, inner & first & (piece == 0))
            raised, a = _decay(dt_, A_, low_, EXACT)
            if reset is not None:
                cut = spread(flags(reset, row * T + t0 + seg, live), LANES)
                a = tl.where(cut, 0.0, a)
            g = spread(C_, LANES) * dy_
            later, f, through = sweep_before(a, a * g, f, True)
            if SUMMARY:
                tl.store(between + link + n * E, f, mask=inner)
                tl.store(products + link + n * E, product * through, mask=inner)
            else:
                tl.store(flow + mine + n * E + c, f, mask=inner)
                g += later
                b = drive * B_
                before, _, _ = sweep_before(a, b, h, False)
                kept = a * before
                gB += g * B_
                moved = g * kept  # by a change of dt A_n
                if low is not None:
                    moved = g * before
                    if reset is not None:
                        moved = tl.where(cut, 0.0, moved)
                    sum_low += tl.sum(moved * (1 - raised), 0)[None, :]
                    tl.store(dlow + parts + n * E, sum_low, mask=here)
                    moved *= (1 - low_) * raised
                gA += moved * A_
                sum_A += tl.sum(moved * dt_, 0)[None, :]
                tl.store(dA + parts + n * E, sum_A, mask=here)
                tl.store(dBC + part + n * T + t0, sums(g * drive, dy_ * (kept + b)), mask=t0 + u < T)
        if not SUMMARY:
            tl.store(dx + base + at, (dt_ * gB).to(dx.dtype.element_ty), mask=inside)
            tl.store(ddt + base + at, (gA + x_ * gB).to(ddt.dtype.element_ty), mask=inside)
        tl.debug_barrier()


def _tiles(x: Tensor) -> int:
    return cdiv(x.shape[1], SEGMENTS * LENGTH.value)


def _plan(x: Tensor) -> tuple[int, int, int, int]:
    """Channel blocks, tiles, tiles a piece, pieces. Time is cut where channels are too few to fill the chip,
    and not into two, since summaries take over half as long as what they are for."""
    batch, _, E = x.shape
    blocks, tiles = cdiv(E, LANES.value), _tiles(x)
    pieces = min(PROGRAMS // (batch * blocks), tiles // 2)
    of_piece = cdiv(tiles, pieces) if pieces > 2 else tiles
    return blocks, tiles, of_piece, cdiv(tiles, of_piece)


def _turned(*xs: Tensor | None) -> tuple[Tensor | None, ...]:
    """As kernels read them: neighbouring channels of A, low and states, neighbouring steps of B and C."""
    return tuple([None if x is None else x.float().mT.contiguous() for x in xs])


def _launch(kernel, inputs: tuple, others: tuple, first: Tensor | None, constants: tuple, registers=None):
    """`first` is what enters the first piece; what enters the others, a scan of their summaries says."""
    x, _, A, *_ = inputs
    (batch, T, E), (blocks, _, of_piece, pieces), N = x.shape, _plan(x), A.shape[0]
    numbers, between = (T, E, N, of_piece, pieces, 0), None
    if pieces > 1:
        products, ends = (x.new_empty(batch, pieces - 1, N * E, dtype=torch.float32) for _ in range(2))
        args = (*inputs, products, ends, *others, *numbers)
        launch(kernel, (blocks, batch, pieces - 1), args, (*constants, True), SEGMENTS)
        first = None if first is None else first.view(batch, N * E)
        between, _ = scan._run(products, ends, first, None, False)
    args = (*inputs, None, between, *others, *numbers)
    launch(kernel, (blocks, batch, pieces), args, (*constants, False), SEGMENTS, registers=registers)


def _run(x, dt, A, B, C, low, state, reset, save):
    y, _, states = _fake(x, dt, A, B, C, low, state, reset, save)
    (batch, _, E), N, pieces = x.shape, A.shape[1], _plan(x)[-1]
    final = x.new_empty(batch, N, E, dtype=torch.float32)
    # without gradients two states a piece are enough: one to read, one to write
    room = states if save else x.new_empty(batch, pieces * 2, N, E, dtype=torch.float32)
    A, B, C, low, start = _turned(A, B, C, low, state)
    inputs = flat(x), flat(dt), A, B, C, low, start, flat(reset)
    # four programs a multiprocessor, not three: what they wait for is loads
    _launch(_forward, inputs, (y, final, room), start, (SEGMENTS, save), registers=128)
    return y, final.mT.contiguous(), states


def _run_backward(x, dt, A, B, C, low, state, reset, y, final, states, dy, dfinal):
    (batch, T, E), N, (blocks, *_, pieces) = x.shape, A.shape[1], _plan(x)
    dy = torch.zeros_like(y) if dy is None else dy
    dx, ddt = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt))
    dA = x.new_empty(batch, pieces, SEGMENTS, N, E, dtype=torch.float32)
    flow = x.new_empty(batch, pieces, N, E, dtype=torch.float32)
    dlow = None if low is None else torch.empty_like(dA)
    dBC = x.new_empty(2, blocks, batch, N, T, dtype=torch.float32)
    *turned, last = _turned(A, B, C, low, state, dfinal)
    inputs = flat(x), flat(dt), *turned, flat(reset), states, flat(dy), last
    _launch(_backward, inputs, (dx, ddt, dA, dBC, dlow, flow), last, (SEGMENTS,))

    def gradient(parts: Tensor | None, axes: tuple[int, ...], like: Tensor | None) -> Tensor | None:
        return None if like is None else parts.sum(axes).mT.to(like.dtype).contiguous()

    dB, dC = (gradient(dBC[i], (0,), v) for i, v in enumerate((B, C)))
    dA, dlow = (gradient(v, (0, 1, 2), like) for v, like in ((dA, A), (dlow, low)))
    return dx, ddt, dA, dB, dC, dlow, gradient(flow[:, -1:], (1,), state), None


def _fake(x, dt, A, B, C, low, state, reset, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    states = x.new_empty(x.shape[0], _tiles(x) if save else 0, A.shape[1], A.shape[0], dtype=torch.float32)
    return y, x.new_empty(x.shape[0], *A.shape, dtype=torch.float32), states


_selective = define(
    "selective_gpu",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? low, Tensor? state, Tensor? reset",
    2, 1, _run, _run_backward, _fake,
)  # fmt: skip


def selective(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    low: Tensor | None = None,
    state: Tensor | None = None,
    reset: Tensor | None = None,
):
    y, h = _selective(x, dt, A, B, C, low, state, reset)
    return y, h
