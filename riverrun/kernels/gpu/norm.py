"""RMS norm of groups of channels, gated or not, forward and backward in one pass each over x and z; `unit`.

    y = w ⊙ norm(x) ⊙ silu(z)        or, gated `before`,        y = w ⊙ norm(x ⊙ silu(z))
    norm(g) = g r        r = 1 / sqrt(mean(g²) + eps)        dg = r (dn - n mean(dn ⊙ n))    with n = g r

    unit    y = x r    r = 1 / sqrt(Σ x² + eps)        dx = r (dy - y Σ dy ⊙ y)

x, z, y: (rows, groups, group)    w: (groups, group)    Sums in float32; dw is summed over rows in a fixed
order. With a skip (d, u), d: (groups, group), x + d ⊙ u stands for x. What `riverrun.nn.norm.GatedRMSNorm`
computes; eager PyTorch reads and writes x some eight times for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from riverrun.kernels.library import define

from .launch import DEVICE, cdiv, power_of_2

PROGRAMS = 2048  # of the backward pass: what a multiprocessor holds at once, as waits for memory are long
WIDEST = 16384  # channels of one group, which one program holds


@triton.jit
def _inner(x, z, N, eps, GATED: tl.constexpr, BEFORE: tl.constexpr):
    """What is normalised, and the gate with its derivative, which nobody reads unless GATED."""
    gate = tl.sigmoid(z)
    slope = gate * (1.0 + z * (1.0 - gate))
    gate = z * gate
    u = x * gate if GATED and BEFORE else x
    r = 1.0 / tl.sqrt(tl.sum(u * u, 1) / N + eps)
    return u * r[:, None], r[:, None], gate, slope


@triton.jit
def _forward(
    x, z, w, d, u, y, R, N, XS, ZS, US, eps,
    M: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS rows, M groups). XS, ZS, US: from one row of x, z, u to the next."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    group = tl.program_id(1)
    channel, inside = group * N + c[None, :], (row < R)[:, None] & (c < N)[None, :]
    x_ = tl.load(x + row[:, None] * XS + channel, mask=inside, other=0.0).to(tl.float32)
    z_ = x_
    if z is not None:
        z_ = tl.load(z + row[:, None] * ZS + channel, mask=inside, other=0.0).to(tl.float32)
    if d is not None:
        d_ = tl.load(d + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
        x_ += d_ * tl.load(u + row[:, None] * US + channel, mask=inside, other=0.0).to(tl.float32)
    n, _, gate, _ = _inner(x_, z_, N, eps, z is not None, BEFORE)
    n *= tl.load(w + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * (M * N) + channel
    if z is not None and not BEFORE:
        n *= gate
    tl.store(y + at, n.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, z, w, d, u, dy, dx, dz, dw, dd, du, R, N, XS, ZS, US, eps, LENGTH,
    M: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Grid (stretches of LENGTH rows, M groups). dw and dd have a row for each stretch."""
    part, group, c = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
    w_ = tl.load(w + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    total, total_d = tl.zeros([ROWS, C], tl.float32), tl.zeros([ROWS, C], tl.float32)
    if d is not None:
        d_ = tl.load(d + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    for r0 in range(part * LENGTH, tl.minimum(R, (part + 1) * LENGTH), ROWS):
        row, channel = (r0 + tl.arange(0, ROWS)).to(tl.int64), group * N + c[None, :]
        at = row[:, None] * (M * N) + channel
        inside = (row < R)[:, None] & (c < N)[None, :]
        x_ = tl.load(x + row[:, None] * XS + channel, mask=inside, other=0.0).to(tl.float32)
        z_ = x_
        if z is not None:
            z_ = tl.load(z + row[:, None] * ZS + channel, mask=inside, other=0.0).to(tl.float32)
        dy_ = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        if d is not None:
            u_ = tl.load(u + row[:, None] * US + channel, mask=inside, other=0.0).to(tl.float32)
            x_ += d_ * u_
        n, r, gate, slope = _inner(x_, z_, N, eps, z is not None, BEFORE)
        gated = dy_ if z is None or BEFORE else dy_ * gate
        total += gated * n
        dn = gated * w_
        dg = r * (dn - n * (tl.sum(dn * n, 1) / N)[:, None])
        dx_, dz_ = dg, dy_ * w_ * n * slope
        if z is not None and BEFORE:
            dx_, dz_ = dg * gate, dg * x_ * slope
        if d is not None:
            total_d += dx_ * u_
            tl.store(du + at, (dx_ * d_).to(du.dtype.element_ty), mask=inside)
        tl.store(dx + at, dx_.to(dx.dtype.element_ty), mask=inside)
        if z is not None:
            tl.store(dz + at, dz_.to(dz.dtype.element_ty), mask=inside)
    tl.store(dw + (part * M + group) * N + c, tl.sum(total, 0), mask=c < N)
    if d is not None:
        tl.store(dd + (part * M + group) * N + c, tl.sum(total_d, 0), mask=c < N)


def _tile(x: Tensor, group: int, before: bool) -> dict:
    M, C = x.shape[-1] // group, power_of_2(group)
    rows = max(1, min(1024 // C, power_of_2(x.numel() // x.shape[-1])))
    return {"M": M, "ROWS": rows, "C": C, "BEFORE": before, "num_warps": max(1, min(16, C * rows // 256))}


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor, width: int) -> Tensor:
    """(rows, width), a view if a row lies in one piece: a gate is often a part of a wider tensor."""
    rows = x.reshape(-1, width)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _given(x, z, w, d, u, group):
    """x, z, w, d and u as kernels take them; from one row of x, z and u to the next."""
    width = x.shape[-1]
    x, z, u = (None if t is None else _rows(t, width) for t in (x, z, u))
    w = w.view(-1, group).expand(width // group, group).contiguous()
    d = None if d is None else d[:, None].expand(-1, width // len(d)).contiguous()
    return (x, z, w, d, u), [0 if t is None else t.stride(0) for t in (x, z, u)]


def _run(x, z, w, d, u, group, eps, before, save):
    y, R, tile = _like(x), x.numel() // x.shape[-1], _tile(x, group, before)
    given, strides = _given(x, z, w, d, u, group)
    _forward[(cdiv(R, tile["ROWS"]), tile["M"])](*given, y, R, group, *strides, eps, **tile)
    return (y,)


def _run_backward(x, z, w, d, u, group, eps, before, dy):
    width, tile = x.shape[-1], _tile(x, group, before)
    R, M, ROWS = x.numel() // width, tile["M"], tile["ROWS"]
    parts = min(cdiv(R, ROWS), max(1, PROGRAMS // M))
    length = cdiv(cdiv(R, parts), ROWS) * ROWS
    parts = cdiv(R, length)
    dx, dz, du = (None if t is None else _like(t) for t in (x, z, u))
    dw, dd = (None if t is None else x.new_empty(parts, width, dtype=torch.float32) for t in (w, d))
    given, strides = _given(x, z, w, d, u, group)
    _backward[(parts, M)](
        *given, dy.contiguous(), dx, dz, dw, dd, du, R, group, *strides, eps, length, **tile
    )  # fmt: skip
    dw = dw.view(-1, len(w)).sum(0).to(w.dtype)
    dd = None if d is None else dd.view(parts, len(d), -1).sum((0, 2)).to(d.dtype)
    return dx, dz, dw, dd, du


_norm = define(
    "gated_norm_gpu",
    "Tensor x, Tensor? z, Tensor w, Tensor? d, Tensor? u, int group, float eps, bool before",
    1, None, DEVICE, _run, _run_backward, lambda x, *others: (_like(x),),
)  # fmt: skip


def gated_rms_norm(
    x: Tensor, z: Tensor | None, weight: Tensor, group: int, eps: float = 1e-6, before: bool = False,
    skip: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """x, z: (..., width); weight: (width), or (group) shared by all groups; y has x's shape and dtype. No z,
    no gate.

    `skip`: (d, u), d (H) and u (..., H, P) with H P = width; x + d ⊙ u stands for x.
    """
    if why := refuses(x, z, group):
        raise ValueError(f"gated_rms_norm: {why}")
    d, u = skip or (None, None)
    return _norm(x, z, weight, d, u, group, eps, before)[0]


@triton.jit
def _unit_forward(x, y, R, H, K, XS, eps, ROWS: tl.constexpr, C: tl.constexpr):
    """Grid (blocks of ROWS heads), R heads in all, H to a row. XS: from one row of x to the next."""
    i, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    inside = (i < R)[:, None] & (c < K)[None, :]
    at = ((i // H) * XS + (i % H) * K)[:, None] + c[None, :]
    x_ = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    n = x_ / tl.sqrt(tl.sum(x_ * x_, 1) + eps)[:, None]
    tl.store(y + i[:, None] * K + c[None, :], n.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unit_backward(x, dy, dx, R, H, K, XS, eps, ROWS: tl.constexpr, C: tl.constexpr):
    i, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    inside = (i < R)[:, None] & (c < K)[None, :]
    at = ((i // H) * XS + (i % H) * K)[:, None] + c[None, :]
    x_ = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    dy_ = tl.load(dy + i[:, None] * K + c[None, :], mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x_ * x_, 1) + eps)[:, None]
    n = x_ * r
    dx_ = r * (dy_ - n * tl.sum(dy_ * n, 1)[:, None])
    tl.store(dx + i[:, None] * K + c[None, :], dx_.to(dx.dtype.element_ty), mask=inside)


def _unit_launch(kernel, x: Tensor, *others: Tensor, eps: float) -> None:
    (H, K), C = x.shape[-2:], power_of_2(x.shape[-1])
    R, given = x.numel() // K, _rows(x, H * K)
    rows = max(1, min(1024 // C, power_of_2(R)))
    warps = max(1, min(16, C * rows // 256))
    kernel[(cdiv(R, rows),)](given, *others, R, H, K, given.stride(0), eps, rows, C, num_warps=warps)


def _run_unit(x, eps, save):
    y = _like(x)
    _unit_launch(_unit_forward, x, y, eps=eps)
    return (y,)


def _run_unit_backward(x, eps, dy):
    dx = _like(x)
    _unit_launch(_unit_backward, x, dy.contiguous(), dx, eps=eps)
    return (dx,)


_unit = define(
    "unit_gpu", "Tensor x, float eps", 1, None, DEVICE,
    _run_unit, _run_unit_backward, lambda x, *others: (_like(x),),
)  # fmt: skip


def unit(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last axis of x (..., H, K)."""
    if why := refuses(x, x, x.shape[-1]):
        raise ValueError(f"unit: {why}")
    return _unit(x, eps)[0]


def refuses(x: Tensor, z: Tensor | None, group: int) -> str | None:
    """Why the kernel cannot take x and z, or None."""
    if x.device.type != DEVICE:
        return f"it runs on {DEVICE}, x is on {x.device.type}"
    if any(t is not None and t.dtype == torch.float64 for t in (x, z)):
        return "it computes in float32, and an argument is float64"
    return f"a group of {group} channels is more than the {WIDEST} of one program" if group > WIDEST else None
