"""Diagonal recurrences on a GPU: h_t = a_t h_{t-1} + b_t and its gradients, real or complex. See `tiles`.

A program takes one sequence's block of channels and streams tiles of time, the next tile in flight while this
one is swept. Where channels are too few to fill the chip and time is long, time is cut in pieces as well: a
first pass writes every piece's (product of a, end from zero), a second starts each piece from those of the
pieces before it.

    backward    g_t = dy_t + ā_{t+1} g_{t+1}        db_t = g_t        da_t = g_t h̄_{t-1}
    dh_0 = ā_1 g_1

runs the same tiles against time. All of it reads a, b (a, y, dy) once and writes y (da, db) once: the floor
is bandwidth. h_{t-1} is read from y, so in half precision da carries y's rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import cdiv, launch
from .tape import define
from .tiles import flags, flat, shape, spread, sweep_complex, sweep_rows

STAGES = 3  # tiles in flight


@triton.jit
def _get(x, base, at, inside, other, COMPLEX: tl.constexpr):
    """Real and imaginary parts of x[base + at] in float32; `base` is a scalar of 64 bits. Complex numbers are
    pairs along the last axis of `at` and `inside`."""
    if COMPLEX:
        v = tl.load(x + base * 2 + at, mask=inside, other=(1 - (at & 1)) * other)
        if len(v.shape) == 1:
            v = tl.reshape(v, [v.shape[0] // 2, 2])
        else:
            v = tl.reshape(v, [v.shape[0], v.shape[1] // 2, 2])
        re, im = tl.split(v.to(tl.float32))
    else:
        re = tl.load(x + base + at, mask=inside, other=other).to(tl.float32)
        im = re
    return re, im


@triton.jit
def _put(x, base, at, inside, re, im, COMPLEX: tl.constexpr):
    if COMPLEX:
        v = tl.reshape(tl.join(re, im), at.shape)
        tl.store(x + base * 2 + at, v.to(x.dtype.element_ty), mask=inside)
    else:
        tl.store(x + base + at, re.to(x.dtype.element_ty), mask=inside)


@triton.jit
def _tile_sweep(ar, ai, br, bi, hr, hi, COMPLEX: tl.constexpr):
    if COMPLEX:
        yr, yi, hr, hi, pr, pi = sweep_complex(ar, ai, br, bi, hr, hi)
    else:
        yr, hr, pr = sweep_rows(ar, br, hr)
        yi, hi, pi = yr, hr, pr
    return yr, yi, hr, hi, pr, pi


@triton.jit
def _times(ar, ai, br, bi, COMPLEX: tl.constexpr):
    if COMPLEX:
        re, im = ar * br - ai * bi, ar * bi + ai * br
    else:
        re = ar * br
        im = re
    return re, im


@triton.jit
def _enter(hr, hi, start, ends, row, piece, pieces, c, D, COMPLEX: tl.constexpr):
    """The state before this piece: `start` (B, D) carried through the (product, end) pairs of the pieces
    before it."""
    inside = c < D * (1 + COMPLEX)
    if start is not None:
        hr, hi = _get(start, row * D, c, inside, 0.0, COMPLEX)
    if ends is not None:
        for j in range(0, piece):
            base = (row * pieces + j) * 2 * D
            pr, pi = _get(ends, base, c, inside, 0.0, COMPLEX)
            er, ei = _get(ends, base + D, c, inside, 0.0, COMPLEX)
            hr, hi = _times(pr, pi, hr, hi, COMPLEX)
            hr, hi = hr + er, hi + ei
    return hr, hi


@triton.jit
def _places(S: tl.constexpr, L: tl.constexpr, C: tl.constexpr):
    """Of a tile of rows the times, those by (step, segment), and the channels."""
    i, j = tl.arange(0, L)[:, None], tl.arange(0, S * C)[None, :]
    return j // C * L + i, tl.arange(0, S)[None, :] * L + i, tl.program_id(0) * C + j % C


@triton.jit
def _forward(
    a, b, start, reset, ends, y, final, T, D, LENGTH,
    S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, COMPLEX: tl.constexpr, STAGES: tl.constexpr,
    SUMMARY: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks, B, pieces of LENGTH steps). SUMMARY writes (product, end) to `ends` and no y."""
    W: tl.constexpr = C * (1 + COMPLEX)  # numbers of a block's channels at a time
    c, row = tl.program_id(0) * W + tl.arange(0, W), tl.program_id(1).to(tl.int64)
    width = D * (1 + COMPLEX)
    piece, pieces = tl.program_id(2), tl.num_programs(2)
    t, of_segment, channel = _places(S, L, W)
    begin = piece * LENGTH
    end = tl.minimum(T, begin + LENGTH)
    at, here = t * width + channel, channel < width
    hr, hi = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    pr, pi = tl.full([C], 1.0, tl.float32), tl.zeros([C], tl.float32)
    if not SUMMARY:
        hr, hi = _enter(hr, hi, start, ends, row, piece, pieces, c, D, COMPLEX)
    for t0 in tl.range(begin, end, S * L, num_stages=STAGES):
        base, inside = (row * T + t0) * D, (t0 + t < end) & here
        ar, ai = _get(a, base, at, inside, 1.0, COMPLEX)
        br, bi = _get(b, base, at, inside, 0.0, COMPLEX)
        if reset is not None:
            now = t0 + of_segment
            cut = spread(flags(reset, row * T + now, now < end), C)
            ar, ai = tl.where(cut, 0.0, ar), tl.where(cut, 0.0, ai)
        yr, yi, hr, hi, tr, ti = _tile_sweep(ar, ai, br, bi, hr, hi, COMPLEX)
        if SUMMARY:
            pr, pi = _times(tr, ti, pr, pi, COMPLEX)
        else:
            _put(y, base, at, inside, yr, yi, COMPLEX)
    if SUMMARY:
        out = (row * pieces + piece) * 2 * D
        _put(ends, out, c, c < width, pr, pi, COMPLEX)
        _put(ends, out + D, c, c < width, hr, hi, COMPLEX)
    elif piece == pieces - 1:
        _put(final, row * D, c, c < width, hr, hi, COMPLEX)


