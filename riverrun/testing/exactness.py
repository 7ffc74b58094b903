"""How far an implementation of an op may be from its definition, and how far it is.

Outputs, final states and all gradients are compared with the float64 definition on inputs that were rounded
to the dtype under test first, so that what is measured is the implementation's own

    error = ‖found - definition‖ / scale        of y, of each state tensor and of each gradient

where the scale is ‖definition‖. Some gradients are what is left when larger terms cancel, and their scale is
that of the terms: one smaller than a rounding of the largest gradient, on whose scale it is zero; that of a
running maximum, on which y does not depend: the exponents' scale if that is larger; and that of softmax's s:
the scale of Σ v dv. The bound is derived for every case and tensor from the definition alone:

    bound = 8 (u + d + κ)
    u   one rounding of the result to its dtype: 2^-8 bfloat16, 2^-11 float16, 2^-24 float32, 2^-53 float64
    d   the error of the definition itself when it is run in float32 (float64: 0)
    κ   the change of the float64 definition when what an implementation may round is changed by a rounding:
        every input by u of float32 (float64); the operands of matrix products (keys, values, states, upstream
        gradients; never an exponent or a gate) by u of the dtype; and log-decays by u of float32 times their
        running sum to the next step over a chunk of 64, since that sum is what a parallel form stores

8 is for roundings that follow one another: operands, scores, solved systems, written states, in both
directions. A wrong index, sign, factor or a missing term changes results by much more than that, and
float32 shows it if half precision does not.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from riverrun.kernels import verdicts
from riverrun.ops import OPS, Op
from riverrun.recurrences.fold import fold
from riverrun.state import leaves, tree_map

from .inputs import Case
from .tolerance import UNIT

SAFETY, CHUNK = 8.0, 64
OPERANDS = {
    "outer": "qkvu", "mlstm": "qkv", "delta": "qkv", "dplr": "qkvab",
    "elman": "R", "lstm": "R", "gru": "R", "slstm": "R",
}  # fmt: skip  # arguments that enter matrix products
# log-decays, which parallel forms sum
DECAYS = {"outer": "g", "mlstm": "f", "delta": "g", "dplr": "g", "fastweight": "gm"}
# the state's running maximum and its exponents
MAXIMA = {"mlstm": (2, "i"), "softmax": (0, "s"), "slstm": (3, "x")}


def definition(op: Op, case: Case, dtype: torch.dtype):
    """Results and gradients of the definition in float64 on the CPU; scale and bound of errors in each."""
    threads, wide = torch.get_num_threads(), torch.promote_types(dtype, torch.float32)
    torch.set_num_threads(1)  # more of them cost tensors this small more than they give
    exact = case.to(torch.float64)
    truth, _ = outcome(op, exact, None)
    # gradients are linear in the upstream ones, made smaller where float16 could not hold the result
    largest = max(float(x.abs().max()) for what, x in truth.items() if what.startswith("gradient"))
    gain = 2.0 ** -max(0, math.frexp(largest / 2**14)[1]) if dtype == torch.float16 else 1.0
    truth = {what: gain * x if what.startswith("gradient") else x for what, x in truth.items()}
    rounding = UNIT[dtype] if op.name in OPERANDS else 0.0
    moved, _ = outcome(op, perturbed(exact, dtype), None, rounding, gain)
    single = truth if wide == torch.float64 else outcome(op, case.to(wide), None, gain=gain)[0]
    torch.set_num_threads(threads)
    scales = {what: norm(x) for what, x in truth.items()}
    largest = max(scale for what, scale in scales.items() if what.startswith("gradient"))
    if op.name in MAXIMA:
        index, exponents = MAXIMA[op.name]
        maximum = f"gradient of state {index}"
        if maximum in scales:
            scales[maximum] = max(scales[maximum], scales[f"gradient of {exponents}"])
    if op.name == "softmax":
        terms = (exact.args[1] * truth["gradient of v"]).sum(-1)  # type: ignore[operator]
        scales["gradient of s"] = max(scales["gradient of s"], norm(terms))
    for what, scale in scales.items():
        if what.startswith("gradient") and scale < UNIT[wide] * largest:
            scales[what] = largest
    bounds = {}
    for what, x in truth.items():
        lost, change = distance(single[what], x, scales[what]), distance(moved[what], x, scales[what])
        # where the definition itself overflows in float32, an implementation gets no allowance for it
        bounds[what] = SAFETY * (UNIT[dtype] + (lost if lost < float("inf") else 0.0) + change)
    return truth, scales, bounds, gain


def perturbed(case: Case, dtype: torch.dtype) -> Case:
    """The case with its inputs changed as an implementation for `dtype` may round them."""
    wide, generator = UNIT[torch.promote_types(dtype, torch.float32)], torch.Generator().manual_seed(1)

    def change(x: Tensor, size: Any) -> Tensor:
        return x + size * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1)

    args: list[Tensor | None] = []
    for name, x in zip(OPS[case.op].signature.names, case.args, strict=True):
        if x is None:
            args.append(None)
        elif name in DECAYS.get(case.op, ()):
            sums = torch.cat([part.abs().cumsum(1) for part in x.split(CHUNK, 1)], 1)
            sums = torch.maximum(sums, torch.cat([sums[:, 1:], sums[:, -1:]], 1))
            args.append(change(x, wide * sums).clamp(max=0))
        else:
            args.append(change(x, x * (UNIT[dtype] if name in OPERANDS.get(case.op, ()) else wide)))
    state_rounding = UNIT[dtype] if case.op in OPERANDS else wide
    axes = OPS[case.op].recurrence.state  # one number a sequence, "B", is a count and exact
    state = tree_map(lambda s, a: s if a == "B" else change(s, state_rounding * s), case.state, axes)
    return replace(case, args=tuple(args), state=state)


def outcome(
    op: Op, case: Case, impl: str | None, rounding: float = 0.0, gain: float = 1.0
) -> tuple[dict[str, Tensor], float]:
    """y, the final state and all gradients by name, and the seconds it took. `impl` None is the plain fold.

    Upstream gradients are drawn from a fixed seed and rounded to y's dtype; `rounding` changes them further,
    `gain` scales them.
    """
    args = tuple(None if x is None else x.detach().requires_grad_() for x in case.args)
    state = tree_map(lambda x: x.detach().requires_grad_(), case.state)
    start = time.perf_counter()
    if impl is None:
        y, last = fold(op.recurrence, args, state, case.reset)
    else:
        with verdicts.ignored():
            y, last = op(*args, state=state, reset=case.reset, impl=impl)
    outputs = [x for x in (y, *leaves(last)) if x.requires_grad]  # a state may hold a count
    like = next(x.dtype for x in args if x is not None)
    upstream = [gain * weights(x, i, like, rounding) for i, x in enumerate(outputs)]
    wanted = {f"gradient of {n}": x for n, x in zip(op.signature.names, args, strict=True) if x is not None}
    wanted |= {f"gradient of state {i}": x for i, x in enumerate(leaves(state))}
    gradients = torch.autograd.grad(outputs, list(wanted.values()), upstream, allow_unused=True)
    if y.device.type == "cuda":
        torch.cuda.synchronize(y.device)
    seconds = time.perf_counter() - start
    found = {"y": y, **{f"state {i}": x for i, x in enumerate(leaves(last))}}
    for (what, x), g in zip(wanted.items(), gradients, strict=True):
        found[what] = torch.zeros_like(x) if g is None else g
    return {what: x.detach() for what, x in found.items()}, seconds


def weights(x: Tensor, seed: int, dtype: torch.dtype, rounding: float) -> Tensor:
    """An upstream gradient for x: numbers that every dtype holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(x.shape, generator=generator).bfloat16().double()
    if rounding:
        w = w * (1 + rounding * (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1))
    return w.to(x.device, x.dtype)


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.to(torch.complex128 if x.is_complex() else torch.float64)))


def distance(found: Tensor, true: Tensor, scale: float) -> float:
    """‖found - true‖ / scale; infinite where found is not finite, absolute where the scale is zero."""
    if found.shape != true.shape or not torch.isfinite(found).all():
        return float("inf")
    return norm(found.to(true.dtype) - true) / (scale or 1.0)
