"""(H_t + Λ) x_t = q_t for all t at once, with H_t a decayed sum of outer products, never written down.

    H_t = e^{g_t} H_{t-1} + β_t k_t k_tᵀ        x_t = (H_t + Λ)^{-1} q_t

    q, k, x: (B, T, H, K)    β, g: (B, T, H), g ≤ 0    Λ > 0: (H, K), a diagonal    state: H (B, H, K, K)

H_t p_t is what gated linear attention reads with the query p_t, so a step of conjugate gradients is one call
of `ops.outer`. Gradients do not go through the steps: since H_t + Λ is symmetric, that of q_t is w_t, the
solution for the gradient of x_t, and that of H_t is -w_t x_tᵀ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from riverrun import ops

SMALL = 1e-30  # the square of a residual that is nothing but rounding, even in float64


def times(p: Tensor, k: Tensor, write: Tensor, g: Tensor, ridge: Tensor, state: Any, reset: Tensor | None):
    """(H_t + Λ) p_t and the last H; `write` is β k."""
    y, last = ops.outer(p, write, k, g, state=state, reset=reset)
    return y + ridge * p, last


def conjugate_gradients(q: Tensor, iterations: int, *system: Any) -> Tensor:
    x, r, p = torch.zeros_like(q), q, q
    size = q.square().sum(-1, keepdim=True)
    for _ in range(iterations):
        found, _ = times(p, *system)
        step = size / (p * found).sum(-1, keepdim=True).clamp_min(SMALL)
        x, r = x + step * p, r - step * found
        before, size = size, r.square().sum(-1, keepdim=True)
        p = r + size / before.clamp_min(SMALL) * p
    return x


class _Solution(torch.autograd.Function):
    """x, whose gradient goes to the residual q - (H + Λ) x as (H + Λ)^{-1} of it."""

    @staticmethod
    def forward(ctx, residual, x, iterations, *system):
        ctx.save_for_backward(*system)
        ctx.iterations = iterations
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        system = ctx.saved_tensors
        return conjugate_gradients(dx, ctx.iterations, *system), None, None, *[None] * len(system)


def solve(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    g: Tensor,
    ridge: Tensor,
    iterations: int,
    state: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (B, T, H, K), and H after the last step. Exact from K iterations on, but for rounding."""
    system = k, beta[..., None] * k, g, ridge, state, reset
    with torch.no_grad():
        x = conjugate_gradients(q, iterations, *system)
    product, last = times(x, *system)
    return _Solution.apply(q - product, x, iterations, *system), last
