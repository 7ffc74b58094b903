"""The selective state space on a GPU: the T × E × N states exist in registers only. See `tiles`.

A program takes one sequence's block of channels and streams tiles of time; for each of the N states in turn
it makes the decays a = e^{dt A_n}, or that + low (1 - that), and inputs dt x B_n of the tile, sweeps them
and adds C_n h to y. The state that leaves each tile is kept, so that backward, which goes through the
tiles against time, can sweep any tile's h again. With s = ∂a/∂(dt A_n), which is a or (1 - low) e^{dt A_n}:

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

from riverrun.kernels.library import define

from .launch import DEVICE, cdiv, power_of_2
from .tiles import flags, flat, sweep, sweep_before


@triton.jit
def _load(x, at, inside):
    return tl.load(x + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """e^x for x ≤ 0. The chip's own may be 2^-22 off, near 0 at every step to the same side, and a decay near
    1 enters a state as often as it has steps to remember: EXACT takes the series there, all but 1e-8 of it.
    """
    e = tl.exp(x)
    if EXACT:
        p = 1 / 120 + x * (1 / 720)
        p = 1 / 6 + x * (1 / 24 + x * p)
        e = tl.where(tl.abs(x) < 0.25, 1 + x * (1 + x * (0.5 + x * p)), e)
    return e


@triton.jit
def _forward(
    x, dt, A, B, C, low, start, reset, y, final, states, T, E, N, SLOTS,
    S: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Grid (channel blocks of W, batch). states: (batch, SLOTS, N, E), what leaves tile k at slot k %
    SLOTS."""
    c, row = tl.program_id(0) * W + tl.arange(0, W), tl.program_id(1).to(tl.int64)
    t = tl.arange(0, S)[:, None] * L + tl.arange(0, L)[None, :]
    slots = states + row * SLOTS * N * E + c
    EXACT: tl.constexpr = low is not None and x.dtype.element_ty == tl.float32
    for k in range(0, tl.cdiv(T, S * L)):
        t0 = k * S * L
        live = t0 + t < T
        inside = live[:, :, None] & (c < E)[None, None, :]
        base, at = (row * T + t0) * E, t[:, :, None] * E + c[None, None, :]
        dt_ = _load(dt + base, at, inside)
        drive, total = dt_ * _load(x + base, at, inside), tl.zeros([S, L, W], tl.float32)
        at_n, last = (row * T + t0) * N + t * N, (k + SLOTS - 1) % SLOTS
        for n in range(N):
            a = _exp(dt_ * _load(A, c * N + n, c < E)[None, None, :], EXACT)
            if low is not None:
                low_ = _load(low, c * N + n, c < E)[None, None, :]
                a += low_ * (1 - a)  # exactly 1 where dt is 0, as past the end
            if reset is not None:
                a = tl.where(flags(reset, row * T + t0 + t, live)[:, :, None], 0.0, a)
            carry = tl.zeros([W], tl.float32)
            if k > 0:
                carry = tl.load(slots + (last * N + n) * E, mask=c < E, other=0.0)
            elif start is not None:
                carry = _load(start, (row * E + c) * N + n, c < E)
            h, carry, _ = sweep(a, drive * _load(B, at_n + n, live)[:, :, None], carry)
            total += h * _load(C, at_n + n, live)[:, :, None]
            tl.store(slots + ((k % SLOTS) * N + n) * E, carry, mask=c < E)
            if t0 + S * L >= T:
                tl.store(final + (row * E + c) * N + n, carry, mask=c < E)
        tl.store(y + base + at, total.to(y.dtype.element_ty), mask=inside)
        tl.debug_barrier()  # a slot may be read by another thread than wrote it


