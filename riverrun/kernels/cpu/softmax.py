"""Softmax attention as a recurrence on a CPU: weights for all times first, then one sweep with V across
vector lanes.

The weights u = e^{m' - m} (of the past) and w = e^{s - m} (of the new value) need only s; what is left is the
diagonal recurrences c = u c + w and a = u a + w v, and backward the same in reverse. y does not depend on the
maximum m, so only the gradient of the final state reaches it, and goes to the largest score.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import add_parts, block_size, kernel, same_dtype, spread
from .elementary import exp
from .team import divided

BLOCK = 128  # values a task at most


@kernel
def _weights(first, step, s, m, c, reset, u, w, ms, cs):
    """m, c (B, H) enter as the first state and leave as the last; ms and cs hold them after every step."""
    if divided(first, step):
        return
    batch, T, H = s.shape
    for i in range(first, batch, step):
        for t in range(T):
            if reset.shape[0] and reset[i, t]:
                for h in range(H):
                    m[i, h] = -np.inf
                    c[i, h] = 0
            for h in range(H):
                top = max(m[i, h], s[i, t, h])
                u[i, t, h] = exp(m[i, h] - top)
                w[i, t, h] = exp(s[i, t, h] - top)
                c[i, h] = u[i, t, h] * c[i, h] + w[i, t, h]
                m[i, h] = top
                ms[i, t, h] = top
                cs[i, t, h] = c[i, h]


@kernel
def _forward(first, step, v, u, w, cs, a, y, size):
    """a (B, H, V) enters as the first state and leaves as the last; a reset is u = 0."""
    if divided(first, step):
        return
    batch, T, H, V = v.shape
    blocks = (V + size - 1) // size
    for task in range(first, batch * H * blocks, step):
        i, h, lo = task // (H * blocks), task // blocks % H, task % blocks * size
        hi = min(lo + size, V)
        for t in range(T):
            kept, new, total = u[i, t, h], w[i, t, h], cs[i, t, h]
            for d in range(lo, hi):
                a[i, h, d] = kept * a[i, h, d] + new * v[i, t, h, d]
                y[i, t, h, d] = a[i, h, d] / total


@kernel
def _backward(first, step, v, u, w, cs, y, dy, dc, da, dv, ds, size):
    """dc (blocks, B, H) and da (B, H, V) enter as the gradient of the last state, all of dc in its first
    part, and leave as that of the first. ds (blocks, B, T, H) are the parts of one block of values."""
    if divided(first, step):
        return
    batch, T, H, V = v.shape
    blocks = (V + size - 1) // size
    for task in range(first, batch * H * blocks, step):
        i, h, block = task // (H * blocks), task // blocks % H, task % blocks
        lo = block * size
        hi = min(lo + size, V)
        for t in range(T - 1, -1, -1):
            kept, new, total = u[i, t, h], w[i, t, h], cs[i, t, h]
            through_y = through_a = 0 * new
            for d in range(lo, hi):
                through_y += dy[i, t, h, d] * y[i, t, h, d]
                da[i, h, d] += dy[i, t, h, d] / total
                through_a += da[i, h, d] * v[i, t, h, d]
                dv[i, t, h, d] = new * da[i, h, d]
                da[i, h, d] *= kept
            dc[block, i, h] -= through_y / total
            ds[block, i, t, h] = new * (dc[block, i, h] + through_a)
            dc[block, i, h] *= kept


@kernel
def _maximum_backward(first, step, s, m0, ms, reset, dm, ds):
    """Hand dm (B, H), the gradient of the last maximum, to the largest score; what reaches the first state
    stays in dm."""
    if divided(first, step):
        return
    batch, T, H = s.shape
    for i in range(first, batch, step):
        for h in range(H):
            for t in range(T - 1, -1, -1):
                cut = reset.shape[0] > 0 and reset[i, t]
                before = -np.inf if cut else (ms[i, t - 1, h] if t else m0[i, h])
                if s[i, t, h] >= before:  # equals share it, as torch.maximum has it
                    share = dm[i, h] / 2 if s[i, t, h] == before else dm[i, h]
                    ds[i, t, h] += share
                    dm[i, h] -= share
                if cut:
                    dm[i, h] = 0


def _start(v: Tensor, state: tuple[Tensor | None, ...]) -> list[Tensor]:
    """The state before the first step, in memory of its own."""
    if state[0] is not None:
        return [x.clone(memory_format=torch.contiguous_format) for x in state]
    batch, _, H, V = v.shape
    return [v.new_full((batch, H), -torch.inf), v.new_zeros(batch, H), v.new_zeros(batch, H, V)]


def _run(s, v, m, c, a, reset, save):
    s, v, reset = (x if x is None else x.contiguous() for x in (s, v, reset))
    m, c, a = _start(v, (m, c, a))
    u, w, ms, cs = (torch.empty_like(s) for _ in range(4))
    y = torch.empty_like(v)
    spread(_weights, s.shape[0], s.numel(), s, m, c, reset, u, w, ms, cs)
    size = block_size(v.shape[3], v.shape[0] * v.shape[2], BLOCK)
    tasks = v.shape[0] * v.shape[2] * -(-v.shape[3] // size)
    spread(_forward, tasks, v.numel(), v, u, w, cs, a, y, size)
    return y, m, c, a, u, w, ms, cs


def _run_backward(s, v, m0, c0, a0, reset, y, m, c, a, u, w, ms, cs, dy, dm, dc, da):
    s, v, reset = (x if x is None else x.contiguous() for x in (s, v, reset))
    size = block_size(v.shape[3], v.shape[0] * v.shape[2], BLOCK)
    blocks = -(-v.shape[3] // size)
    dy = torch.zeros_like(v) if dy is None else dy.contiguous()
    # the final state's own gradient at its maximum: c and a fall as e^-m
    dm = torch.zeros_like(m) if dm is None else dm.clone(memory_format=torch.contiguous_format)
    dcs = v.new_zeros(blocks, *c.shape)
    if dc is not None:
        dm -= dc * c
        dcs[0] = dc
    if da is not None:
        dm -= (da * a).sum(-1)
    da = torch.zeros_like(a) if da is None else da.clone(memory_format=torch.contiguous_format)
    dv, parts = torch.empty_like(v), s.new_empty(blocks, *s.shape)
    tasks = blocks * v.shape[0] * v.shape[2]
    spread(_backward, tasks, v.numel(), v, u, w, cs, y, dy, dcs, da, dv, parts, size)
    ds = add_parts(parts)
    first = _start(v, (m0, c0, a0))
    spread(_maximum_backward, s.shape[0], s.numel(), s, first[0], ms, reset, dm, ds)
    if m0 is None:
        return ds, dv, None, None, None, None
    dc = add_parts(dcs)
    return ds, dv, dm + dc * c0 + (da * a0).sum(-1), dc, da, None


def _fake(s, v, m, c, a, reset, save):
    state = [x.new_empty(x[:, 0].shape) for x in (s, s, v)]
    return v.new_empty(v.shape), *state, *(s.new_empty(s.shape) for _ in range(4))


_softmax = define(
    "softmax_cpu",
    "Tensor s, Tensor v, Tensor? m, Tensor? c, Tensor? a, Tensor? reset",
    4,
    4,
    "cpu",
    _run,
    _run_backward,
    _fake,
)


def softmax(
    s: Tensor, v: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None, reset: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    y, m, c, a = _softmax(*same_dtype(s, v, *(state or (None, None, None))), reset)
    return y, (m, c, a)
