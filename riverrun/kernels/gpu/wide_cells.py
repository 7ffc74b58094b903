"""Elman, LSTM, GRU and sLSTM on a GPU where many programs share one head.

A head's hidden units are dealt out to programs that run together: each keeps its units' rows of R on chip for
all of time, and its units' states in registers. What a step needs of the other units, all of h forwards and
all of dp backwards, goes through memory (the L2 cache), in two buffers by turns; a counter a group, the
programs of one head and one block of sequences, says that all have written. Two buffers are enough: who
writes step t has seen that all wrote step t - 1, so all have read step t - 2.

In a program every warp multiplies its own part of the inner axis, and the parts are added. Backward needs
R h + c again: h is known then, so that is one matrix product over all steps, outside, as are the gradients of
R and c. It is rounded to the dtype of h, as what is shared is; all else is as in `cells`.

A barrier hangs if one of its programs never starts, so they are launched as a cooperative grid, of which all
run or none. Should one wait for longer than PATIENCE polls, the results are NaN.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gates import advance, get, get_gates, optional, put_gates, retreat
from .launch import DEVICE, cdiv, power_of_2

WIDEST = 1024
PATIENCE = tl.constexpr(1 << 28)  # polls of a program in all its steps, some minutes of waiting
LINE = tl.constexpr(32)  # from one group's counter to the next, a cache line
ON_CHIP = 96 * 1024  # bytes of R of a program; float32 holds them twice, as the two halves of its products


@triton.jit
def _wait(counter, target, patience):
    """Until `target` programs have arrived; returns what is left of the patience."""
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while (seen < target) & (patience > 0):
        seen = tl.atomic_add(counter, 0, sem="acquire")
        patience -= 1
    return patience


@triton.jit
def _arrive(counter):
    tl.debug_barrier()  # all threads of the program have written
    tl.atomic_add(counter, 1, sem="release")


@triton.jit
def _inner(j, TILE: tl.constexpr, FOLDS: tl.constexpr):
    """Tile j of the inner axis, a part a warp: (warps, TILE / warps)."""
    part: tl.constexpr = TILE >> FOLDS
    return j * TILE + tl.arange(0, 1 << FOLDS)[:, None] * part + tl.arange(0, part)[None, :]


@triton.jit
def _weights(
    R, gate, unit, head, P, H: tl.constexpr, GATES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    DOT: tl.constexpr, FOLDS: tl.constexpr,
):  # fmt: skip
    """Rows (gate, unit) of R, (gates, H, P, P), in TILES along the inner axis, (*inner, rows)."""
    r = ()
    for j in tl.static_range(TILES):
        k = _inner(j, TILE, FOLDS)
        at = ((gate * H + head) * P + unit)[None, None, :] * P + k[:, :, None]
        inside = ((gate < GATES) & (unit < P))[None, None, :] & (k < P)[:, :, None]
        r = r + (tl.load(R + at, mask=inside, other=0.0).to(DOT),)  # noqa: RUF005 (Triton knows no *r)
    return r


@triton.jit
def _product(
    shared, row, stride, live, P, r, TILES: tl.constexpr, TILE: tl.constexpr, TURNS: tl.constexpr,
    AHEAD: tl.constexpr, FOLDS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Σ over tiles of what is shared, where a sequence is live, times r; AHEAD loads before the first one.

    TILES of one gate, then those of the next, `stride` on, for TURNS gates. The warps' parts are brought into
    one thread and added there: with `tl.sum` across warps a step takes twice as long.
    """
    COUNT: tl.constexpr = TILES * TURNS
    zero = tl.zeros([1 << FOLDS, row.shape[0], r[0].shape[2]], tl.float32)
    a, sums = (), (zero, zero)  # two sums by turns, so that a product need not wait for the last
    for j in tl.static_range(COUNT + AHEAD):
        if j < COUNT:
            k = _inner(j % TILES, TILE, FOLDS)
            at = shared + row[None, :, None] + j // TILES * stride + k[:, None, :]
            known = live[None, :, None] & (k < P)[:, None, :]
            new = tl.load(at, mask=known, other=0.0, cache_modifier=".cg")  # not from L1, which may be old
            a = a + (new,)  # noqa: RUF005 (Triton knows no *a)
        if j >= AHEAD:
            new = tl.dot(a[j - AHEAD], r[j - AHEAD], sums[0], input_precision=PREC)
            sums = (sums[1], new)
    parts = tl.permute(sums[0] + sums[1], (1, 2, 0))
    for j in tl.static_range(FOLDS):
        pairs = tl.reshape(parts, [parts.shape[0], parts.shape[1], 1 << (FOLDS - 1 - j), 2])
        one, other = tl.split(pairs)
        parts = one + other
    return tl.reshape(parts, [parts.shape[0], parts.shape[1]])


