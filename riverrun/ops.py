"""Which implementation runs: the only dispatcher, and the only place where precision is settled.

    y, state = ops.outer(q, k, v, g, state=None, reset=None, impl=None)

Every op takes its recurrence's arguments by position or name (one marked "?" there may be left out), and:

    state   the state to continue from, as an earlier call returned it; None starts afresh
    reset   (B, T) bool: clears the state before step t; packed documents, episodes, streams that start over
    impl    "sequential" (the definition), "scan" | "chunk" | "shift" (parallel PyTorch), "cpu" (Numba),
            "gpu" (Triton); None takes the first of gpu, cpu, parallel, sequential that can run the arguments

Inputs may be bfloat16, float16, float32 or float64 (complex where the recurrence allows it). States and sums
are held in float32 or wider; y has the dtype of the recurrence's main argument. Gradients reach every
argument and the state. ValueError and TypeError name what was given and what is accepted, before anything is
computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial, reduce
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from riverrun.algorithms import chunk, scan, shift
from riverrun.algorithms import fastweight as _fastweight_rounds
from riverrun.kernels import cpu, verdicts
from riverrun.recurrences import cell
from riverrun.recurrences.delta import delta as _delta
from riverrun.recurrences.diagonal import diagonal as _diagonal
from riverrun.recurrences.dplr import dplr as _dplr
from riverrun.recurrences.fastweight import fastweight as _fastweight
from riverrun.recurrences.fold import Recurrence, fold
from riverrun.recurrences.memory import Rule
from riverrun.recurrences.mlstm import mlstm as _mlstm
from riverrun.recurrences.outer import outer as _outer
from riverrun.recurrences.selective import selective as _selective
from riverrun.recurrences.short_conv import short_conv as _short_conv
from riverrun.recurrences.short_conv import short_conv_silu as _short_conv_silu
from riverrun.recurrences.softmax import softmax as _softmax
from riverrun.signature import REMEMBERED, Args, Signature
from riverrun.state import State, leaves, tree_map

# Triton comes with the CUDA builds of PyTorch only; without it there is no "gpu" implementation to choose
gpu = import_module("riverrun.kernels.gpu") if find_spec("triton") else None

_forced: dict[str, str] = {}  # op name -> impl, inside `forced`


@dataclass(frozen=True)
class Kernel:
    """Compiled code for one kind of device: `run(*args, state, reset) -> (y, state)`, differentiable."""

    run: Callable[..., tuple[Tensor, State]]
    device: str  # "cpu" or "cuda"
    refuses: Callable[[str, Args], str | None]  # why it cannot run these arguments, or None
    half: bool = False  # whether it takes half precision itself; else the op widens

    def refusal(self, name: str, args: Args) -> str | None:
        main = next(x for x in args if x is not None)
        if main.device.type != self.device:
            return f"it runs on {self.device}, the arguments are on {main.device.type}"
        return self.refuses(name, args)


class Op:
    """A recurrence that can be run in several ways; see the module's docstring for the call."""

    def __init__(self, recurrence: Recurrence, parallel: dict[str, Callable], kernels: dict[str, Kernel]):
        self.recurrence, self.name = recurrence, recurrence.name
        self.signature = Signature(recurrence)
        self.parallel, self.kernels = parallel, kernels
        self.plans: dict[Any, tuple[str, torch.dtype, bool]] = {}
        self.__doc__ = f"{recurrence.name}({', '.join(recurrence.args)}): {recurrence.args} -> {recurrence.y}"

    @property
    def impls(self) -> list[str]:
        """Every implementation's name, in the order in which they are preferred."""
        return [*self.kernels, *self.parallel, "sequential"]

    def refusal(self, impl: str, args: Args) -> str | None:
        """Why `impl` cannot run these arguments, or must not since the doctor found it wrong; or None."""
        like = next(x for x in args if x is not None)
        why = self.kernels[impl].refusal(self.name, args) if impl in self.kernels else None
        if why is None and impl != "sequential":
            why = verdicts.failure(self.name, impl, like.dtype, str(like.device))
        return why

    def choose(self, impl: str | None, args: Args) -> str:
        impl = impl or _forced.get(self.name)
        if impl is None:
            return next(i for i in self.impls if self.refusal(i, args) is None)
        if impl not in self.impls:
            raise ValueError(f"op '{self.name}' has no implementation '{impl}'; it has {self.impls}")
        if why := self.refusal(impl, args):
            raise ValueError(
                f"op '{self.name}' cannot run impl='{impl}': {why}. Leave impl=None to choose one that can"
            )
        return impl

    def plan(self, key: Any, impl: str | None, args: Args, state: State) -> tuple[str, torch.dtype, bool]:
        """The implementation, the dtype it computes in, and whether anything must be converted for it.

        Remembered for arguments that the signature takes for equal: decoding asks the same at every token.
        """
        if key is not None:
            key = key, impl, _forced.get(self.name), verdicts.edition()
            if key in self.plans:
                return self.plans[key]
        impl = self.choose(impl, args)
        every = [x for x in (*args, *leaves(state)) if x is not None]
        wide = widest(*every)
        plan = impl, wide, any(x.dtype != wide for x in every)
        if key is not None:
            if len(self.plans) >= REMEMBERED:
                self.plans.pop(next(iter(self.plans)))
            self.plans[key] = plan
        return plan

    def __call__(
        self,
        *args: Any,
        state: State = None,
        reset: Tensor | None = None,
        impl: str | None = None,
        **named: Any,
    ) -> tuple[Tensor, State]:
        args = self.signature.bind(args, named)
        key = self.signature.check(args, state, reset)
        impl, wide, mixed = self.plan(key, impl, args, state)
        like = args[self.signature.like]
        if torch.is_autocast_enabled(like.device.type):  # which would round the sums inside
            with torch.autocast(like.device.type, enabled=False):
                return self(*args, state=state, reset=reset, impl=impl)
        if mixed:
            if impl not in self.kernels or not self.kernels[impl].half:
                args = tuple(x if x is None else x.to(wide) for x in args)
            state = tree_map(lambda s: s.to(wide), state)
        if impl in self.kernels:
            y, state = self.kernels[impl].run(*args, state=state, reset=reset)
        elif impl == "sequential":
            y, state = fold(self.recurrence, args, state, reset)
        else:
            y, state = self.parallel[impl](*args, state=state, reset=reset)
        return y.to(like.dtype) if mixed else y, state

    def explain(self, *args: Any, **named: Any) -> str:
        """Which implementation would run these arguments, and why not the ones preferred to it."""
        args = self.signature.bind(args, named)
        self.signature.check(args, None, None)
        lines = []
        for impl in self.impls:
            why = self.refusal(impl, args)
            lines.append(f"{self.name}: {impl} " + (f"cannot: {why}" if why else "runs"))
            if why is None:
                break
        return "\n".join(lines)


