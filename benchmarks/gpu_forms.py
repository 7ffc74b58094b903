"""What the GPU's benchmark of ops runs: for each form its shapes, inputs, our call, its meaning, its floor.

Floors are the larger of bytes (every input read once, every output written once; backward reads inputs,
outputs and their gradients, and writes gradients) over 4.3 TB/s and multiplications over 790 TFLOP/s, both
measured on an H200. Those of a matrix memory are of its chunkwise form, with chunks of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from riverrun import ops
from riverrun.recurrences.fold import fold

BANDWIDTH, RATE = 4.3e12, 790e12
MATRICES = ["4x4096x16x128", "2x16384x16x128", "8x1024x8x64", "1x65536x16x128"]
SCANS = ["8x4096x2048", "1x65536x2048"]
CELLS = ["16x1024x768"]
STATES = 16  # of a channel of a selective scan
HEADS = 12  # of an LSTM's 768 units, where it has several


class Form(NamedTuple):
    shapes: list[str]
    inputs: Callable[..., tuple]  # of the numbers of a shape
    floor: Callable[..., tuple[float, float]]  # of those: least ms of forward, and of forward and backward
    ours: Callable[..., Any] | None  # y of the inputs; None: only others are timed
    exact: Callable[..., Any] | None  # the same by definition, for float64
    small: Callable[..., tuple] | None  # a shape of the same widths for the definition


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def leaves(*tensors: torch.Tensor | None) -> tuple:
    return tuple(None if x is None else x.detach().requires_grad_() for x in tensors)


def memory(name: str) -> Callable[..., tuple]:
    """Arguments as a trained model has them: unit keys, decays mostly near one, bfloat16 but for gates."""

    def inputs(B: int, T: int, H: int, D: int) -> tuple:
        q, v = normal(B, T, H, D) * D**-0.5, normal(B, T, H, D)
        k = F.normalize(normal(B, T, H, D).float(), dim=-1).bfloat16()
        per_head, per_key = (
            F.logsigmoid(normal(*s, dtype=torch.float32) + 3) for s in ((B, T, H), (B, T, H, D))
        )
        beta = normal(B, T, H).float().sigmoid().bfloat16()
        others = {
            "outer-head": (per_head, None),
            "outer-key": (per_key, None),
            "mlstm": (per_head, normal(B, T, H, dtype=torch.float32)),
            "delta": (beta, None),
            "delta-head": (beta, per_head),
            "delta-key": (beta, per_key),
            "dplr": (-0.6 * per_key.exp().bfloat16(), -k * beta[..., None], k),
            "attention": (),
        }
        return leaves(q, k, v, *others[name])

    return inputs


def least(forward: tuple[float, float], backward: tuple[float, float]) -> tuple[float, float]:
    """Milliseconds of (bytes, multiplications and additions)."""
    f, b = (max(moved / BANDWIDTH, work / RATE) * 1e3 for moved, work in (forward, backward))
    return f, f + b


def memory_floor(name: str) -> Callable[..., tuple[float, float]]:
    def floor(B: int, T: int, H: int, D: int) -> tuple[float, float]:
        op = name.split("-")[0]
        sequences = 5 if op == "dplr" else 3
        gate = 4 if name.endswith("key") else 2 if op == "dplr" else 0
        read, write = B * T * H * D * (2 * sequences + gate), 2 * B * T * H * D
        if op == "attention":
            work = 2 * B * H * T * T * D
        else:
            pairs, states = {"outer": (2, 2), "mlstm": (2, 2), "delta": (4, 3), "dplr": (7, 4)}[op]
            work = B * T * H * (pairs * 64 * D + states * 2 * D * D)
        return least((read + write, work), (2 * read + 2 * write, 2.5 * work))

    return floor


def matrices(name: str) -> Form:
    op = getattr(ops, name.split("-")[0], None)
    return Form(
        MATRICES, memory(name), memory_floor(name),
        op and (lambda *args: op(*args, impl="gpu")[0]),
        op and (lambda *args: fold(op.recurrence, args)[0]),
        lambda B, T, H, D: (2, 256, 2, D),
    )  # fmt: skip


def scan(dtype: torch.dtype) -> Form:
    def inputs(B: int, T: int, D: int) -> tuple:
        a, b = torch.rand(B, T, D, device="cuda"), torch.randn(B, T, D, device="cuda", dtype=dtype)
        return leaves(torch.polar(a, 6.3 * torch.rand_like(a)) if dtype.is_complex else a.to(dtype), b)

    def floor(B: int, T: int, D: int) -> tuple[float, float]:
        size = B * T * D * dtype.itemsize
        return least((3 * size, 0), (5 * size, 0))

    return Form(
        SCANS, inputs, floor,
        lambda a, b: ops.diagonal(a, b, impl="gpu")[0],
        lambda a, b: fold(ops.diagonal.recurrence, (a, b))[0],
        lambda B, T, D: (2, 256, 64),
    )  # fmt: skip


def selective() -> Form:
    """As Mamba has it: sixteen states a channel, decays of 0.3 to 1 a step."""

    def inputs(B: int, T: int, D: int) -> tuple:
        x, write, read = normal(B, T, D), normal(B, T, STATES), normal(B, T, STATES)
        A = -torch.arange(1.0, STATES + 1, device="cuda").expand(D, STATES)
        return leaves(x, (0.08 * torch.rand(B, T, D, device="cuda")).bfloat16(), A.contiguous(), write, read)

    def floor(B: int, T: int, D: int) -> tuple[float, float]:
        size = 2 * B * T * D
        return least((3 * size, 0), (5 * size, 0))

    return Form(
        SCANS, inputs, floor,
        lambda *args: ops.selective(*args, impl="gpu")[0],
        lambda *args: fold(ops.selective.recurrence, (*args, None))[0],
        lambda B, T, D: (2, 256, 64),
    )  # fmt: skip


def project(x: torch.Tensor, W: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """All gates' inputs, (B, T, 4, H, P): cuDNN's LSTM includes this product."""
    return (x @ W.T).unflatten(-1, R.shape[:3])


def lstm(heads: int) -> Form:
    def inputs(B: int, T: int, D: int) -> tuple:
        P = D // heads
        W, R = normal(4 * D, D) / D**0.5, normal(4, heads, P, P) / (2 * P**0.5)
        return leaves(normal(B, T, D), W, R, normal(4, heads, P))

    def floor(B: int, T: int, D: int) -> tuple[float, float]:
        size, weights = 2 * B * T * D, 2 * 4 * D * D * (1 + 1 / heads)
        work = B * T * weights
        return least((2 * size + weights, work), (4 * size + 2 * weights, 2 * work))

    return Form(
        CELLS, inputs, floor,
        lambda x, W, R, c: ops.lstm(project(x, W, R), R, c, impl="gpu")[0].flatten(2),
        lambda x, W, R, c: fold(ops.lstm.recurrence, (project(x, W, R), R, c))[0].flatten(2),
        lambda B, T, D: (2, 64, D),
    )  # fmt: skip


NAMES = ("outer-head", "outer-key", "mlstm", "delta", "delta-head", "delta-key", "dplr", "attention")
FORMS = {name: matrices(name) for name in NAMES} | {
    "diagonal-float32": scan(torch.float32),
    "diagonal": scan(torch.bfloat16),
    "diagonal-complex": scan(torch.complex64),
    "selective": selective(),
    "lstm-heads": lstm(HEADS),
    "lstm-full": lstm(1),
}
