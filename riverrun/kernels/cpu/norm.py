"""RMS norm of groups of channels, plain or gated, on a CPU: a row at a time, in the cache, both ways.

    y = w ⊙ norm(x)        w ⊙ norm(x) ⊙ s        w ⊙ norm(x ⊙ s)        s = silu(z)
    norm(u) = u r        r = 1 / sqrt(mean(u²) + eps)        du = r (dn - n mean(dn ⊙ n)) with n = u r

All three are y = w ⊙ norm(x ⊙ inner) ⊙ outer with one of the two gates, or both, equal to one. With a skip
(d, u), x + d ⊙ u stands for x.
x, z, u, y: (rows, W)    w, d: (W), in groups of `group` channels    Gradients of w and d are summed over rows
in a fixed order. Rows of x, z, u and dy may be parts of wider ones, from a column on that follows each of
them; z is anything where there is no gate, and d empty where there is no skip.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import TASKS, add_parts, kernel, rows, spread
from .elementary import sigmoid, wide
from .memory import expected, soon
from .team import divided

PLAIN, AFTER, BEFORE = 0, 1, 2  # where the gate stands
AHEAD = 2  # rows asked for before they are needed: seven arrays are more than a CPU runs ahead in by itself


@kernel
def _gate(z, gate):
    """silu(z)"""
    wide()
    for c in range(z.shape[0]):
        gate[c] = z[c] * sigmoid(z[c])


@kernel
def _gate_and_slope(z, gate, slope):
    """silu(z), and its derivative."""
    wide()
    one = z.dtype.type(1)
    for c in range(z.shape[0]):
        s = sigmoid(z[c])
        gate[c] = z[c] * s
        slope[c] = s * (one + z[c] * (one - s))


@kernel
def _dot(a, b):
    wide()
    total = a.dtype.type(0)
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@kernel
def _normed(x, inner, n, r, group, eps):
    """n = norm(x ⊙ inner), and r for every channel; x is a row, its groups' sums are taken one by one."""
    wide()
    for c in range(x.shape[0]):
        n[c] = x[c] * inner[c]
    for lo in range(0, x.shape[0], group):
        u = n[lo : lo + group]
        r[lo : lo + group] = x.dtype.type(1) / np.sqrt(_dot(u, u) / x.dtype.type(group) + eps)
    for c in range(x.shape[0]):
        n[c] *= r[c]


@kernel
def _skipped(x, d, u, total):
    """x + d ⊙ u"""
    for c in range(d.shape[0]):
        total[c] = x[c] + d[c] * u[c]
    return total