@triton.jit
def _by_gate(p, ROWS: tl.constexpr, UNITS: tl.constexpr, GATES: tl.constexpr):
    """(ROWS, UNITS) for each of four gates, of columns (unit, gate)."""
    p0, p1, p2, p3 = p, p, p, p
    if GATES > 1:
        even, odd = tl.split(tl.reshape(p, [ROWS, UNITS, 2, 2]))
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
    return p0, p1, p2, p3


@triton.jit(do_not_specialize=["first"])
def _forward(
    x, R, c, h0, s0, n0, m0, reset, shared, counters, y, h1, s1, n1, m1, ss, ns, ms, B, T, P, first, half,
    H: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    KIND: tl.constexpr, GATES: tl.constexpr, SAVE: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr,
    HOLD: tl.constexpr, FOLDS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Grid (parts of a head, groups from the `first` on). `shared` (2, half) holds h of the last two steps,
    rows (sequences, H, TILES · TILE); the second half begins as the state."""
    programs, group = tl.num_programs(0), first + tl.program_id(1)
    head, counter = group % H, counters + group * LINE
    b = group // H * ROWS + tl.arange(0, ROWS)
    u = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = (b < B)[:, None] & (u < P)[None, :]
    WIDE: tl.constexpr = 4 if GATES > 1 else 1
    column = tl.arange(0, UNITS * WIDE)
    gate, unit = column % WIDE, tl.program_id(0) * UNITS + column // WIDE
    held = ()
    if HOLD:
        held = _weights(R, gate, unit, head, P, H, GATES, TILES, TILE, DOT, FOLDS)
    bias = tl.zeros([UNITS * WIDE], tl.float32)
    if c is not None:
        bias = get(c, (gate * H + head) * P + unit, (gate < GATES) & (unit < P))
    row = b.to(tl.int64)[:, None] * T
    once = b[:, None] * (H * P) + head * P + u[None, :]
    at_y = row * (H * P) + head * P + u[None, :]
    at_x = row * (GATES * H * P) + head * P + u[None, :]
    rows = (b * H + head) * (TILES * TILE)
    h, s, n = optional(h0, once, inside), optional(s0, once, inside), optional(n0, once, inside)
    m = tl.full([ROWS, UNITS], float("-inf"), tl.float32)
    if m0 is not None:
        m = get(m0, once, inside)
    patience = PATIENCE
    for t in range(T):
        x0, x1, x2, x3 = get_gates(x, at_x, H * P, inside, GATES)
        live = b < B
        if reset is not None:
            live = tl.load(reset + b.to(tl.int64) * T + t, mask=b < B, other=0) == 0
            kept = live[:, None]
            h, s, n = tl.where(kept, h, 0.0), tl.where(kept, s, 0.0), tl.where(kept, n, 0.0)
            m = tl.where(kept, m, float("-inf"))
        r = held
        if not HOLD:
            r = _weights(R, gate, unit, head, P, H, GATES, TILES, TILE, DOT, FOLDS)
        if SAVE and (KIND == "lstm" or KIND == "slstm"):
            tl.store(ss + at_y, s, mask=inside)
        if SAVE and KIND == "slstm":
            tl.store(ns + at_y, n, mask=inside)
            tl.store(ms + at_y, m, mask=inside)
        patience = _wait(counter, t * programs, patience)
        slot = shared + (t + 1) % 2 * half
        p = _product(slot, rows, 0, live, P, r, TILES, TILE, 1, AHEAD, FOLDS, PREC) + bias[None, :]
        p0, p1, p2, p3 = _by_gate(p, ROWS, UNITS, GATES)
        h, s, n, m = advance(x0, x1, x2, x3, p0, p1, p2, p3, h, s, n, m, inside, KIND)
        h = tl.where(patience > 0, h, float("nan"))
        tl.store(shared + t % 2 * half + rows[:, None] + u[None, :], h.to(DOT), mask=inside)
        _arrive(counter)
        tl.store(y + at_y, h.to(y.dtype.element_ty), mask=inside)
        at_y += H * P
        at_x += GATES * H * P
    tl.store(h1 + once, h, mask=inside)
    if KIND == "lstm" or KIND == "slstm":
        tl.store(s1 + once, s, mask=inside)
    if KIND == "slstm":
        tl.store(n1 + once, n, mask=inside)
        tl.store(m1 + once, m, mask=inside)


@triton.jit
def _turned(
    R, unit, head, P, H: tl.constexpr, GATES: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
    DOT: tl.constexpr, FOLDS: tl.constexpr,
):  # fmt: skip
    """For every gate what `unit` gives to all units, from R with its last two axes exchanged."""
    r = ()
    for gate in tl.static_range(GATES):
        r = r + _weights(R, unit * 0 + gate, unit, head, P, H, GATES, TILES, TILE, DOT, FOLDS)
    return r


@triton.jit(do_not_specialize=["first"])
def _backward(
    x, R, c, ps, hs, ss, ns, ms, reset, dy, dh1, ds1, dn1, dm1, shared, counters, dx, dq, dh0, ds0, dn0, dm0,
    B, T, P, first, half,
    H: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr, UNITS: tl.constexpr,
    KIND: tl.constexpr, GATES: tl.constexpr, DOT: tl.constexpr, PREC: tl.constexpr, HOLD: tl.constexpr,
    FOLDS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """R has its last two axes exchanged; ps is R h of every step, in whose place dx may stand; hs, ss, ns,
    ms are the states that enter each step, after its reset; dq is what the GRU's candidate reads from R.
    `shared` (2, half), zeros, holds dp of the last two steps, rows (sequences, gates, H, TILES · TILE)."""
    programs, group = tl.num_programs(0), first + tl.program_id(1)
    head, counter = group % H, counters + group * LINE
    b = group // H * ROWS + tl.arange(0, ROWS)
    u = tl.program_id(0) * UNITS + tl.arange(0, UNITS)
    inside = (b < B)[:, None] & (u < P)[None, :]
    held = ()
    if HOLD:
        held = _turned(R, u, head, P, H, GATES, TILES, TILE, DOT, FOLDS)
    c0 = tl.zeros([UNITS], tl.float32)
    c1, c2, c3 = c0, c0, c0
    if c is not None:
        c0, c1, c2, c3 = get_gates(c, head * P + u, H * P, u < P, GATES)
    row = b.to(tl.int64)[:, None] * T + T - 1
    once = b[:, None] * (H * P) + head * P + u[None, :]
    at_y = row * (H * P) + head * P + u[None, :]
    at_x = row * (GATES * H * P) + head * P + u[None, :]
    rows = (b * (GATES * H) + head) * (TILES * TILE)
    direct, ds = optional(dh1, once, inside), optional(ds1, once, inside)
    dn, dm = optional(dn1, once, inside), optional(dm1, once, inside)
    patience = PATIENCE
    for i in range(T):
        x0, x1, x2, x3 = get_gates(x, at_x, H * P, inside, GATES)
        p0, p1, p2, p3 = get_gates(ps, at_x, H * P, inside, GATES)
        dh = get(dy, at_y, inside)
        h, s, n, m = dh, dh, dh, dh
        if KIND == "gru":
            h = get(hs, at_y, inside)
        if KIND == "lstm" or KIND == "slstm":
            s = get(ss, at_y, inside)
        if KIND == "slstm":
            n, m = get(ns, at_y, inside), get(ms, at_y, inside)
        kept = inside
        if reset is not None:
            after = (b < B) & (i > 0)
            kept = tl.load(reset + b.to(tl.int64) * T + T - i, mask=after, other=0)[:, None] == 0
        r = held
        if not HOLD:
            r = _turned(R, u, head, P, H, GATES, TILES, TILE, DOT, FOLDS)
        patience = _wait(counter, i * programs, patience)
        slot = shared + (i + 1) % 2 * half
        direct += _product(slot, rows, H * TILES * TILE, b < B, P, r, TILES, TILE, GATES, AHEAD, FOLDS, PREC)
        dh += tl.where(kept, direct, 0.0)
        ds, dn, dm = tl.where(kept, ds, 0.0), tl.where(kept, dn, 0.0), tl.where(kept, dm, 0.0)
        p0, p1, p2, p3 = p0 + c0[None, :], p1 + c1[None, :], p2 + c2[None, :], p3 + c3[None, :]
        d0, d1, d2, d3, to_r, direct, ds, dn, dm = retreat(
            x0, x1, x2, x3, p0, p1, p2, p3, h, s, n, m, dh, ds, dn, dm, inside, KIND
        )
        d0 = tl.where(patience > 0, d0, float("nan"))
        slot = shared + i % 2 * half
        put_gates(slot, rows[:, None] + u[None, :], H * (TILES * TILE), inside, d0, d1, to_r, d3, GATES)
        _arrive(counter)
        put_gates(dx, at_x, H * P, inside, d0, d1, d2, d3, GATES)
        if KIND == "gru":
            tl.store(dq + at_y, to_r.to(dq.dtype.element_ty), mask=inside)
        at_x -= GATES * H * P
        at_y -= H * P
    if dh0 is not None:
        _wait(counter, T * programs, patience)
        r = held
        if not HOLD:
            r = _turned(R, u, head, P, H, GATES, TILES, TILE, DOT, FOLDS)
        slot = shared + (T + 1) % 2 * half
        direct += _product(slot, rows, H * TILES * TILE, b < B, P, r, TILES, TILE, GATES, AHEAD, FOLDS, PREC)
        kept = inside
        if reset is not None:
            kept = tl.load(reset + b.to(tl.int64) * T, mask=b < B, other=0)[:, None] == 0
        tl.store(dh0 + once, tl.where(kept, direct, 0.0), mask=inside)
        if ds0 is not None:
            tl.store(ds0 + once, tl.where(kept, ds, 0.0), mask=inside)
        if dn0 is not None:
            tl.store(dn0 + once, tl.where(kept, dn, 0.0), mask=inside)
            tl.store(dm0 + once, tl.where(kept, dm, 0.0), mask=inside)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _plan(kind: str, x: Tensor, R: Tensor, gates: int, turns: int):
    """Parts of a head, groups a launch, groups, and the constants of a kernel with `turns` gates to read.

    A step waits for memory and for the other programs more than for products: as many programs as the chip
    has multiprocessors, eight units each and more only where all groups would not run at once.
    """
    B, _, _, H, P = x.shape
    half = x.dtype == R.dtype and x.dtype.itemsize == 2
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[x.dtype] if half else tl.float32
    folds, rows, units, room = 3, 16, 8, 1
    tile = max(16 << folds, min(256, power_of_2(P)))
    tiles = cdiv(P, tile)
    row = tiles * tile * dot.primitive_bitwidth // 8  # bytes of a unit's row of a gate's R, or of one h
    columns = 4 if turns == 1 < gates else turns  # rows of R a unit; forwards three are padded to four
    if DEVICE == "cuda":
        room = _processors(x.device)

        def launches() -> int:
            return cdiv(cdiv(B, rows) * H, max(1, room // cdiv(P, units)))

        fits = ON_CHIP // (columns * row)
        while cdiv(P, units) > room or (launches() > 1 and 2 * units <= min(fits, P)):
            units *= 2
        while launches() > 1 and rows < B and 2 * rows * row <= ON_CHIP // 2:
            rows *= 2
    else:
        units = tiles * tile  # the interpreter runs one program after another, so none can wait for the next
    parts, groups = cdiv(P, units), cdiv(B, rows) * H
    registers = rows * tile * dot.primitive_bitwidth // 1024 >> folds  # of a thread, for one tile of h
    constants = {
        "H": H, "TILES": tiles, "TILE": tile, "ROWS": rows, "UNITS": units, "KIND": kind, "GATES": gates,
        "DOT": dot, "PREC": "tf32x3", "HOLD": units * columns * row <= ON_CHIP, "FOLDS": folds,
        "AHEAD": min(tiles * turns, (96 if half else 64) // registers),
    }  # fmt: skip
    return parts, min(groups, max(1, room // parts)), groups, constants


def _launch(kernel, x: Tensor, plan, before, shared: Tensor, counters: Tensor, after, extra) -> None:
    """Groups do not wait for each other: as many of them a launch as run at the same time."""
    parts, together, groups, constants = plan
    sizes = (x.shape[0], x.shape[1], x.shape[4])
    options = {"num_warps": 1 << constants["FOLDS"], "num_stages": 1}
    if DEVICE == "cuda":
        options["launch_cooperative_grid"] = True
    for first in range(0, groups, together):
        grid = (parts, min(together, groups - first))
        kernel[grid](
            *before,
            shared,
            counters,
            *after,
            *sizes,
            first,
            shared[0].numel(),
            **constants,
            **extra,
            **options,
        )


def _shared(x: Tensor, plan, gates: int) -> tuple[Tensor, Tensor]:
    """The two buffers and the counters, zeros."""
    _, _, groups, constants = plan
    rows = groups // constants["H"] * constants["ROWS"]
    dtype = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}.get(constants["DOT"], torch.float32)
    shared = x.new_zeros(2, rows, gates, constants["H"], constants["TILES"] * constants["TILE"], dtype=dtype)
    return shared, x.new_zeros(groups * LINE.value, dtype=torch.int32)


def forward(kind: str, gates: int, x, R, c, states, reset, y, last, saved, save: bool) -> None:
    """Writes y, `last` and `saved`; states, last and saved have 4, 4 and 3 places, some of them None."""
    plan = _plan(kind, x, R, gates, 1)
    shared, counters = _shared(x, plan, 1)
    if states[0] is not None:
        shared[1, : x.shape[0], 0, :, : x.shape[-1]] = states[0]
    _launch(
        _forward, x, plan, (x, R, c, *states, reset), shared, counters, (y, *last, *saved), {"SAVE": save}
    )


def backward(kind: str, gates: int, x, R, c, hs, saved, reset, dy, dlast, dq, dstates) -> Tensor:
    """Writes dq and dstates and returns dx."""
    B, T, _, H, P = x.shape
    wide = torch.promote_types(hs.dtype, R.dtype)
    ps = hs.to(wide).flatten(0, 1).transpose(0, 1) @ R.to(wide).permute(1, 3, 0, 2).reshape(H, P, gates * P)
    ps = ps.view(H, B, T, gates, P).permute(1, 2, 3, 0, 4).contiguous()
    dx = ps if ps.dtype == x.dtype else torch.empty_like(x)  # each program writes where it has read
    plan = _plan(kind, x, R, gates, gates)
    shared, counters = _shared(x, plan, gates)
    args = (x, R.mT.contiguous(), c, ps, hs, *saved, reset, dy, *dlast)
    _launch(_backward, x, plan, args, shared, counters, (dx, dq, *dstates), {})
    return dx