@triton.jit
def _backward(
    a, y, start, reset, ends, dy, dfinal, da, db, dstart, T, D, LENGTH,
    S: tl.constexpr, L: tl.constexpr, C: tl.constexpr, COMPLEX: tl.constexpr, STAGES: tl.constexpr,
    SUMMARY: tl.constexpr,
):  # fmt: skip
    """As `_forward`, with u = T - 1 - t for time: the decay into step u is ā_{t+1}, and what enters is
    dy_t. What start means for da_0 comes last."""
    W: tl.constexpr = C * (1 + COMPLEX)  # numbers of a block's channels at a time
    c, row = tl.program_id(0) * W + tl.arange(0, W), tl.program_id(1).to(tl.int64)
    width = D * (1 + COMPLEX)
    piece, pieces = tl.program_id(2), tl.num_programs(2)
    u, of_segment, channel = _places(S, L, W)
    here = channel < width
    begin = piece * LENGTH
    end = tl.minimum(T, begin + LENGTH)
    gr, gi = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    pr, pi = tl.full([C], 1.0, tl.float32), tl.zeros([C], tl.float32)
    if not SUMMARY:
        gr, gi = _enter(gr, gi, dfinal, ends, row, piece, pieces, c, D, COMPLEX)
    for u0 in tl.range(begin, end, S * L, num_stages=STAGES):
        t, now = T - 1 - (u0 + u), T - 1 - (u0 + of_segment)
        live = u0 + u < end
        inside = live & here
        base = (row * T + T - 1 - u0) * D
        at = channel - u * width
        after = inside & (t < T - 1)
        ar, ai = _get(a, base + D, at, after, 1.0, COMPLEX)
        dr, di = _get(dy, base, at, inside, 0.0, COMPLEX)
        if not SUMMARY:
            before = inside & (t > 0)
            hr, hi = _get(y, base - D, at, before, 0.0, COMPLEX)
        if reset is not None:
            cut = spread(flags(reset, row * T + now + 1, (u0 + of_segment < end) & (now < T - 1)), C)
            ar, ai = tl.where(cut, 0.0, ar), tl.where(cut, 0.0, ai)
        xr, xi, gr, gi, tr, ti = _tile_sweep(ar, -ai, dr, di, gr, gi, COMPLEX)
        if SUMMARY:
            pr, pi = _times(tr, ti, pr, pi, COMPLEX)
        else:
            _put(db, base, at, inside, xr, xi, COMPLEX)
            if reset is not None:
                cut = spread(flags(reset, row * T + now, u0 + of_segment < end), C)
                hr, hi = tl.where(cut, 0.0, hr), tl.where(cut, 0.0, hi)
            xr, xi = _times(xr, xi, hr, -hi, COMPLEX)
            _put(da, base, at, inside, xr, xi, COMPLEX)
    if SUMMARY:
        out = (row * pieces + piece) * 2 * D
        _put(ends, out, c, c < width, pr, pi, COMPLEX)
        _put(ends, out + D, c, c < width, gr, gi, COMPLEX)
    elif start is not None and piece == pieces - 1:
        cut = 0
        if reset is not None:
            cut = tl.load(reset + row * T)
        hr, hi = _get(start, row * D, c, (c < width) & (cut == 0), 0.0, COMPLEX)
        hr, hi = _times(gr, gi, hr, -hi, COMPLEX)
        tl.debug_barrier()  # after zeros that other threads wrote there
        _put(da, row * T * D, c, c < width, hr, hi, COMPLEX)
        ar, ai = _get(a, row * T * D, c, (c < width) & (cut == 0), 0.0, COMPLEX)
        gr, gi = _times(ar, -ai, gr, gi, COMPLEX)
        _put(dstart, row * D, c, c < width, gr, gi, COMPLEX)