@triton.jit
def _backward(
    x, dt, A, B, C, low, start, reset, states, dy, dfinal, dx, ddt, dA, dB, dC, dlow, flow, T, E, N, SLOTS,
    S: tl.constexpr, L: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """dB, dC: (channel blocks, batch, T, N) and dA, dlow, flow: (batch, N, E) are parts; flow ends as the
    first f."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    c = block * W + tl.arange(0, W)
    t = tl.arange(0, S)[:, None] * L + tl.arange(0, L)[None, :]
    slots, mine = states + row * SLOTS * N * E + c, row * N * E + c
    part = block.to(tl.int64) * tl.num_programs(1) * T * N
    tiles = tl.cdiv(T, S * L)
    EXACT: tl.constexpr = low is not None and x.dtype.element_ty == tl.float32
    for i in range(0, tiles):
        k = tiles - 1 - i
        t0 = k * S * L
        live = t0 + t < T
        inside = live[:, :, None] & (c < E)[None, None, :]
        base, at = (row * T + t0) * E, t[:, :, None] * E + c[None, None, :]
        dt_, x_, dy_ = _load(dt + base, at, inside), _load(x + base, at, inside), _load(dy + base, at, inside)
        gB, gA = tl.zeros([S, L, W], tl.float32), tl.zeros([S, L, W], tl.float32)
        at_n = (row * T + t0) * N + t * N
        for n in range(N):
            A_ = _load(A, c * N + n, c < E)
            B_, C_ = _load(B, at_n + n, live)[:, :, None], _load(C, at_n + n, live)[:, :, None]
            raised = _exp(dt_ * A_[None, None, :], EXACT)
            a = raised
            if low is not None:
                low_ = _load(low, c * N + n, c < E)[None, None, :]
                a += low_ * (1 - raised)  # exactly 1 where dt is 0, as past the end
            if reset is not None:
                a = tl.where(flags(reset, row * T + t0 + t, live)[:, :, None], 0.0, a)
            h = tl.zeros([W], tl.float32)
            if k > 0:
                h = tl.load(slots + ((k - 1) * N + n) * E, mask=c < E, other=0.0)
            elif start is not None:
                h = _load(start, (row * E + c) * N + n, c < E)
            before, _ = sweep_before(a, dt_ * x_ * B_, h, False)
            kept = a * before
            f = tl.zeros([W], tl.float32)
            if i > 0:
                f = tl.load(flow + mine + n * E, mask=c < E, other=0.0)
            elif dfinal is not None:
                f = _load(dfinal, (row * E + c) * N + n, c < E)
            g = C_ * dy_
            later, f = sweep_before(a, a * g, f, True)
            g += later
            tl.store(flow + mine + n * E, f, mask=c < E)
            gB += g * B_
            moved = g * kept  # by a change of dt A_n
            if low is not None:
                moved = g * before
                if reset is not None:
                    moved = tl.where(flags(reset, row * T + t0 + t, live)[:, :, None], 0.0, moved)
                sum_low = tl.sum(tl.sum(moved * (1 - raised), 1), 0)
                if i > 0:
                    sum_low += tl.load(dlow + mine + n * E, mask=c < E, other=0.0)
                tl.store(dlow + mine + n * E, sum_low, mask=c < E)
                moved *= (1 - low_) * raised
            gA += moved * A_[None, None, :]
            tl.store(dB + part + at_n + n, tl.sum(g * dt_ * x_, 2), mask=live)
            tl.store(dC + part + at_n + n, tl.sum(dy_ * (kept + dt_ * x_ * B_), 2), mask=live)
            sum_A = tl.sum(tl.sum(moved * dt_, 1), 0)
            if i > 0:
                sum_A += tl.load(dA + mine + n * E, mask=c < E, other=0.0)
            tl.store(dA + mine + n * E, sum_A, mask=c < E)
        tl.store(dx + base + at, (dt_ * gB).to(dx.dtype.element_ty), mask=inside)
        tl.store(ddt + base + at, (gA + x_ * gB).to(ddt.dtype.element_ty), mask=inside)
        tl.debug_barrier()


def _tile(x: Tensor) -> tuple[tuple[int, int], int, dict]:
    """Grid, number of tiles, tile: sixteen numbers a thread."""
    B, T, E = x.shape
    vector, whole = 16 // x.element_size(), power_of_2(T)
    W = min(32, max(2, power_of_2(E)))
    S = min(128 * vector // W, whole)
    L = min(16 // vector, whole // S)
    warps = max(1, min(4, S * W // (32 * vector)))
    return (cdiv(E, W), B), cdiv(T, S * L), {"S": S, "L": L, "W": W, "num_warps": warps}


def _run(x, dt, A, B, C, low, state, reset, save):
    y, final, states = _fake(x, dt, A, B, C, low, state, reset, save)
    grid, _, tile = _tile(x)
    # without gradients two slots are enough: one to read, one to write
    room = states if save else x.new_empty(x.shape[0], 2, A.shape[1], A.shape[0], dtype=torch.float32)
    inputs = tuple(flat(v) for v in (x, dt, A, B, C, low, state, reset))
    _forward[grid](*inputs, y, final, room, *x.shape[1:], A.shape[1], room.shape[1], **tile)
    return y, final, states


def _run_backward(x, dt, A, B, C, low, state, reset, y, final, states, dy, dfinal):
    (batch, T, E), N = x.shape, A.shape[1]
    dy = torch.zeros_like(y) if dy is None else dy
    grid, tiles, tile = _tile(x)
    dx, ddt = (torch.empty_like(v, memory_format=torch.contiguous_format) for v in (x, dt))
    dA, flow = (x.new_empty(batch, N, E, dtype=torch.float32) for _ in range(2))
    dlow = None if low is None else torch.empty_like(dA)
    dB, dC = (x.new_empty(grid[0], batch, T, N, dtype=torch.float32) for _ in range(2))
    inputs = tuple(flat(v) for v in (x, dt, A, B, C, low, state, reset, states, dy, dfinal))
    _backward[grid](*inputs, dx, ddt, dA, dB, dC, dlow, flow, T, E, N, tiles, **tile)
    dstate = None if state is None else flow.mT.contiguous()
    return (
        dx,
        ddt,
        dA.sum(0).mT.to(A.dtype).contiguous(),
        dB.sum(0).to(B.dtype),
        dC.sum(0).to(C.dtype),
        None if dlow is None else dlow.sum(0).mT.to(low.dtype).contiguous(),
        dstate,
        None,
    )


def _fake(x, dt, A, B, C, low, state, reset, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    tiles = _tile(x)[1] if save else 0
    states = x.new_empty(x.shape[0], tiles, A.shape[1], A.shape[0], dtype=torch.float32)
    return y, x.new_empty(x.shape[0], *A.shape, dtype=torch.float32), states


_selective = define(
    "selective_gpu",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? low, Tensor? state, Tensor? reset",
    2, 1, DEVICE, _run, _run_backward, _fake,
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
