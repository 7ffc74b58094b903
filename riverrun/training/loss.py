"""Cross entropy of next tokens, straight from hidden activations.

    loss = mean over the n tokens of  log Σ_w e^{x·E_w} - x·E_target        x: (n, D)    E: (vocabulary, D)

Logits are made for some rows at a time and turned in place into their gradient, e^{x·E} / Σ e^{x·E} -
onehot, at once: forward and backward together cost three products and memory for one block of logits, at
any vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from riverrun.nn import positions
from riverrun.ops import gpu

BLOCK, GPU_BLOCK = 1 << 22, 1 << 27  # logits held at a time: 16 and 512 MiB in float32


def cross_entropy(x: Tensor, E: Tensor, targets: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean loss in nats of `targets` (B, T) under hidden activations x (B, T, D) and output map E.

    Only those of `counted` (B, T) bool count, all unless given. Raises ValueError when there are none.
    """
    x, targets = _cast(x).flatten(0, -2), targets.flatten()
    if counted is not None:
        rows = counted.flatten().nonzero()[:, 0]
        if not len(rows):
            raise ValueError(
                f"none of {len(targets)} tokens is counted, so there is no loss; take longer texts"
            )
        x, targets = x.index_select(0, rows), targets.index_select(0, rows)
    with torch.autocast(x.device.type, enabled=False):
        return _CrossEntropy.apply(x, E, targets)


def unseen(prefix: int, tokens: Tensor, reset: Tensor | None) -> Tensor | None:
    """Where in `tokens` (B, T), whose rows and resets begin documents, the next token is still to come.

    Of a `prefix` that is read as a whole, all tokens but the last have seen it. None: everywhere.
    """
    return positions(tokens, None, reset)[0] >= prefix - 1 if prefix else None


def cross_entropy_sum(x: Tensor, E: Tensor, targets: Tensor) -> Tensor:
    """Sum of the same, in float64, without gradients."""
    total = x.new_zeros((), dtype=torch.float64)
    for rows, wanted in _blocks(_cast(x).flatten(0, -2), targets.flatten(), E.shape[0]):
        total += F.cross_entropy(_logits(rows, E), wanted, reduction="none").double().sum()
    return total


def _cast(x: Tensor) -> Tensor:
    """x in the dtype that autocast wants products in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def _blocks(x: Tensor, targets: Tensor, vocabulary: int):
    size = max(1, (GPU_BLOCK if x.is_cuda else BLOCK) // vocabulary)
    return zip(x.split(size), targets.split(size), strict=True)


def _logits(x: Tensor, E: Tensor) -> Tensor:
    return F.linear(x, E.to(x.dtype)).to(torch.promote_types(x.dtype, torch.float32))


def _losses(x: Tensor, E: Tensor, targets: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """The losses of rows x, and unless `scale` is None, `scale` times the gradient of the logits."""
    if gpu is not None and gpu.loss.refuses(x) is None:
        logits = F.linear(x, E.to(x.dtype))
        return gpu.loss.losses_(logits, targets, scale or 0.0, scale is not None), logits
    logits = _logits(x, E)
    norm = logits.logsumexp(-1, keepdim=True)
    losses = norm - logits.gather(-1, targets[:, None])
    if scale is not None:
        logits.sub_(norm).exp_().scatter_add_(-1, targets[:, None], logits.new_full((len(x), 1), -1.0))
        logits.mul_(scale)
    return losses, logits.to(x.dtype)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, E: Tensor, targets: Tensor) -> Tensor:
        total = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        need = any(ctx.needs_input_grad[:2])
        dx, dE = torch.empty_like(x), torch.zeros_like(E)
        start, n = 0, len(targets)
        for rows, wanted in _blocks(x, targets, E.shape[0]):
            losses, grad = _losses(rows, E, wanted, 1 / n if need else None)
            total += losses.sum()
            if need:
                torch.mm(grad, E.to(x.dtype), out=dx[start : start + len(wanted)])
                dE += grad.T @ rows
                start += len(wanted)
        ctx.save_for_backward(dx, dE)
        return total / n

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        dx, dE = ctx.saved_tensors
        return dx * grad.to(dx.dtype), dE * grad.to(dE.dtype), None
