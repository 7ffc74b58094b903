"""Layer norm of every head by itself, with RWKV-7's bonus and a gate, forward and backward in one pass each.

    n = (x - mean x) s, s = 1 / sqrt(mean (x - mean x)² + eps)        over the channels of a head
    y = (w ⊙ n + b + (Σ r ⊙ k ⊙ ρ) v) ⊙ gate        b, gate and all of the bonus (r, k, v, ρ) may be absent

    dx = s (dn - mean dn - n mean (dn ⊙ n)),  dn = w ⊙ dz,  dz = dy ⊙ gate

x, r, k, v: (..., H, P)    gate, y: (..., H·P)    w, b: (H·P)    ρ: (H, P)
Computed in float32; gradients of w, b and ρ are summed over rows in a fixed order. What
`riverrun.nn.norm.HeadNorm` computes.
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
WIDEST = 4096  # channels of one head, which one program holds


@triton.jit
def _parts(x, w, b, r, k, v, rho, at, c, inside, P, eps):
    """n, s and what is gated, with the bonus's r, k, v, ρ and Σ r k ρ where there is one."""
    x_ = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    x_ = tl.where(inside, x_ - (tl.sum(x_, 1) / P)[:, None], 0.0)
    s = 1.0 / tl.sqrt(tl.sum(x_ * x_, 1) / P + eps)[:, None]
    n = x_ * s
    w_ = tl.load(w + c, mask=inside, other=0.0).to(tl.float32)
    z = n * w_
    if b is not None:
        z += tl.load(b + c, mask=inside, other=0.0).to(tl.float32)
    r_, k_, v_, rho_, weight = n, n, n, n, s
    if r is not None:
        r_ = tl.load(r + at, mask=inside, other=0.0).to(tl.float32)
        k_ = tl.load(k + at, mask=inside, other=0.0).to(tl.float32)
        v_ = tl.load(v + at, mask=inside, other=0.0).to(tl.float32)
        rho_ = tl.load(rho + c, mask=inside, other=0.0).to(tl.float32)
        weight = tl.sum(r_ * k_ * rho_, 1)[:, None]
        z += weight * v_
    return n, s, w_, z, r_, k_, v_, rho_, weight


@triton.jit
def _forward(
    x, w, b, gate, r, k, v, rho, y, R, H, P, eps, ROWS: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Grid (blocks of ROWS heads), R heads in all."""
    i, j = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None], tl.arange(0, C)[None, :]
    inside, at = (i < R) & (j < P), i * P + j
    _, _, _, z, _, _, _, _, _ = _parts(x, w, b, r, k, v, rho, at, i % H * P + j, inside, P, eps)
    if gate is not None:
        z *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, w, b, gate, r, k, v, rho, dy, dx, dgate, dr, dk, dv, dw, db, drho, R, H, P, eps, LENGTH,
    ROWS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Grid (stretches of LENGTH of R rows, H). dw, db and dρ have a row for each stretch."""
    part, h, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, C)[None, :]
    sum_w, sum_b = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    sum_rho = tl.zeros([ROWS, C], tl.float32)
    end = tl.minimum(R, (part + 1) * LENGTH)
    for n0 in range(part * LENGTH, end, ROWS):
        row = n0 + tl.arange(0, ROWS)[:, None]
        inside, at = (row < end) & (j < P), (row * H + h) * P + j
        n, s, w_, z, r_, k_, v_, rho_, weight = _parts(x, w, b, r, k, v, rho, at, h * P + j, inside, P, eps)
        dz = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            tl.store(dgate + at, (dz * z).to(dgate.dtype.element_ty), mask=inside)
            dz *= tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
        sum_w += dz * n
        if b is not None:
            sum_b += dz
        dn = dz * w_
        mean, along = tl.sum(dn, 1) / P, tl.sum(dn * n, 1) / P
        dx_ = s * (dn - mean[:, None] - n * along[:, None])
        tl.store(dx + at, dx_.to(dx.dtype.element_ty), mask=inside)
        if r is not None:
            tl.store(dv + at, (weight * dz).to(dv.dtype.element_ty), mask=inside)
            both = tl.sum(dz * v_, 1)[:, None]
            tl.store(dr + at, (both * k_ * rho_).to(dr.dtype.element_ty), mask=inside)
            tl.store(dk + at, (both * r_ * rho_).to(dk.dtype.element_ty), mask=inside)
            sum_rho += both * r_ * k_
    to, within = (part * H + h) * P + j, (j < P) & (part >= 0)
    tl.store(dw + to, tl.sum(sum_w, 0)[None, :], mask=within)
    if b is not None:
        tl.store(db + to, tl.sum(sum_b, 0)[None, :], mask=within)
    if r is not None:
        tl.store(drho + to, tl.sum(sum_rho, 0)[None, :], mask=within)


