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
    x, z, w, y, R, N, eps, M: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr
):
    """Grid (blocks of ROWS rows, M groups)."""
    row, c = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, C)
    group = tl.program_id(1)
    at, inside = (row[:, None] * M + group) * N + c[None, :], (row < R)[:, None] & (c < N)[None, :]
    x_ = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    z_ = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
    n, _, gate, _ = _inner(x_, z_, N, eps, BEFORE)
    n *= tl.load(w + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, (n if BEFORE else n * gate).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x, z, w, dy, dx, dz, dw, R, N, eps, LENGTH,
    M: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BEFORE: tl.constexpr,
):  # fmt: skip
    """Grid (stretches of LENGTH rows, M groups). dw has a row for each stretch."""
    part, group, c = tl.program_id(0), tl.program_id(1), tl.arange(0, C)
    w_ = tl.load(w + group * N + c, mask=c < N, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, C], tl.float32)
    for r0 in range(part * LENGTH, tl.minimum(R, (part + 1) * LENGTH), ROWS):
        row = r0 + tl.arange(0, ROWS)
        at = (row.to(tl.int64)[:, None] * M + group) * N + c[None, :]
        inside = (row < R)[:, None] & (c < N)[None, :]
        x_ = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        z_ = tl.load(z + at, mask=inside, other=0.0).to(tl.float32)
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


@torch.library.custom_op("riverrun::gated_norm_gpu", mutates_args=(), device_types=DEVICE)
def _norm(x: Tensor, z: Tensor, w: Tensor, eps: float, before: bool) -> Tensor:
    y, tile = torch.empty_like(x), _tile(x, before)
    grid = (triton.cdiv(x.shape[0], tile["ROWS"]), x.shape[1])
    _forward[grid](x, z, w, y, x.shape[0], x.shape[2], eps, **tile)
    return y


@torch.library.custom_op("riverrun::gated_norm_gpu_backward", mutates_args=(), device_types=DEVICE)
def _norm_backward(
    x: Tensor, z: Tensor, w: Tensor, dy: Tensor, eps: float, before: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (R, M, N), tile = x.shape, _tile(x, before)
    parts = min(triton.cdiv(R, tile["ROWS"]), max(1, 512 // M))
    length = triton.cdiv(triton.cdiv(R, parts), tile["ROWS"]) * tile["ROWS"]
    parts = triton.cdiv(R, length)
    dx, dz, dw = torch.empty_like(x), torch.empty_like(z), x.new_empty(parts, M, N, dtype=torch.float32)
    _backward[(parts, M)](x, z, w, dy, dx, dz, dw, R, N, eps, length, **tile)
    return dx, dz, dw.sum(0).to(w.dtype)


@_norm.register_fake
def _(x, z, w, eps, before):
    return torch.empty_like(x)


@_norm_backward.register_fake
def _(x, z, w, dy, eps, before):
    return torch.empty_like(x), torch.empty_like(z), torch.empty_like(w)


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
    if group > WIDEST:
        raise ValueError(f"a group of {group} channels; one program holds at most {WIDEST}")
    w = weight.view(-1, group).expand(x.shape[-1] // group, group).contiguous()
    x_, z_ = (v.reshape(-1, *w.shape).contiguous() for v in (x, z))
    return _norm(x_, z_, w, eps, before).view(x.shape)
