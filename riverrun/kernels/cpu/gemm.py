"""Products and transposes of blocks that lie in the cache, in vector registers from end to end.

    put                out  = A B                       add_turned         out += Aᵀ B
    add                out += A B                       scale_add_turned   out  = diag(scale) old + Aᵀ B
    scale_add          out  = diag(scale) old + A B     transpose          out (width, 16) = x (16, width)ᵀ
    ..._asking         the same, and ask for 16 rows of memory in other places

out is (m, n), the sum is over `depth`; m is a multiple of 4, n and width of 16; rows may lie apart,
neighbours in a row may not. Left to itself the compiler keeps sums in memory and uses half of a 512-bit
vector; here a tile of sums, rows × vectors, stays in registers through all of depth. Every sum runs over
depth in order, so its bits depend neither on the tile nor on who has which columns.

Each of these is one LLVM function that every kernel of a module calls: what calls it compiles no copy of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SET, ADD, SCALE = 0, 1, 2  # what sums start from: zero, `out`, `old` scaled by row
LINE = 64  # bytes of a cache line
SIDE = 16  # steps in a block, and the side of the squares in which matrices are transposed

_WIDE = llvm.get_host_cpu_features().get("avx512f", False) if llvm.get_process_triple() else False
BYTES = 64 if _WIDE else 32
# (rows, vectors) of the tiles, the wide ones for as long as they fit
TILES = [(4, 4), (16, 1), (8, 1), (4, 1)] if _WIDE else [(4, 2), (8, 1), (4, 1)]
FLAGS = ("contract", "nsz")
WORD = ir.IntType(64)


def word(i: int) -> ir.Constant:
    return ir.Constant(WORD, i)


class _Matrix:
    """A matrix while code is being made: the pointer to its first number, and the numbers from row to row."""

    def __init__(self, builder: Any, data: Any, stride: Any):
        self.builder, self.data, self.stride = builder, data, stride
        self.number = data.type.pointee
        self.size = 4 if isinstance(self.number, ir.FloatType) else 8
        self.lanes = BYTES // self.size

    def at(self, row: Any, column: Any, lanes: int = 0) -> Any:
        """A pointer to an element, or to `lanes` of them."""
        offset = self.builder.add(self.builder.mul(row, self.stride), column)
        pointer = self.builder.gep(self.data, [offset])
        if not lanes:
            return pointer
        return self.builder.bitcast(pointer, ir.VectorType(self.number, lanes).as_pointer())

    def load(self, row: Any, column: Any, lanes: int) -> Any:
        return self.builder.load(self.at(row, column, lanes), align=self.size)

    def store(self, value: Any, row: Any, column: Any, lanes: int) -> None:
        self.builder.store(value, self.at(row, column, lanes), align=self.size)


def call(name: str, context: Any, builder: Any, signature: Any, args: Any, body: Callable[..., None]) -> Any:
    """Call body's code as a function of the module, made when first asked for.

    Arrays travel as two arguments, a pointer and a row's stride (1 for vectors), and reach `body` as
    matrices.
    """
    given, arrays = [], []
    for kind, value in zip(signature.args, args, strict=True):
        arrays.append(isinstance(kind, types.Array))
        if arrays[-1]:
            array = context.make_array(kind)(context, builder, value)
            size = context.get_abi_sizeof(context.get_value_type(kind.dtype))
            stride = cgutils.unpack_tuple(builder, array.strides)[0]
            given += [array.data, builder.sdiv(stride, word(size), flags=["exact"])]
        else:
            given.append(context.cast(builder, value, kind, types.intp))
    name = f"riverrun_{name}_{signature.args[0].dtype}"
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(ir.VoidType(), [x.type for x in given])
        function = ir.Function(builder.module, kind, name)
        function.linkage = "linkonce_odr"
        function.attributes.add("noinline")
        inner = ir.IRBuilder(function.append_basic_block())
        rest = iter(function.args)
        body(inner, *(_Matrix(inner, next(rest), next(rest)) if array else next(rest) for array in arrays))
        inner.ret_void()
    builder.call(function, given)
    return context.get_dummy_value()


def _splat(builder: Any, x: Any, lanes: int) -> Any:
    vector = ir.VectorType(x.type, lanes)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), x, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@contextmanager
def while_fits(builder: Any, place: Any, limit: Any, step: int):
    """Repeat the body while place + step ≤ limit, moving place on by step."""
    head, body, done = (builder.append_basic_block(n) for n in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    here = builder.load(place)
    builder.cbranch(builder.icmp_signed("<=", builder.add(here, word(step)), limit), body, done)
    builder.position_at_end(body)
    yield here
    builder.store(builder.add(here, word(step)), place)
    builder.branch(head)
    builder.position_at_end(done)


@contextmanager
def carried(builder: Any, start: list[Any], depth: Any):
    """A loop over d < depth; the body appends to `new` what the sums become. Sums of no terms stay."""
    before, loop, done = (builder.block, *(builder.append_basic_block(n) for n in ("depth", "deep")))
    builder.cbranch(builder.icmp_signed("<", word(0), depth), loop, done)
    builder.position_at_end(loop)
    d = builder.phi(WORD)
    sums, new, ends = [builder.phi(x.type) for x in start], [], []
    yield d, sums, new, ends
    after = builder.add(d, word(1))
    d.add_incoming(word(0), before)
    d.add_incoming(after, loop)
    for phi, first, following in zip(sums, start, new, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(following, loop)
    builder.cbranch(builder.icmp_signed("<", after, depth), loop, done)
    builder.position_at_end(done)
    for first, following in zip(start, new, strict=True):
        end = builder.phi(first.type)
        end.add_incoming(first, before)
        end.add_incoming(following, loop)
        ends.append(end)


def _tile(
    builder: Any,
    out: _Matrix,
    old: _Matrix,
    scale: Any,
    a: Any,
    B: _Matrix,
    at: tuple,
    depth: Any,
    shape,
    mode,
):
    """One tile of `out` at (i, j). a(row, d) gives a pointer to A's element."""
    (i, j), (rows, vectors) = at, shape
    lanes = out.lanes
    row = [builder.add(i, word(r)) for r in range(rows)]
    column = [builder.add(j, word(c * lanes)) for c in range(vectors)]
    start: list[Any] = []
    for r in row:
        for c in column:
            if mode == SET:
                start.append(ir.Constant(ir.VectorType(out.number, lanes), None))
            elif mode == ADD:
                start.append(out.load(r, c, lanes))
            else:
                factor = _splat(builder, builder.load(builder.gep(scale.data, [r])), lanes)
                start.append(builder.fmul(old.load(r, c, lanes), factor))
    with carried(builder, start, depth) as (d, sums, new, ends):
        right = [B.load(d, c, lanes) for c in column]
        left = [_splat(builder, builder.load(a(r, d)), lanes) for r in row]
        new += [
            builder.fadd(s, builder.fmul(left[n // vectors], right[n % vectors], flags=FLAGS), flags=FLAGS)
            for n, s in enumerate(sums)
        ]
    for n, value in enumerate(ends):
        out.store(value, row[n // vectors], column[n % vectors], lanes)


def _ask(builder: Any, ahead: _Matrix, count: Any, place: Any, rows: Any) -> None:
    """Ask for the next rows of what `product_asking` is told, from the one that `place` has counted up to."""
    word8, word32 = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [word8, word32, word32, word32])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", [word8], kind)
    begin = builder.load(place)
    end = builder.add(begin, rows)
    end = builder.select(builder.icmp_signed("<", end, word(SIDE)), end, word(SIDE))
    which, row, column = (cgutils.alloca_once_value(builder, word(0)) for _ in range(3))
    with while_fits(builder, which, count, 1) as i:
        address, step, width = (builder.load(ahead.at(i, word(c))) for c in range(3))
        builder.store(begin, row)
        with while_fits(builder, row, end, 1) as r:
            builder.store(word(0), column)
            with while_fits(builder, column, width, LINE) as c:
                line = builder.add(builder.add(address, builder.mul(r, step)), c)
                builder.call(prefetch, [builder.inttoptr(line, word8), word32(0), word32(2), word32(1)])
    builder.store(end, place)


def _tiles(turned: bool, mode: int) -> Callable[..., None]:
    """The body of a product, for one way of reading A and one of starting sums."""

    def body(builder, out, old, scale, A, B, m, n, depth, ahead=None, count=None):
        asked = cgutils.alloca_once_value(builder, word(0))

        def a(row, d):
            return A.at(d, row) if turned else A.at(row, d)

        j, i = (cgutils.alloca_once_value(builder, word(0)) for _ in range(2))
        for vectors in sorted({v for _, v in TILES}, reverse=True):
            with while_fits(builder, j, n, vectors * out.lanes) as column:
                builder.store(word(0), i)
                for shape in (t for t in TILES if t[1] == vectors):
                    with while_fits(builder, i, m, shape[0]) as row:
                        if ahead is not None:
                            _ask(builder, ahead, count, asked, builder.sdiv(depth, word(SIDE)))
                        _tile(builder, out, old, scale, a, B, (row, column), depth, shape, mode)

    return body


def _plain(name: str, turned: bool, mode: int) -> Any:
    tiles = _tiles(turned, mode)

    def body(builder, out, A, B, m, n, depth, *ahead):
        tiles(builder, out, None, None, A, B, m, n, depth, *ahead)

    @intrinsic
    def product(typing, out, A, B, m, n, depth):
        def make(context, builder, signature, args):
            return call(name, context, builder, signature, args, body)

        return types.void(out, A, B, m, n, depth), make

    @intrinsic
    def product_asking(typing, out, A, B, m, n, depth, ahead, count):
        """Rows of ahead: an address, bytes from row to row, bytes of a row."""

        def make(context, builder, signature, args):
            return call(f"{name}_asking", context, builder, signature, args, body)

        return types.void(out, A, B, m, n, depth, ahead, count), make

    return product, product_asking


def _scaled(name: str, turned: bool) -> Any:
    body = _tiles(turned, SCALE)

    @intrinsic
    def product(typing, out, old, scale, A, B, m, n, depth):
        def make(context, builder, signature, args):
            return call(name, context, builder, signature, args, body)

        return types.void(out, old, scale, A, B, m, n, depth), make

    @intrinsic
    def product_asking(typing, out, old, scale, A, B, m, n, depth, ahead, count):
        def make(context, builder, signature, args):
            return call(f"{name}_asking", context, builder, signature, args, body)

        return types.void(out, old, scale, A, B, m, n, depth, ahead, count), make

    return product, product_asking


put, put_asking = _plain("put", False, SET)
add, _ = _plain("add", False, ADD)
add_turned, _ = _plain("add_turned", True, ADD)
scale_add, _ = _scaled("scale_add", False)
scale_add_turned, scale_add_turned_asking = _scaled("scale_add_turned", True)


def _copy(builder, out, x, to, to_step, at, at_step, n, width):
    row, column = (cgutils.alloca_once_value(builder, word(0)) for _ in range(2))
    with while_fits(builder, row, n, 1) as r:
        target, source = (
            _Matrix(builder, builder.gep(m.data, [builder.add(start, builder.mul(r, step))]), word(0))
            for m, start, step in ((out, to, to_step), (x, at, at_step))
        )
        builder.store(word(0), column)
        for lanes in (out.lanes, 1):
            with while_fits(builder, column, width, lanes) as c:
                target.store(source.load(word(0), c, lanes), word(0), c, lanes)


@intrinsic
def copy(typing, out, x, to, to_step, at, at_step, n, width):
    """n rows of `width` numbers from x to out, each given as flat: where to begin, how far rows are apart."""

    def make(context, builder, signature, args):
        return call("copy", context, builder, signature, args, _copy)

    return types.void(out, x, to, to_step, at, at_step, n, width), make


@intrinsic
def apart(typing):
    """Keep the function in which this stands out of its callers: less to compile again."""

    def make(context, builder, signature, args):
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.void(), make


def _interleave(side: int, half: int, low: bool) -> list[int]:
    """Which of two rows' elements stand where after one stage of a transpose by halves."""
    return [
        (i if not i & half else i - half + side) if low else (i + half if not i & half else i + side)
        for i in range(side)
    ]


def _turn(builder: Any, out: _Matrix, x: _Matrix, i: Any, j: Any) -> None:
    """The square of x at (i, j) into out at (j, i)."""
    rows = [x.load(builder.add(i, word(r)), j, SIDE) for r in range(SIDE)]
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
        out.store(row, builder.add(j, word(r)), i, SIDE)


def _transpose(name: str, back: bool) -> Any:
    def body(builder, out, x, width):
        place = cgutils.alloca_once_value(builder, word(0))
        with while_fits(builder, place, width, SIDE) as here:
            _turn(builder, out, x, *((here, word(0)) if back else (word(0), here)))

    @intrinsic
    def turn(typing, out, x, width):
        def make(context, builder, signature, args):
            return call(name, context, builder, signature, args, body)

        return types.void(out, x, width), make

    return turn


transpose = _transpose("transpose", False)
transpose_back = _transpose("transpose_back", True)  # out (SIDE, width) = x (width, SIDE)ᵀ


def _decaying(builder, out_q, out_r, keys, decay, q, r, n, wide, late_q, late_r):
    vector = ir.VectorType(keys.number, SIDE)
    places = ir.Constant(ir.VectorType(WORD, SIDE), list(range(SIDE)))
    ones, zero = ir.Constant(vector, [1.0] * SIDE), ir.Constant(vector, None)
    row = cgutils.alloca_once_value(builder, word(0))
    with while_fits(builder, row, n, 1) as i:
        past = builder.icmp_signed("<", places, _splat(builder, i, SIDE))
        with carried(builder, [zero, zero], wide) as (k, sums, new, ends):
            old = keys.load(k, word(0), SIDE)
            factor = builder.select(past, _splat(builder, builder.load(decay.at(i, k)), SIDE), ones)
            now = builder.fmul(old, factor)
            keys.store(now, k, word(0), SIDE)
            for total, x, late in zip(sums, (q, r), (late_q, late_r), strict=True):
                weight = _splat(builder, builder.load(x.at(i, k)), SIDE)
                late = builder.icmp_signed("!=", late, word(0))
                product = builder.fmul(weight, builder.select(late, old, now), flags=FLAGS)
                new.append(builder.fadd(total, product, flags=FLAGS))
        for out, end in zip((out_q, out_r), ends, strict=True):
            out.store(end, i, word(0), SIDE)


@intrinsic
def read_decaying(typing, out_q, out_r, keys, decay, q, r, n, wide, late_q, late_r):
    """out[i, j] = Σ_k x_ik keys_kj Π_{j < s ≤ i} decay_sk for x = q and r; up to i - 1 only where x is late.

    keys (wide, SIDE) are decayed in place. Columns j > i, and j = i where x is late, hold no meaning.
    """

    def make(context, builder, signature, args):
        return call("read_decaying", context, builder, signature, args, _decaying)

    return types.void(out_q, out_r, keys, decay, q, r, n, wide, late_q, late_r), make