@kernel
def _forward(first, step, x, x0, z, z0, u, u0, w, d, eps, group, place, tasks, y):
    if divided(first, step):
        return
    wide()
    W, count = w.shape[0], x.shape[0]
    inner, outer, total = np.ones(W, x.dtype), np.ones(W, x.dtype), np.empty(W, x.dtype)
    n, r = np.empty(W, x.dtype), np.empty(W, x.dtype)
    for task in range(first, tasks, step):
        for i in range(task * count // tasks, (task + 1) * count // tasks):
            now, out = x[i, x0 : x0 + W], y[i]
            after = min(i + AHEAD, count - 1)
            soon(x, after, x0, W)
            expected(y, after, 0, W)
            if d.shape[0]:
                soon(u, after, u0, W)
                now = _skipped(now, d, u[i, u0 : u0 + W], total)
            if place != PLAIN:
                soon(z, after, z0, W)
                _gate(z[i, z0 : z0 + W], inner if place == BEFORE else outer)
            _normed(now, inner, n, r, group, eps[0])
            for c in range(W):
                out[c] = w[c] * n[c] * outer[c]


@kernel
def _backward(
    first, step, x, x0, z, z0, u, u0, w, d, eps, group, place, tasks, dy, dy0, dx, dz, du, dw, dd
):  # fmt: skip
    """dw and dd (tasks, W) are the parts of the tasks."""
    if divided(first, step):
        return
    wide()
    W, count, size = w.shape[0], x.shape[0], x.dtype.type(group)
    inner, outer, slope = np.ones(W, x.dtype), np.ones(W, x.dtype), np.empty(W, x.dtype)
    n, r, total = np.empty(W, x.dtype), np.empty(W, x.dtype), np.empty(W, x.dtype)
    dn, along = np.empty(W, x.dtype), np.empty(W, x.dtype)
    for task in range(first, tasks, step):
        sums, skips = dw[task], dd[task]
        sums[:] = 0
        skips[:] = 0
        for i in range(task * count // tasks, (task + 1) * count // tasks):
            now, g, out = x[i, x0 : x0 + W], dy[i, dy0 : dy0 + W], dx[i]
            after = min(i + AHEAD, count - 1)
            soon(x, after, x0, W)
            soon(dy, after, dy0, W)
            expected(dx, after, 0, W)
            if d.shape[0]:
                soon(u, after, u0, W)
                expected(du, after, 0, W)
                now = _skipped(now, d, u[i, u0 : u0 + W], total)
            if place != PLAIN:
                soon(z, after, z0, W)
                expected(dz, after, 0, W)
                _gate_and_slope(z[i, z0 : z0 + W], inner if place == BEFORE else outer, slope)
            _normed(now, inner, n, r, group, eps[0])
            for c in range(W):
                dn[c] = g[c] * outer[c]
            for c in range(W):
                sums[c] += dn[c] * n[c]
            for c in range(W):
                dn[c] *= w[c]
            for lo in range(0, W, group):
                along[lo : lo + group] = _dot(dn[lo : lo + group], n[lo : lo + group]) / size
            for c in range(W):
                dn[c] = r[c] * (dn[c] - n[c] * along[c])
            for c in range(W):
                out[c] = dn[c] * inner[c]
            if place == BEFORE:
                gate = dz[i]
                for c in range(W):
                    gate[c] = dn[c] * now[c] * slope[c]
            elif place == AFTER:
                gate = dz[i]
                for c in range(W):
                    gate[c] = g[c] * w[c] * n[c] * slope[c]
            if d.shape[0]:
                skip, to = u[i, u0 : u0 + W], du[i]
                for c in range(W):
                    skips[c] += out[c] * skip[c]
                for c in range(W):
                    to[c] = out[c] * d[c]


def _given(place, x, z, w, d, u, eps):
    """What both kernels begin with."""
    here = rows(x)
    gate, skip = (here if t is None else rows(t) for t in (z, u))
    d = x.new_empty(0) if d is None else d.contiguous()
    return *here, *gate, *skip, w.flatten(), d, eps, w.shape[1], place, TASKS


def _run(place, x, z, w, d, u, eps, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    spread(_forward, TASKS, x.numel(), *_given(place, x, z, w, d, u, eps), y.view(-1, x.shape[-1]))
    return (y,)


def _run_backward(place, x, z, w, d, u, eps, y, dy):
    dx, dz, du = (None if t is None else torch.empty_like(y) for t in (x, z, u))
    dw, dd = (w.new_empty(TASKS, 0 if t is None else t.numel()) for t in (w, d))
    results = ((dx if t is None else t).view(-1, x.shape[-1]) for t in (dx, dz, du))
    spread(_backward, TASKS, x.numel(), *_given(place, x, z, w, d, u, eps), *rows(dy), *results, dw, dd)
    return dx, dz, add_parts(dw).view(w.shape), None if d is None else add_parts(dd), du, None


def _fake(x, z, w, d, u, eps, save):
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


NORMS = [
    define(
        f"{name}_cpu",
        "Tensor x, Tensor? z, Tensor w, Tensor? d, Tensor? u, Tensor eps",
        1,
        0,
        "cpu",
        partial(_run, place),
        partial(_run_backward, place),
        _fake,
    )
    for place, name in enumerate(("rms_norm", "gated_rms_norm", "rms_norm_of_gated"))
]


def rms_norm(
    x: Tensor,
    z: Tensor | None,
    weight: Tensor,
    group: int,
    eps: float,
    before: bool = False,
    skip: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """x and the gate z: (..., W); weight: (W), or (group) shared by all groups. All of one dtype.

    `skip`: (d, u), d (H) and u (..., H, P) with H P = W; x + d ⊙ u stands for x.
    """
    place = PLAIN if z is None else BEFORE if before else AFTER
    w = weight.view(-1, group).expand(x.shape[-1] // group, group)
    d, u = (
        (None, None) if skip is None else (skip[0].repeat_interleave(skip[1].shape[-1]), skip[1].flatten(-2))
    )
    return NORMS[place](x, z, w, d, u, torch.tensor([eps], dtype=x.dtype))[0]
