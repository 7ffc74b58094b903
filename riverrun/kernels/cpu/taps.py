"""Four taps of a convolution on a stretch of steps, one vector of channels after the other, in registers.

    forward    y_t = c + w_0 x_{t-3} + w_1 x_{t-2} + w_2 x_{t-1} + w_3 x_t
    backward   dx_t = Σ_j w_{3-j} dy_{t+j}    dw_{3-j} += Σ_t x_t dy_{t+j}    dc += Σ_t dy_t

Rows are steps: x of the forward begins three steps before y, dy of the backward ends three steps after x.
Each number is loaded once. Channels are a multiple of `LANES` of their dtype.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .gemm import FLAGS, call, carried, while_fits, word

WIDTH = 4


def _join(builder, total, x, y):
    return builder.fadd(total, builder.fmul(x, y, flags=FLAGS), flags=FLAGS)


def _forward(builder, y, x, w, c, steps, channels):
    place = cgutils.alloca_once_value(builder, word(0))
    with while_fits(builder, place, channels, y.lanes) as at:
        taps = [w.load(word(j), at, y.lanes) for j in range(WIDTH)]
        bias = c.load(word(0), at, y.lanes)
        first = [x.load(word(j), at, y.lanes) for j in range(WIDTH - 1)]
        with carried(builder, first, steps) as (t, window, new, _):
            seen = [*window, x.load(builder.add(t, word(WIDTH - 1)), at, y.lanes)]
            total = bias
            for tap, then in zip(taps, seen, strict=True):
                total = _join(builder, total, tap, then)
            y.store(total, t, at, y.lanes)
            new += seen[1:]


def _backward(builder, dx, dw, dc, x, dy, w, steps, channels):
    place, lanes = cgutils.alloca_once_value(builder, word(0)), x.lanes
    with while_fits(builder, place, channels, lanes) as at:
        taps = [w.load(word(j), at, lanes) for j in reversed(range(WIDTH))]
        first = [dy.load(word(j), at, lanes) for j in range(WIDTH - 1)]
        first += [dw.load(word(j), at, lanes) for j in reversed(range(WIDTH))]
        first.append(dc.load(word(0), at, lanes))
        with carried(builder, first, steps) as (t, before, new, ends):
            later = [*before[: WIDTH - 1], dy.load(builder.add(t, word(WIDTH - 1)), at, lanes)]
            now, sums = x.load(t, at, lanes), before[WIDTH - 1 :]
            total = ir.Constant(now.type, None)
            for tap, g in zip(taps, later, strict=True):
                total = _join(builder, total, tap, g)
            dx.store(total, t, at, lanes)
            new += later[1:]
            new += [_join(builder, s, now, g) for s, g in zip(sums, later, strict=False)]
            new.append(builder.fadd(sums[-1], later[0], flags=FLAGS))
        for j, end in zip(reversed(range(WIDTH)), ends[WIDTH - 1 :], strict=False):
            dw.store(end, word(j), at, lanes)
        dc.store(ends[-1], word(0), at, lanes)


@intrinsic
def forward(typing, y, x, w, c, steps, channels):
    """y (steps, channels) from x (steps + 3, channels), w (4, channels) and c (1, channels)."""

    def make(context, builder, signature, args):
        return call("taps_forward", context, builder, signature, args, _forward)

    return types.void(y, x, w, c, steps, channels), make


@intrinsic
def backward(typing, dx, dw, dc, x, dy, w, steps, channels):
    """dx (steps, channels), and what dw (4, channels) and dc (1, channels) gain, from dy (steps + 3, ...)."""

    def make(context, builder, signature, args):
        return call("taps_backward", context, builder, signature, args, _backward)

    return types.void(dx, dw, dc, x, dy, w, steps, channels), make
