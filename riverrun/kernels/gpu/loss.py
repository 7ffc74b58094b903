"""Logits into losses, and in place into their gradient: two readings and one writing of a row.

    loss = log Σ_w e^{l_w} - l_target        dl_w = scale (e^{l_w} / Σ e^{l} - [w = target])

logits: (n, V)    targets: (n)    What `riverrun.training.loss` does between its products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DEVICE, power_of_2

BLOCK = 4096  # logits of a row that a program holds at once


@triton.jit
def _rows(logits, targets, losses, V, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (rows). The sum is of e^{l - maximum so far}, so that nothing overflows."""
    row = tl.program_id(0).to(tl.int64)
    top, total = float("-inf"), 0.0
    for v0 in range(0, V, BLOCK):
        c = v0 + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), 0)
        top = new
    norm, target = top + tl.log(total), tl.load(targets + row)
    tl.store(losses + row, norm - tl.load(logits + row * V + target).to(tl.float32))
    if GRADIENT:
        tl.debug_barrier()  # all threads have read the target's logit before one of them overwrites it
        for v0 in range(0, V, BLOCK):
            c = v0 + tl.arange(0, BLOCK)
            x = tl.load(logits + row * V + c, mask=c < V, other=float("-inf")).to(tl.float32)
            g = tl.exp(x - norm) - tl.where(c == target, 1.0, 0.0)
            tl.store(logits + row * V + c, (g * scale).to(logits.dtype.element_ty), mask=c < V)


@torch.library.custom_op("riverrun::losses_gpu", mutates_args=("logits",), device_types=DEVICE)
def losses_(logits: Tensor, targets: Tensor, scale: float, gradient: bool) -> Tensor:
    """(n) losses in float32; `logits`, contiguous, become `scale` times their gradient if `gradient`."""
    n, V = logits.shape
    losses = logits.new_empty(n, dtype=torch.float32)
    size = min(BLOCK, power_of_2(V))
    _rows[(n,)](logits, targets, losses, V, scale, gradient, size, num_warps=max(1, min(8, size // 256)))
    return losses


@losses_.register_fake
def _(logits, targets, scale, gradient):
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


def refuses(logits: Tensor) -> str | None:
    """Why the kernel cannot take these logits, or None."""
    if logits.device.type != DEVICE:
        return f"it runs on {DEVICE}, the logits are on {logits.device.type}"
    return "it computes in float32, and logits are float64" if logits.dtype == torch.float64 else None
