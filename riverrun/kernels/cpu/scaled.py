"""Every head's row times a number of its own, on a CPU, forward and backward in one pass each.

    y = s x        dx = s dy        ds = Σ x ⊙ dy over the channels of a head

x, y: (..., H, P)    s: (..., H)    Rows of x and dy may be parts of wider ones, from a column on that follows
each of them. PyTorch passes over as many numbers as x has twice as often.
"""

from __future__ import annotations

import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import TASKS, kernel, rows, spread
from .memory import borrowed, dot
from .team import divided


@kernel
def _forward(first, step, x, x0, s, tasks, y):
    if divided(first, step):
        return
    count, heads = s.shape
    P = y.shape[1] // heads
    x, y = borrowed(x), borrowed(y)
    for task in range(first, tasks, step):
        for i in range(task * count // tasks, (task + 1) * count // tasks):
            for h in range(heads):
                lo, factor = h * P, s[i, h]
                row, out = x[i, x0 + lo : x0 + lo + P], y[i, lo : lo + P]
                for p in range(P):
                    out[p] = factor * row[p]


@kernel
def _backward(first, step, x, x0, s, tasks, dy, dy0, dx, ds):
    if divided(first, step):
        return
    count, heads = s.shape
    P = dx.shape[1] // heads
    x, dy, dx = borrowed(x), borrowed(dy), borrowed(dx)
    for task in range(first, tasks, step):
        for i in range(task * count // tasks, (task + 1) * count // tasks):
            for h in range(heads):
                lo, factor = h * P, s[i, h]
                row, g, out = x[i, x0 + lo : x0 + lo + P], dy[i, dy0 + lo : dy0 + lo + P], dx[i, lo : lo + P]
                ds[i, h] = dot(row, g, P)
                for p in range(P):
                    out[p] = factor * g[p]


def _flat(x: Tensor) -> Tensor:
    return x.flatten(0, -3).flatten(1)


def _run(x, s, save):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    given = *rows(x.flatten(-2)), s.flatten(0, -2).contiguous(), TASKS
    spread(_forward, TASKS, x.numel(), *given, _flat(y))
    return (y,)


def _run_backward(x, s, y, dy):
    dx, ds = torch.empty_like(y), torch.empty_like(s, memory_format=torch.contiguous_format)
    given = *rows(x.flatten(-2)), s.flatten(0, -2).contiguous(), TASKS, *rows(dy.flatten(-2))
    spread(_backward, TASKS, x.numel(), *given, _flat(dx), ds.flatten(0, -2))
    return dx, ds


def _fake(x, s, save):
    return (torch.empty_like(x, memory_format=torch.contiguous_format),)


_scaled = define("scaled_cpu", "Tensor x, Tensor s", 1, 0, "cpu", _run, _run_backward, _fake)


def scaled(x: Tensor, s: Tensor) -> Tensor:
    """s x for x (..., H, P) and s (..., H), both of one dtype."""
    return _scaled(x, s)[0]
