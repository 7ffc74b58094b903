"""Blocks of steps on their way between tensors and scratch memory, for the kernels of matrix memories.

A tensor is (B, T, H, width), a state (B, H, K, V); a block is n ≤ 16 rows of scratch, one row a step, and a
state in scratch is (wide, broad), both padded with zeros to multiples of 16. Rows are taken out as vectors:
then the compiler sees that neighbours are neighbours, and uses vectors.
"""

from __future__ import annotations

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .gemm import LINE, apart, copy
from .gemm import SIDE as C
from .threads import FASTMATH

SEGMENT = 128  # steps from one state that the forward keeps to the next

small = numba.njit(
    cache=True,
    error_model="numpy",
    fastmath=FASTMATH,
    nogil=True,
    no_cpython_wrapper=True,
    no_cfunc_wrapper=True,
)
compiled = numba.njit(cache=True, error_model="numpy", fastmath=FASTMATH, nogil=True, no_cfunc_wrapper=True)


# not literals: a function is compiled once more for each literal it is called with
ZERO, ONE, MINUS_ONE = np.int64(0), np.int64(1), np.int64(-1)


@intrinsic
def borrowed(typing, x):
    """x, whose views nobody counts: counting is atomic, and takes longer than reading a row. See `alive`."""

    def make(context, builder, signature, args):
        array = context.make_array(x)(context, builder, args[0])
        array.meminfo = ir.Constant(array.meminfo.type, None)
        return array._getvalue()

    return x(x), make


@intrinsic
def alive(typing, x):
    """What x was borrowed from stays in memory up to here."""

    def make(context, builder, signature, args):
        return context.get_dummy_value()

    return types.void(x), make


@intrinsic(prefer_literal=True)
def prefetch(typing, row, c, write):
    """Ask for the cache line of row[c], to be read, or written where `write` (0 or 1, a constant) says so."""

    def make(context, builder, signature, args):
        array = context.make_array(signature.args[0])(context, builder, args[0])
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        ask = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        )
        place = builder.bitcast(builder.gep(array.data, [args[1]]), byte)
        builder.call(ask, [place, word(write.literal_value), word(2), word(1)])
        return context.get_dummy_value()

    return types.void(row, types.intp, write), make


@small
def soon(x, i, lo, width):
    """x[i, lo : lo + width] will be read soon."""
    row = x[i]
    for c in range(lo, lo + width, LINE // x.itemsize):
        prefetch(row, c, 0)


@small
def expected(x, i, lo, width):
    """x[i, lo : lo + width] will be written soon."""
    row = x[i]
    for c in range(lo, lo + width, LINE // x.itemsize):
        prefetch(row, c, 1)


@small
def place(task, parts, groups):
    """A task's sequence, part of the value columns and group of heads."""
    return task // (parts * groups), task // groups % parts, task % groups


@small
def shared(x, h, H):
    """The head of q or k that head h of v reads."""
    return h * x.shape[2] // H


@small
def length(t, stop, reset, i):
    """Steps of the block that starts at t: up to C, and no further than `stop` or the next reset."""
    for n in range(1, min(C, stop - t)):
        if reset.shape[1] and reset[i, t + n]:
            return n
    return min(C, stop - t)


@small
def first(x, i, j, k, c):
    """Where x[i, j, k, c] stands in memory."""
    return ((i * x.shape[1] + j) * x.shape[2] + k) * x.shape[3] + c


@small
def load(block, x, i, t, h, lo, width, n, later, head):
    """x[i, t : t + n, h, lo : lo + width] into the first columns of a block; steps from `later` on of `head`
    will be asked for next."""
    apart()
    near = LINE // x.itemsize
    copy(block, x, ZERO, block.shape[1], first(x, i, t, h, lo), x.shape[2] * x.shape[3], n, width)
    for r in range(min(n, x.shape[1] - later) if later >= 0 else 0):
        row = x[i, later + r, head]
        for c in range(0, width, near):
            prefetch(row, lo + c, 0)


@small
def ask(ahead, which, x, i, t, h, lo, width):
    """Entry `which` of what a product will ask for: x[i, t : t + C, h, lo : lo + width], or what lies there
    where x has ended: asking harms nowhere."""
    ahead[which, 0] = x.ctypes.data + first(x, i, t, h, lo) * x.itemsize
    ahead[which, 1] = x.shape[2] * x.shape[3] * x.itemsize
    ahead[which, 2] = width * x.itemsize


@small
def expect(x, i, t, h, lo, width, n):
    """The same part of x will be stored to soon."""
    apart()
    near = LINE // x.itemsize
    for r in range(n):
        row = x[i, t + r, h]
        for c in range(0, width, near):
            prefetch(row, lo + c, 1)


@small
def store(x, i, t, h, lo, width, n, block):
    """The inverse of `load`."""
    apart()
    copy(x, block, first(x, i, t, h, lo), x.shape[2] * x.shape[3], ZERO, block.shape[1], n, width)


@small
def dot(x, y, n):
    total = 0 * x[0]
    for k in range(n):
        total += x[k] * y[k]
    return total


@small
def fetch(S, x, i, h, lo, V):
    """x[i, h, :, lo : lo + V] into the corner of S."""
    apart()
    copy(S, x, ZERO, S.shape[1], first(x, i, h, ZERO, lo), x.shape[3], x.shape[2], V)


@small
def keep(x, i, h, lo, V, S):
    """The inverse of `fetch`."""
    apart()
    copy(x, S, first(x, i, h, ZERO, lo), x.shape[3], ZERO, S.shape[1], x.shape[2], V)


@small
def aligned(size, like):
    """Zeros that start where a cache line does."""
    apart()
    room = np.zeros(size + 16, like.dtype)
    start = (-room.ctypes.data % 64) // room.itemsize
    return room[start : start + size]