def _tile(P: int, rows: int) -> dict:
    C = power_of_2(P)
    rows = max(1, min(ITEMS // C, power_of_2(rows)))
    return {"ROWS": rows, "C": C, "num_warps": max(1, min(16, rows * C // 256))}


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _flat(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _run(x, w, b, gate, r, k, v, rho, eps, save):
    (y,), (H, P), R = _fake(x), x.shape[-2:], x.numel() // x.shape[-1]
    tile = _tile(P, R)
    _forward[(cdiv(R, tile["ROWS"]),)](*_flat(x, w, b, gate, r, k, v, rho), y, R, H, P, eps, **tile)
    return (y,)


def _run_backward(x, w, b, gate, r, k, v, rho, eps, dy):
    H, P = x.shape[-2:]
    R = x.numel() // (H * P)
    tile = _tile(P, R)
    length = cdiv(cdiv(R * H, PROGRAMS), tile["ROWS"]) * tile["ROWS"]
    parts = cdiv(R, length)
    dx, dgate, dr, dk, dv = (None if t is None else _like(t) for t in (x, gate, r, k, v))
    sums = x.new_empty(3, parts, H * P, dtype=torch.float32)
    dw, db, drho = (None if t is None else s for t, s in zip((w, b, rho), sums, strict=True))
    _backward[(parts, H)](
        *_flat(x, w, b, gate, r, k, v, rho, dy), dx, dgate, dr, dk, dv, dw, db, drho,
        R, H, P, eps, length, **tile,
    )  # fmt: skip
    dw, db, drho = (
        None if t is None else d.sum(0).view(t.shape).to(t.dtype) for t, d in ((w, dw), (b, db), (rho, drho))
    )
    return dx, dw, db, dgate, dr, dk, dv, drho


def _fake(x, *others):
    return (x.new_empty(*x.shape[:-2], x.shape[-2:].numel()),)


_norm = define(
    "head_norm_gpu",
    "Tensor x, Tensor w, Tensor? b, Tensor? gate, Tensor? r, Tensor? k, Tensor? v, Tensor? rho, float eps",
    1, None, DEVICE, _run, _run_backward, _fake,
)  # fmt: skip


def head_norm(
    x: Tensor, w: Tensor, b: Tensor | None, gate: Tensor | None,
    bonus: tuple[Tensor, Tensor, Tensor, Tensor] | None, eps: float,
) -> Tensor:  # fmt: skip
    """y (..., H·P) for x (..., H, P), gate (..., H·P), and (r, k, v, ρ) with r, k, v of x's shape."""
    if why := refuses(x):
        raise ValueError(f"head_norm: {why}")
    return _norm(x, w, b, gate, *(bonus or (None,) * 4), eps)[0]


def refuses(x: Tensor) -> str | None:
    """Why the kernel cannot take x, or None."""
    if x.device.type != DEVICE:
        return f"it runs on {DEVICE}, x is on {x.device.type}"
    if x.dtype == torch.float64:
        return "it computes in float32, and x is float64"
    P = x.shape[-1]
    return f"a head of {P} channels is more than the {WIDEST} of one program" if P > WIDEST else None
