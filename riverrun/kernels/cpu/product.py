"""Small matrix products that stay in registers: acc (rows, n) += v (rows, K) M (K, n) for 1, 2 or 4 rows.

The compiler's own loops over such a product write acc to memory at every step of K, in vectors half as wide
as the CPU's. Here a tile of acc, rows x WIDTH, is held in vector variables through all of K. M is packed so
that it is read in order:

    M (K, n)  ->  (tiles, K, WIDTH), zero beyond n;  acc is as wide as all tiles together
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

VECTORS, BYTES = 4, 64  # vectors in a row of a tile, enough independent sums to hide a multiply-add's latency


def width(dtype: torch.dtype) -> int:
    """Columns of a tile."""
    return VECTORS * BYTES // dtype.itemsize


def padded(n: int, dtype: torch.dtype) -> int:
    """Columns of all tiles together."""
    return -(-n // width(dtype)) * width(dtype)


def packed(M: Tensor) -> Tensor:
    """M (H, K, n) as (H, tiles, K, WIDTH), in memory of its own."""
    H, K, n = M.shape
    tiles = F.pad(M, (0, padded(n, M.dtype) - n)).view(H, K, -1, width(M.dtype))
    return tiles.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _emit(context: Any, builder: Any, signature: Any, args: Any, rows: int) -> None:
    """The code of a tile: for k: for each vector of the tile's row k: for each row: acc += v[row, k] *
    vector."""
    acc, v, M = (context.make_array(t)(context, builder, x) for t, x in zip(signature.args[:3], args[:3]))
    number = context.get_value_type(signature.args[0].dtype)
    size = context.get_abi_sizeof(number)
    lanes = BYTES // size
    vector, word = ir.VectorType(number, lanes), context.get_value_type(types.intp)
    pair = [cgutils.unpack_tuple(builder, x.shape) for x in (acc, v, M)]
    columns, K = pair[0][1], pair[1][1]

    def at(array: Any, offset: Any) -> Any:
        return builder.bitcast(builder.gep(array.data, [offset]), vector.as_pointer())

    def number_of(i: int) -> Any:
        return ir.Constant(word, i)

    start = builder.mul(args[3], number_of(VECTORS * lanes))
    places = [
        [
            at(acc, builder.add(builder.mul(columns, number_of(r)), builder.add(start, number_of(j * lanes))))
            for j in range(VECTORS)
        ]
        for r in range(rows)
    ]
    sums = [[cgutils.alloca_once(builder, vector) for _ in range(VECTORS)] for _ in range(rows)]
    for r in range(rows):
        for j in range(VECTORS):
            builder.store(builder.load(places[r][j], align=size), sums[r][j])
    base = builder.mul(start, K)
    with cgutils.for_range(builder, K) as loop:
        row = builder.add(base, builder.mul(loop.index, number_of(VECTORS * lanes)))
        ms = [builder.load(at(M, builder.add(row, number_of(j * lanes))), align=size) for j in range(VECTORS)]
        for r in range(rows):
            place = builder.gep(v.data, [builder.add(builder.mul(K, number_of(r)), loop.index)])
            single = builder.insert_element(
                ir.Constant(vector, ir.Undefined), builder.load(place), ir.Constant(ir.IntType(32), 0)
            )
            mask = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
            factor = builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), mask)
            for j in range(VECTORS):
                term = builder.fmul(factor, ms[j], flags=("contract",))
                builder.store(builder.fadd(builder.load(sums[r][j]), term, flags=("contract",)), sums[r][j])
    for r in range(rows):
        for j in range(VECTORS):
            builder.store(builder.load(sums[r][j]), places[r][j], align=size)


def _tile(rows: int) -> Any:
    @intrinsic
    def tile(typing, acc, v, M, index):
        """acc[:, columns of tile `index`] += v M[index], for contiguous arrays of one dtype."""

        def generate(context, builder, signature, args):
            _emit(context, builder, signature, args, rows)
            return context.get_dummy_value()

        return types.void(acc, v, M, types.intp), generate

    return tile


_tile1, _tile2, _tile4 = _tile(1), _tile(2), _tile(4)


@njit(cache=True, error_model="numpy")
def add_product(acc, v, M):
    """acc (rows, tiles · WIDTH) += v (rows, K) M for packed M (tiles, K, WIDTH); rows are 1, 2 or 4."""
    for index in range(M.shape[0]):
        if acc.shape[0] == 4:
            _tile4(acc, v, M, index)
        elif acc.shape[0] == 2:
            _tile2(acc, v, M, index)
        else:
            _tile1(acc, v, M, index)
