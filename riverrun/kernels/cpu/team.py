"""Kernels on PyTorch's own threads, those of OpenMP, which wait for work between PyTorch's operators.

They do so awake, for milliseconds: threads of our own beside them get half a core each, and a kernel on two
threads takes as long as on one. So a kernel that begins with

    if divided(first, step):
        return

and is called with the address of `GOMP_parallel` for `first` and -n for `step` has OpenMP call it again on n
threads, with (0, n), (1, n), ..., and with denormal numbers taken for zero. Nobody counts references to the
arrays that it then gets, which would have the threads wait for each other: its caller keeps them.
"""

from __future__ import annotations

import ctypes
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.callconv import RETCODE_NONE, RETCODE_OK
from numba.extending import intrinsic

BYTES, WORD, HALF = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(32)
FIRST, STEP = 2, 3  # where a compiled function has them, after what it returns and raises
NEXT, THREADS, CODE, RAISED, ARGS = range(5)  # a frame: what threads share
ZERO_DENORMALS = HALF(0x8040)  # of the control word: what comes in, and what goes out


def address() -> int:
    """Of GOMP_parallel in the OpenMP that this process runs PyTorch on; 0 where there is none to be found."""
    if not llvm.get_process_triple().startswith("x86_64"):  # `_control` is written for it
        return 0
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


def _control(builder: Any, name: str, place: Any) -> None:
    """ "stmxcsr" or "ldmxcsr": this thread's control word to or from memory."""
    kind = ir.FunctionType(ir.VoidType(), [BYTES])
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{name}")
    builder.call(function, [builder.bitcast(place, BYTES)])


def _counted(kinds: list[Any]) -> set[int]:
    """Which arguments are what counts an array's references: before its parent, sizes and data."""
    return {
        i
        for i in range(STEP + 1, len(kinds) - 4)
        if kinds[i] == kinds[i + 1] == BYTES and kinds[i + 2] == kinds[i + 3] == WORD
    }


def _member(kernel: Any, frame: Any) -> Any:
    """What each thread runs: the kernel, for as long as there are parts that nobody has begun."""
    name = kernel.module.get_unique_name("riverrun_member")
    function = ir.Function(kernel.module, ir.FunctionType(ir.VoidType(), [BYTES]), name)
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    given, counted = (
        builder.bitcast(function.args[0], frame.as_pointer()),
        _counted(list(frame.elements[ARGS:])),
    )

    def field(i: int) -> Any:
        return builder.gep(given, [HALF(0), HALF(i)], inbounds=True)

    args = [
        ir.Constant(kind, None) if i in counted else builder.load(field(ARGS + i))
        for i, kind in enumerate(frame.elements[ARGS:])
    ]
    args[:FIRST] = [cgutils.alloca_once(builder, x.type.pointee) for x in kernel.args[:FIRST]]
    # set here and not by whose threads these are: new ones begin as it is
    before, during = (cgutils.alloca_once(builder, HALF) for _ in range(2))
    _control(builder, "stmxcsr", before)
    builder.store(builder.or_(builder.load(before), ZERO_DENORMALS), during)
    _control(builder, "ldmxcsr", during)
    args[STEP] = builder.load(field(THREADS))
    with cgutils.loop_nest(builder, [args[STEP]], WORD):  # at most; one more leaves it
        args[FIRST] = builder.atomic_rmw("add", field(NEXT), WORD(1), "monotonic")
        with builder.if_then(builder.icmp_signed("<", args[FIRST], args[STEP])):
            code = builder.call(kernel, args)
            with builder.if_then(_failed(builder, code)):
                builder.store(code, field(CODE))
                builder.store(builder.load(args[1]), field(RAISED))
    _control(builder, "ldmxcsr", before)
    builder.ret_void()
    return function


def _failed(builder: Any, code: Any) -> Any:
    return builder.and_(
        builder.icmp_signed("!=", code, RETCODE_OK), builder.icmp_signed("!=", code, RETCODE_NONE)
    )


def _divide(builder: Any, start: Any, step: Any) -> None:
    kernel = builder.function
    kernel.attributes.add("noinline")  # or it is compiled twice
    raised = kernel.args[1].type.pointee
    frame = ir.LiteralStructType([WORD, WORD, HALF, raised, *(x.type for x in kernel.args)])
    place = cgutils.alloca_once(builder, frame)

    def field(i: int) -> Any:
        return builder.gep(place, [HALF(0), HALF(i)], inbounds=True)

    threads = builder.neg(step)
    builder.store(WORD(0), field(NEXT))
    builder.store(threads, field(THREADS))
    builder.store(RETCODE_OK, field(CODE))
    for i, x in enumerate(kernel.args):
        builder.store(x, field(ARGS + i))
    member = _member(kernel, frame)
    kind = ir.FunctionType(ir.VoidType(), [member.type, BYTES, HALF, HALF]).as_pointer()
    parallel = builder.inttoptr(start, kind)
    builder.call(parallel, [member, builder.bitcast(place, BYTES), builder.trunc(threads, HALF), HALF(0)])
    code = builder.load(field(CODE))
    with builder.if_then(_failed(builder, code)):
        builder.store(builder.load(field(RAISED)), kernel.args[1])
        builder.ret(code)


@intrinsic
def divided(typing, first, step):
    """Whether the caller, a kernel, has been run by several threads."""

    def make(context, builder, signature, args):
        several = builder.icmp_signed("<", args[1], WORD(0))
        with builder.if_then(several):
            _divide(builder, *args)
        return several

    return types.boolean(types.intp, types.intp), make
