"""RMS norm of groups of channels, plain or gated, on a CPU: a row at a time, in the cache, both ways.

    y = w ⊙ norm(x)        w ⊙ norm(x) ⊙ s        w ⊙ norm(x ⊙ s)        s = silu(z)
    norm(u) = u r        r = 1 / sqrt(mean(u²) + eps)        du = r (dn - n mean(dn ⊙ n)) with n = u r

All three are y = w ⊙ norm(x ⊙ inner) ⊙ outer with one of the two gates, or both, equal to one.
x, z, y: (rows, W)    w: (W), in groups of `group` channels    dw is summed over rows in a fixed order.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import TASKS, add_parts, kernel, spread
from .elementary import sigmoid

PLAIN, AFTER, BEFORE = 0, 1, 2  # where the gate stands


@kernel
def _gate(z, gate, slope):
    """silu(z), and its derivative."""
    one = z.dtype.type(1)
    for c in range(z.shape[0]):
        gate[c] = sigmoid(z[c])
    for c in range(z.shape[0]):
        slope[c] = gate[c] * (one + z[c] * (one - gate[c]))
    for c in range(z.shape[0]):
        gate[c] *= z[c]


@kernel
def _dot(a, b):
    total = a.dtype.type(0)
    for c in range(a.shape[0]):
        total += a[c] * b[c]
    return total


@kernel
def _normed(x, inner, n, r, group, eps):
    """n = norm(x ⊙ inner), and r for every channel; x is a row, its groups' sums are taken one by one."""
    for c in range(x.shape[0]):
        n[c] = x[c] * inner[c]
    for lo in range(0, x.shape[0], group):
        u = n[lo : lo + group]
        r[lo : lo + group] = x.dtype.type(1) / np.sqrt(_dot(u, u) / x.dtype.type(group) + eps)
    for c in range(x.shape[0]):
        n[c] *= r[c]


@kernel
def _forward(first, step, x, z, w, eps, group, place, tasks, y):
    """x, z and y are flat; z is empty without a gate."""
    W = w.shape[0]
    rows = x.shape[0] // W
    inner, outer, slope = np.ones(W, x.dtype), np.ones(W, x.dtype), np.empty(W, x.dtype)
    n, r = np.empty(W, x.dtype), np.empty(W, x.dtype)
    for task in range(first, tasks, step):
        for i in range(task * rows // tasks, (task + 1) * rows // tasks):
            here = slice(i * W, i * W + W)
            out = y[here]
            if place != PLAIN:
                _gate(z[here], inner if place == BEFORE else outer, slope)
            _normed(x[here], inner, n, r, group, eps[0])
            for c in range(W):
                out[c] = w[c] * n[c] * outer[c]


@kernel
def _backward(first, step, x, z, w, eps, group, place, tasks, dy, dx, dz, dw):
    """dw (tasks, W) are the parts of the tasks."""
    W = w.shape[0]
    rows, size = x.shape[0] // W, x.dtype.type(group)
    inner, outer, slope = np.ones(W, x.dtype), np.ones(W, x.dtype), np.empty(W, x.dtype)
    n, r, dn, along = (np.empty(W, x.dtype), np.empty(W, x.dtype), np.empty(W, x.dtype), np.empty(W, x.dtype))
    for task in range(first, tasks, step):
        sums = dw[task]
        sums[:] = 0
        for i in range(task * rows // tasks, (task + 1) * rows // tasks):
            here = slice(i * W, i * W + W)
            now, g, out = x[here], dy[here], dx[here]
            if place != PLAIN:
                _gate(z[here], inner if place == BEFORE else outer, slope)
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
                gate = dz[here]
                for c in range(W):
                    gate[c] = dn[c] * now[c] * slope[c]
            elif place == AFTER:
                gate = dz[here]
                for c in range(W):
                    gate[c] = g[c] * w[c] * n[c] * slope[c]


def _flat(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x.reshape(-1)


def _run(place, x, z, w, eps, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    args = _flat(x, x), _flat(z, x), w.flatten(), eps, w.shape[1], place, TASKS, y.view(-1)
    spread(_forward, TASKS, x.numel(), *args)
    return (y,)


def _run_backward(place, x, z, w, eps, y, dy):
    dx, dw = torch.empty_like(y), w.new_empty(TASKS, w.numel())
    dz = None if place == PLAIN else torch.empty_like(y)
    given = _flat(x, x), _flat(z, x), w.flatten(), eps, w.shape[1], place, TASKS, _flat(dy, x)
    spread(_backward, TASKS, x.numel(), *given, dx.view(-1), _flat(dz, x), dw)
    return dx, dz, add_parts(dw).view(w.shape), None


def _fake(x, z, w, eps, save):
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


NORMS = [
    define(
        f"{name}_cpu",
        "Tensor x, Tensor? z, Tensor w, Tensor eps",
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
    x: Tensor, z: Tensor | None, weight: Tensor, group: int, eps: float, before: bool = False
) -> Tensor:
    """x and the gate z: (..., W); weight: (W), or (group) shared by all groups. All of one dtype."""
    place = PLAIN if z is None else BEFORE if before else AFTER
    w = weight.view(-1, group).expand(x.shape[-1] // group, group)
    return NORMS[place](x, z, w, torch.tensor([eps], dtype=x.dtype))[0]
