"""RMS norm of groups of channels with a gate, forward and backward in one pass each over x and z.

    y = w ⊙ norm(x) ⊙ silu(z)        or, gated `before`,        y = w ⊙ norm(x ⊙ silu(z))
    norm(u) = u r        r = 1 / sqrt(mean(u²) + eps)        du = r (dn - n mean(dn ⊙ n))    with n = u r

x, z, y: (rows, groups, group)    w: (groups, group)    Sums in float32; dw is summed over rows in a fixed
order. What `riverrun.nn.norm.GatedRMSNorm` computes; eager PyTorch reads and writes x some eight times for
it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import DEVICE

WIDEST = 16384  # channels of one group, which one program holds


@triton.jit
def _inner(x, z, N, eps, BEFORE: tl.constexpr):
    """What is normalised, and the gate with its derivative."""
    gate = tl.sigmoid(z)
    slope = gate * (1.0 + z * (1.0 - gate))
    gate = z * gate
    u = x * gate if BEFORE else x
    r = 1.0 / tl.sqrt(tl.sum(u * u, 1) / N + eps)
    return u * r[:, None], r[:, None], gate, slope


@triton.jit
def _forward(
    x, z, w, y, R, N, XS, ZS, eps,
    M: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of ROWS rows, M groups). XS, ZS: from one row of x, z to the next."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    group = tl.program_id(1)
    channel, inside = group * N + c[None, :], (row < R)[:, None] & (c < N)[None, :]
    x_ = tl.load(x + row[:, None] * XS + channel, mask=inside, other=0.0).to(tl.float32)
    z_ = tl.load(z + row[:, None] * ZS + channel, mask=inside, other=0.0).to(tl.float32)
    n, _, gate, _ = _inner(x_, z_, N, eps, BEFORE)
    n *= tl.load(w + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    at = row[:, None] * (M * N) + channel
    tl.store(y + at, (n if BEFORE else n * gate).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, z, w, dy, dx, dz, dw, R, N, XS, ZS, eps, LENGTH,
    M: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Grid (stretches of LENGTH rows, M groups). dw has a row for each stretch."""
    part, group, c = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
    w_ = tl.load(w + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, C], tl.float32)
    for r0 in range(part * LENGTH, tl.minimum(R, (part + 1) * LENGTH), ROWS):
        row, channel = (r0 + tl.arange(0, ROWS)).to(tl.int64), group * N + c[None, :]
        at = row[:, None] * (M * N) + channel
        inside = (row < R)[:, None] & (c < N)[None, :]
        x_ = tl.load(x + row[:, None] * XS + channel, mask=inside, other=0.0).to(tl.float32)
        z_ = tl.load(z + row[:, None] * ZS + channel, mask=inside, other=0.0).to(tl.float32)
        dy_ = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        n, r, gate, slope = _inner(x_, z_, N, eps, BEFORE)
        gated = dy_ if BEFORE else dy_ * gate
        total += gated * n
        dn = gated * w_
        du = r * (dn - n * (tl.sum(dn * n, 1) / N)[:, None])
        if BEFORE:
            dx_, dz_ = du * gate, du * x_ * slope
        else:
            dx_, dz_ = du, dy_ * w_ * n * slope
        tl.store(dx + at, dx_.to(dx.dtype.element_ty), mask=inside)
        tl.store(dz + at, dz_.to(dz.dtype.element_ty), mask=inside)
    tl.store(dw + (part * M + group) * N + c, tl.sum(total, 0), mask=c < N)


def _tile(x: Tensor, before: bool) -> dict:
    C = triton.next_power_of_2(x.shape[2])
    rows = max(1, min(1024 // C, triton.next_power_of_2(x.shape[0])))
    return {
        "M": x.shape[1],
        "ROWS": rows,
        "C": C,
        "BEFORE": before,
        "num_warps": max(1, min(16, C * rows // 256)),
    }


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rows(x: Tensor, groups: int, group: int) -> Tensor:
    """(rows, groups, group), a view if a row lies in one piece: a gate is often a part of a wider tensor."""
    rows = x.reshape(-1, groups * group)
    return (rows if rows.stride(1) == 1 else rows.contiguous()).view(-1, groups, group)


@torch.library.custom_op("riverrun::gated_norm_gpu", mutates_args=(), device_types=DEVICE)
def _norm(x: Tensor, z: Tensor, w: Tensor, eps: float, before: bool) -> Tensor:
    y, tile = _like(x), _tile(x, before)
    grid = (triton.cdiv(x.shape[0], tile["ROWS"]), x.shape[1])
    _forward[grid](x, z, w, y, x.shape[0], x.shape[2], x.stride(0), z.stride(0), eps, **tile)
    return y


@torch.library.custom_op("riverrun::gated_norm_gpu_backward", mutates_args=(), device_types=DEVICE)
def _norm_backward(
    x: Tensor, z: Tensor, w: Tensor, dy: Tensor, eps: float, before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (R, M, N), tile = x.shape, _tile(x, before)
    parts = min(triton.cdiv(R, tile["ROWS"]), max(1, 512 // M))
    length = triton.cdiv(triton.cdiv(R, parts), tile["ROWS"]) * tile["ROWS"]
    parts = triton.cdiv(R, length)
    dx, dz, dw = _like(x), _like(z), x.new_empty(parts, M, N, dtype=torch.float32)
    _backward[(parts, M)](x, z, w, dy, dx, dz, dw, R, N, x.stride(0), z.stride(0), eps, length, **tile)
    return dx, dz, dw.sum(0).to(w.dtype)


@_norm.register_fake
def _(x, z, w, eps, before):
    return _like(x)


@_norm_backward.register_fake
def _(x, z, w, dy, eps, before):
    return _like(x), _like(z), torch.empty_like(w)


def _setup(ctx, inputs, output):
    x, z, w, ctx.eps, ctx.before = inputs
    ctx.save_for_backward(x, z, w)


def _gradients(ctx, dy):
    return *_norm_backward(*ctx.saved_tensors, dy.contiguous(), ctx.eps, ctx.before), None, None


_norm.register_autograd(_gradients, setup_context=_setup)


def gated_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, group: int, eps: float = 1e-6, before: bool = False
) -> Tensor:
    """x, z: (..., width); weight: (width), or (group) shared by all groups; y has x's shape and dtype."""
    if why := refuses(x, z, group):
        raise ValueError(f"gated_rms_norm: {why}")
    w = weight.view(-1, group).expand(x.shape[-1] // group, group).contiguous()
    return _norm(_rows(x, *w.shape), _rows(z, *w.shape), w, eps, before).view(x.shape)


def refuses(x: Tensor, z: Tensor, group: int) -> str | None:
    """Why the kernel cannot take x and z, or None."""
    if x.device.type != DEVICE:
        return f"it runs on {DEVICE}, x is on {x.device.type}"
    if torch.float64 in (x.dtype, z.dtype):
        return "it computes in float32, and an argument is float64"
    return f"a group of {group} channels is more than the {WIDEST} of one program" if group > WIDEST else None