def widest(*tensors: Tensor | None) -> torch.dtype:
    """The one dtype that an op computes in: float32, or wider if any argument or the state is."""
    return reduce(torch.promote_types, [x.dtype for x in tensors if x is not None], torch.float32)


def explain(name: str, *args: Any, **named: Any) -> str:
    """`explain("delta", q, k, v, beta, g)`: what would run, and why not what is preferred to it."""
    if name not in OPS:
        raise ValueError(f"no op '{name}'; there are {sorted(OPS)}")
    return OPS[name].explain(*args, **named)


@contextmanager
def forced(**impls: str) -> Iterator[None]:
    """Inside, ops run the implementations named: `with ops.forced(delta="chunk"): ...`."""
    for name, impl in impls.items():
        if name not in OPS or impl not in OPS[name].impls:
            raise ValueError(
                f"no implementation {name}='{impl}'; there are { {n: o.impls for n, o in OPS.items()} }"
            )
    before = dict(_forced)
    _forced.update(impls)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def is_forced() -> bool:
    """Whether this runs inside `forced`: who names implementations wants no others beside them."""
    return bool(_forced)


def _op(recurrence: Recurrence, **parallel: Callable) -> Op:
    kernels = {}
    if gpu is not None and recurrence.name in gpu.KERNELS:
        kernels["gpu"] = Kernel(gpu.KERNELS[recurrence.name], "cuda", gpu.refuses, half=True)
    if recurrence.name in cpu.KERNELS:
        kernels["cpu"] = Kernel(cpu.KERNELS[recurrence.name], "cpu", cpu.refuses)
    return Op(recurrence, parallel, kernels)


diagonal = _op(_diagonal, scan=scan.diagonal)
selective = _op(_selective, scan=scan.selective)
outer = _op(_outer, chunk=chunk.outer)
mlstm = _op(_mlstm, chunk=chunk.mlstm)
delta = _op(_delta, chunk=chunk.delta)
dplr = _op(_dplr, chunk=chunk.dplr)
softmax = _op(_softmax, scan=scan.softmax)
short_conv = _op(_short_conv, shift=shift.short_conv)
short_conv_silu = _op(_short_conv_silu, shift=shift.short_conv_silu)


@cache
def test_time(rule: Rule) -> Op:
    """The op "fastweight" for one rule: its arguments and its state depend on what the memory is."""
    return _op(_fastweight(rule), chunk=partial(_fastweight_rounds.run, rule))


fastweight = test_time(Rule("mlp", momentum=True, chunk=16))
elman, lstm, gru, slstm = (_op(r) for r in (cell.ELMAN, cell.LSTM, cell.GRU, cell.SLSTM))

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        diagonal, selective, outer, mlstm, delta, dplr, fastweight, softmax, short_conv,
        short_conv_silu, elman, lstm, gru, slstm,
    )
}  # fmt: skip
