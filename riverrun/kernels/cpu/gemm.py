"""Products and transposes of blocks that lie in the cache, in vector registers from end to end.

    product(out, A, B, ...)       out (m, n) = [out, scaled by row, +] A (m, depth) B (depth, n)
    transposed(out, x, width)     out (width, 16) = x (16, width)ᵀ

A may be read transposed. m is a multiple of 4, n and width of 16. Left to itself the compiler keeps sums in
memory and uses half of a 512-bit vector; here a tile of sums, rows × vectors, stays in registers through all
of depth. Every sum runs over depth in order, so its bits depend neither on the tile nor on who has which
columns.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SET, ADD, SCALE = 0, 1, 2  # what becomes of `out`: replaced, added to, scaled by row and added to
SIDE = 16  # steps in a block, and the side of the squares in which matrices are transposed

_WIDE = llvm.get_host_cpu_features().get("avx512f", False) if llvm.get_process_triple() else False
BYTES = 64 if _WIDE else 32
# (rows, vectors) of the tiles, the wide ones for as long as they fit
TILES = [(4, 4), (8, 1), (4, 1)] if _WIDE else [(4, 2), (8, 1), (4, 1)]
FLAGS = ("contract", "nsz")
WORD = ir.IntType(64)


def _word(i: int) -> ir.Constant:
    return ir.Constant(WORD, i)


class _Matrix:
    """A C-ordered 2-D array while code is being made: its pointer, row stride and vector type."""

    def __init__(self, context: Any, builder: Any, kind: Any, value: Any):
        array = context.make_array(kind)(context, builder, value)
        self.builder, self.data = builder, array.data
        self.stride = cgutils.unpack_tuple(builder, array.shape)[-1]
        self.number = context.get_value_type(kind.dtype)
        self.size = context.get_abi_sizeof(self.number)
        self.lanes = BYTES // self.size

    def at(self, row: Any, column: Any, lanes: int = 0) -> Any:
        """A pointer to an element, or to `lanes` of them."""
        offset = self.builder.add(self.builder.mul(row, self.stride), column)
        pointer = self.builder.gep(self.data, [offset])
        return (
            self.builder.bitcast(pointer, ir.VectorType(self.number, lanes).as_pointer())
            if lanes
            else pointer
        )

    def load(self, row: Any, column: Any, lanes: int) -> Any:
        return self.builder.load(self.at(row, column, lanes), align=self.size)

    def store(self, value: Any, row: Any, column: Any, lanes: int) -> None:
        self.builder.store(value, self.at(row, column, lanes), align=self.size)


def _splat(builder: Any, x: Any, lanes: int) -> Any:
    vector = ir.VectorType(x.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@contextmanager
def _while_fits(builder: Any, place: Any, limit: Any, step: int):
    """Repeat the body while place + step ≤ limit, moving place on by step."""
    head, body, done = (builder.append_basic_block(n) for n in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    here = builder.load(place)
    builder.cbranch(builder.icmp_signed("<=", builder.add(here, _word(step)), limit), body, done)
    builder.position_at_end(body)
    yield here
    builder.store(builder.add(here, _word(step)), place)
    builder.branch(head)
    builder.position_at_end(done)


def _tile(
    builder: Any, out: _Matrix, a: Any, B: _Matrix, scale: Any, at: tuple, depth: Any, shape: tuple, mode
):
    """One tile of `out` at (i, j). a(row, d) gives a pointer to A's element."""
    (i, j), (rows, vectors) = at, shape
    lanes, vector = out.lanes, ir.VectorType(out.number, out.lanes)
    row = [builder.add(i, _word(r)) for r in range(rows)]
    column = [builder.add(j, _word(c * lanes)) for c in range(vectors)]
    zero = ir.Constant(vector, None)
    start: list[Any] = []
    for r in row:
        for c in column:
            if mode == SET:
                start.append(zero)
            elif mode == ADD:
                start.append(out.load(r, c, lanes))
            else:
                factor = _splat(builder, builder.load(builder.gep(scale, [r])), lanes)
                start.append(builder.fmul(out.load(r, c, lanes), factor))
    before, loop, done = (
        builder.block,
        builder.append_basic_block("depth"),
        builder.append_basic_block("deep"),
    )
    builder.branch(loop)
    builder.position_at_end(loop)
    d = builder.phi(WORD)
    sums = [builder.phi(vector) for _ in start]
    right = [B.load(d, c, lanes) for c in column]
    left = [_splat(builder, builder.load(a(r, d)), lanes) for r in row]
    new = [
        builder.fadd(s, builder.fmul(left[n // vectors], right[n % vectors], flags=FLAGS), flags=FLAGS)
        for n, s in enumerate(sums)
    ]
    after = builder.add(d, _word(1))
    d.add_incoming(_word(0), before)
    d.add_incoming(after, loop)
    for s, first, following in zip(sums, start, new, strict=True):
        s.add_incoming(first, before)
        s.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", after, depth), loop, done)
    builder.position_at_end(done)
    for n, value in enumerate(new):
        out.store(value, row[n // vectors], column[n % vectors], lanes)


def _product(turned: bool, mode: int) -> Any:
    """The intrinsic for one way of reading A and one of writing `out`."""

    @intrinsic
    def multiply(typing, out, A, B, scale, m, n, depth):
        def make(context, builder, signature, args):
            C, left, right = (
                _Matrix(context, builder, k, v) for k, v in zip(signature.args[:3], args[:3], strict=True)
            )
            factors = context.make_array(signature.args[3])(context, builder, args[3]).data
            m, n, depth = args[4:]

            def a(row, d):
                return left.at(d, row) if turned else left.at(row, d)

            j = cgutils.alloca_once_value(builder, _word(0))
            i = cgutils.alloca_once_value(builder, _word(0))
            for vectors in sorted({v for _, v in TILES}, reverse=True):
                with _while_fits(builder, j, n, vectors * C.lanes) as column:
                    builder.store(_word(0), i)
                    for shape in (t for t in TILES if t[1] == vectors):
                        with _while_fits(builder, i, m, shape[0]) as row:
                            _tile(builder, C, a, right, factors, (row, column), depth, shape, mode)
            return context.get_dummy_value()

        return types.void(out, A, B, scale, m, n, depth), make

    return multiply


_set, _add, _scale = (_product(False, mode) for mode in (SET, ADD, SCALE))
_set_turned, _add_turned, _scale_turned = (_product(True, mode) for mode in (SET, ADD, SCALE))


@intrinsic
def apart(typing):
    """Keep the function in which this stands out of its callers: less to compile again."""

    def make(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), make


small = numba.njit(
    cache=True, error_model="numpy", fastmath=set(FLAGS), no_cpython_wrapper=True, no_cfunc_wrapper=True
)


@small
def put(out, A, B, m, n, depth):
    """out = A B"""
    apart()
    _set(out, A, B, out[0], m, n, depth)


@small
def add(out, A, B, m, n, depth):
    """out += A B"""
    apart()
    _add(out, A, B, out[0], m, n, depth)


@small
def add_turned(out, A, B, m, n, depth):
    """out += Aᵀ B"""
    apart()
    _add_turned(out, A, B, out[0], m, n, depth)


@small
def put_turned(out, A, B, m, n, depth):
    """out = Aᵀ B"""
    apart()
    _set_turned(out, A, B, out[0], m, n, depth)


@small
def scale_add_turned(out, scale, A, B, m, n, depth):
    """out = diag(scale) out + Aᵀ B"""
    apart()
    _scale_turned(out, A, B, scale, m, n, depth)


def _interleave(side: int, half: int, low: bool) -> list[int]:
    """Which of two rows' elements stand where after one stage of a transpose by halves."""
    return [
        (i if not i & half else i - half + side) if low else (i + half if not i & half else i + side)
        for i in range(side)
    ]


@intrinsic
def _turn(typing, out, x, i, j):
    """The square of x at (i, j) into out at (j, i)."""

    def make(context, builder, signature, args):
        to, source = (
            _Matrix(context, builder, k, v) for k, v in zip(signature.args[:2], args[:2], strict=True)
        )
        i, j = args[2:]
        rows = [source.load(builder.add(i, _word(r)), j, SIDE) for r in range(SIDE)]
        half = SIDE // 2
        while half:
            low, high = (
                ir.Constant(ir.VectorType(ir.IntType(32), SIDE), _interleave(SIDE, half, side))
                for side in (True, False)
            )
            for r in range(SIDE):
                if not r & half:
                    a, b = rows[r], rows[r + half]
                    rows[r], rows[r + half] = (
                        builder.shuffle_vector(a, b, low),
                        builder.shuffle_vector(a, b, high),
                    )
            half //= 2
        for r, row in enumerate(rows):
            to.store(row, builder.add(j, _word(r)), i, SIDE)
        return context.get_dummy_value()

    return types.void(out, x, i, j), make


@small
def transpose(out, x, width):
    """out (width, SIDE) = x (SIDE, width)ᵀ"""
    for j in range(0, width, SIDE):
        _turn(out, x, 0, j)


@small
def transpose_back(out, x, width):
    """out (SIDE, width) = x (width, SIDE)ᵀ"""
    for i in range(0, width, SIDE):
        _turn(out, x, i, 0)


@intrinsic
def _read_decaying(typing, out_q, out_r, keys, decay, q, r, i, wide, late_q, late_r):
    """Row i of both outs, one pass over the keys (wide, SIDE), whose columns before i decay on the way."""

    def make(context, builder, signature, args):
        to_q, to_r, key, d, left_q, left_r = (
            _Matrix(context, builder, t, x) for t, x in zip(signature.args[:6], args[:6], strict=True)
        )
        i, wide, late_q, late_r = args[6:]
        vector = ir.VectorType(key.number, SIDE)
        places = ir.Constant(ir.VectorType(WORD, SIDE), list(range(SIDE)))
        past = builder.icmp_signed("<", places, _splat(builder, i, SIDE))
        ones = ir.Constant(vector, [1.0] * SIDE)
        before, loop, done = (
            builder.block,
            builder.append_basic_block("keys"),
            builder.append_basic_block("read"),
        )
        builder.branch(loop)
        builder.position_at_end(loop)
        k, sum_q, sum_r = builder.phi(WORD), builder.phi(vector), builder.phi(vector)
        old = key.load(k, _word(0), SIDE)
        factor = builder.select(past, _splat(builder, builder.load(d.at(i, k)), SIDE), ones)
        new = builder.fmul(old, factor)
        key.store(new, k, _word(0), SIDE)
        sums = []
        for total, x, late in ((sum_q, left_q, late_q), (sum_r, left_r, late_r)):
            weight = _splat(builder, builder.load(x.at(i, k)), SIDE)
            product = builder.fmul(weight, builder.select(late, old, new), flags=FLAGS)
            sums.append(builder.fadd(total, product, flags=FLAGS))
        after = builder.add(k, _word(1))
        k.add_incoming(_word(0), before)
        k.add_incoming(after, loop)
        for phi, value in zip((sum_q, sum_r), sums, strict=True):
            phi.add_incoming(ir.Constant(vector, None), before)
            phi.add_incoming(value, loop)
        builder.cbranch(builder.icmp_signed("<", after, wide), loop, done)
        builder.position_at_end(done)
        to_q.store(sums[0], i, _word(0), SIDE)
        to_r.store(sums[1], i, _word(0), SIDE)
        return context.get_dummy_value()

    return types.void(out_q, out_r, keys, decay, q, r, i, wide, late_q, late_r), make


@small
def read_decaying(out_q, out_r, keys, decay, q, r, n, wide, late_q, late_r):
    """out[i, j] = Σ_k x_ik keys_kj Π_{j < s ≤ i} decay_sk for x = q and r; up to i - 1 only where x is late.

    keys (wide, SIDE) are decayed in place. Columns j > i, and j = i where x is late, hold no meaning.
    """
    apart()
    for i in range(n):
        _read_decaying(out_q, out_r, keys, decay, q, r, i, wide, late_q, late_r)