def _plan(b: Tensor, backward: bool):
    """Tile, grid, steps a piece and room for the pieces' ends."""
    B, T, D = b.shape
    # channels of one load, which a thread keeps together
    vector = 16 // b.element_size()
    S, L, C, warps = shape(T, D, B, vector, 8)
    if backward and C <= 32 and not b.is_complex():
        L = min(L, 4)  # measured
    blocks = cdiv(D, C)
    # a piece is worth a second reading of a and b when most of the chip would stand idle
    idle = B * blocks < 96
    pieces = max(1, min(32, 264 // (B * blocks), T // (2 * S * L))) if idle else 1
    length = cdiv(cdiv(T, pieces), S * L) * S * L
    pieces = cdiv(T, length)
    wide = torch.complex64 if b.is_complex() else torch.float32
    ends = b.new_empty(B, pieces, 2, D, dtype=wide) if pieces > 1 else None
    return (blocks, B, pieces), length, ends, (S, L, C, b.is_complex(), STAGES), warps


def _launch(kernel, inputs: tuple, others: tuple, b: Tensor) -> None:
    grid, length, ends, tile, warps = _plan(b, kernel is _backward)
    args = (*map(flat, (*inputs, ends, *others)), *b.shape[1:], length)
    for summary in (False,) if ends is None else (True, False):
        # all registers: a compiler that saves them for more programs spills, and shared memory has no room
        launch(kernel, grid, args, (*tile, summary), warps, STAGES, registers=255)


def _run(a, b, state, reset, save):
    y, final = _fake(a, b, state, reset, save)
    _launch(_forward, (a, b, state, reset), (y, final), b)
    return y, final


def _run_backward(a, b, state, reset, y, h, dy, dh):
    dy = torch.zeros_like(y) if dy is None else dy
    da, db = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (a, b))
    dstate = None if state is None else torch.empty_like(state, memory_format=torch.contiguous_format)
    _launch(_backward, (a, y, state, reset), (dy, dh, da, db, dstate), b)
    return da, db, dstate, None


def _fake(a, b, state, reset, save):
    wide = torch.complex64 if b.is_complex() else torch.float32
    y = torch.empty_like(b, memory_format=torch.contiguous_format)
    return y, b.new_empty(b.shape[0], b.shape[2], dtype=wide)


_diagonal = define(
    "diagonal_gpu", "Tensor a, Tensor b, Tensor? state, Tensor? reset", 2, 0, _run, _run_backward, _fake
)


def diagonal(
    a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    if a.is_complex() or b.is_complex():
        a, b = a.to(torch.complex64), b.to(torch.complex64)
        state = None if state is None else state.to(torch.complex64)
    y, h = _diagonal(a, b, state, reset)
    return y, h
