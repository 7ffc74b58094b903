"""What RWKV-7's memory removes along and writes, from three projections, forward and backward in one pass.

    a = σ(a')    n = k ⊙ ξ    κ = n r, r = 1 / sqrt(Σ n² + eps)        over the keys of a head
    k' = k ⊙ (1 + (a - 1) ⊙ α)    g = decay σ(w)    e = erase a ⊙ κ

k, w, a', k', g, e, κ: (B, T, H, K)    ξ, α: (H, K)    g is float32, the others have k's dtype. Computed in
float32; dξ and dα are summed over time in a fixed order. What `riverrun.nn.removal` computes; eager PyTorch
reads and writes some 40 tensors of this size for it, and keeps 14.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from .launch import DEVICE, cdiv, power_of_2

ITEMS = 1024  # numbers of a tensor that a program of four warps holds
PROGRAMS = 2048  # of the backward pass


@triton.jit
def _parts(k, w, a, xi, alpha, at, c, inside, K, eps):
    """k, σ(w), σ(a'), ξ, α, κ and r at rows and channels `at`; c are the channels among all heads'."""
    k_ = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
    w_ = tl.sigmoid(tl.load(w + at, mask=inside, other=0.0).to(tl.float32))
    a_ = tl.sigmoid(tl.load(a + at, mask=inside, other=0.0).to(tl.float32))
    xi_ = tl.load(xi + c, mask=inside, other=0.0).to(tl.float32)
    alpha_ = tl.load(alpha + c, mask=inside, other=0.0).to(tl.float32)
    n = k_ * xi_
    r = 1.0 / tl.sqrt(tl.sum(n * n, 1) + eps)[:, None]
    return k_, w_, a_, xi_, alpha_, n * r, r


@triton.jit
def _forward(
    k, w, a, xi, alpha, key, g, e, kappa, R, H, K, decay, erase, eps, ROWS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Grid (blocks of ROWS heads), R = B T H heads in all."""
    i, j = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, C)[None, :]
    inside, at = (i < R) & (j < K), i * K + j
    k_, w_, a_, _, alpha_, kappa_, _ = _parts(k, w, a, xi, alpha, at, i % H * K + j, inside, K, eps)
    tl.store(key + at, (k_ * (1.0 + (a_ - 1.0) * alpha_)).to(key.dtype.element_ty), mask=inside)
    tl.store(g + at, decay * w_, mask=inside)
    tl.store(e + at, (erase * a_ * kappa_).to(e.dtype.element_ty), mask=inside)
    tl.store(kappa + at, kappa_.to(kappa.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    k, w, a, xi, alpha, dkey, dg, de, dkappa, dk, dw, da, dxi, dalpha, R, H, K, decay, erase, eps, LENGTH,
    ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (stretches of LENGTH of R = B T steps, H). dξ and dα have a row for each stretch."""
    part, h, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, C)[None, :]
    sum_xi, sum_alpha = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    end = tl.minimum(R, (part + 1) * LENGTH)
    for n0 in range(part * LENGTH, end, ROWS):
        n = n0 + tl.arange(0, ROWS)[:, None]
        inside, at = (n < end) & (j < K), (n * H + h) * K + j
        k_, w_, a_, xi_, alpha_, kappa_, r = _parts(k, w, a, xi, alpha, at, h * K + j, inside, K, eps)
        dkey_ = tl.load(dkey + at, mask=inside, other=0.0).to(tl.float32)
        dg_ = tl.load(dg + at, mask=inside, other=0.0).to(tl.float32)
        de_ = erase * tl.load(de + at, mask=inside, other=0.0).to(tl.float32)
        dkappa_ = tl.load(dkappa + at, mask=inside, other=0.0).to(tl.float32) + de_ * a_
        dn = r * (dkappa_ - kappa_ * tl.sum(dkappa_ * kappa_, 1)[:, None])
        sum_xi += dn * k_
        sum_alpha += dkey_ * k_ * (a_ - 1.0)
        dk_ = dn * xi_ + dkey_ * (1.0 + (a_ - 1.0) * alpha_)
        da_ = (de_ * kappa_ + dkey_ * k_ * alpha_) * a_ * (1.0 - a_)
        tl.store(dk + at, dk_.to(dk.dtype.element_ty), mask=inside)
        tl.store(da + at, da_.to(da.dtype.element_ty), mask=inside)
        tl.store(dw + at, (decay * dg_ * w_ * (1.0 - w_)).to(dw.dtype.element_ty), mask=inside)
    to, within = (part * H + h) * K + j, (j < K) & (part >= 0)
    tl.store(dxi + to, tl.sum(sum_xi, 0)[None, :], mask=within)
    tl.store(dalpha + to, tl.sum(sum_alpha, 0)[None, :], mask=within)


def _tile(K: int, rows: int) -> dict:
    C = power_of_2(K)
    rows = max(1, min(ITEMS // C, power_of_2(rows)))
    return {"ROWS": rows, "C": C, "num_warps": max(1, min(4, rows * C // 256))}


def _like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _run(k, w, a, xi, alpha, decay, erase, eps, save):
    (H, K), R = k.shape[2:], k.shape[:3].numel()
    results, tile = _fake(k), _tile(K, R)
    inputs = (x.contiguous() for x in (k, w, a, xi, alpha))
    grid = (cdiv(R, tile["ROWS"]),)
    _forward[grid](*inputs, *results, R, H, K, decay, erase, eps, **tile)
    return results


def _run_backward(k, w, a, xi, alpha, decay, erase, eps, *gradients):
    (H, K), R = k.shape[2:], k.shape[:2].numel()
    dk, dw, da, tile = _like(k), _like(w), _like(a), _tile(K, R)
    length = cdiv(cdiv(R * H, PROGRAMS), tile["ROWS"]) * tile["ROWS"]
    parts = cdiv(R, length)
    sums = k.new_empty(2, parts, H, K, dtype=torch.float32)
    inputs = (x.contiguous() for x in (k, w, a, xi, alpha, *gradients))
    _backward[(parts, H)](*inputs, dk, dw, da, *sums, R, H, K, decay, erase, eps, length, **tile)
    return dk, dw, da, *(x.sum(0).to(xi.dtype) for x in sums)


def _fake(k, *others):
    """k', g, e and κ, empty."""
    return _like(k), _like(k, torch.float32), _like(k), _like(k)


_removal = define(
    "removal_gpu",
    "Tensor k, Tensor w, Tensor a, Tensor xi, Tensor alpha, float decay, float erase, float eps",
    4, None, DEVICE, _run, _run_backward, _fake,
)  # fmt: skip


def removal(
    k: Tensor, w: Tensor, a: Tensor, xi: Tensor, alpha: Tensor, decay: float, erase: float, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(k', g, e, κ)."""
    if why := refuses(k, w, a):
        raise ValueError(f"removal: {why}")
    return _removal(k, w, a, xi, alpha, decay, erase, eps)


def refuses(*x: Tensor) -> str | None:
    """Why the kernel cannot take these tensors, or None."""
    if x[0].device.type != DEVICE:
        return f"it runs on {DEVICE}, k is on {x[0].device.type}"
    if any(v.dtype == torch.float64 for v in x):
        return "it computes in float32, and an argument is float64"
    return None
