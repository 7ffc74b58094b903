"""Diagonal-plus-rank-one memory on a GPU, as an operator; the kernels and the plan are in `memory.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import memory, step
from .outer import fake_pairs, fake_state, like
from .plan import Inputs
from .tape import define


def _forward(q, k, v, g, a, b, state, reset, save):
    if step.fits(v, save):
        return *step.dplr(q, k, v, g, a, b, state, reset), *(v.new_empty(0) for _ in range(4))
    x = Inputs("dplr", q, k, v, g, a=a, b=b, state=state, reset=reset)
    made = memory.pairs(x)
    y, S, _, _ = memory.run(x, made)
    return y, S, *((made.A, made.Aa, made.Lk, made.W) if save else [v.new_empty(0) for _ in range(4)])


def _backward(q, k, v, g, a, b, state, reset, y, S, A, Aa, Lk, W, dy, dS):
    x = Inputs("dplr", q, k, v, g, a=a, b=b, state=state, reset=reset, back=True)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    made = memory.pairs(x, (A, Aa, Lk, W))
    d = memory.run_backward(x, made, dy, None, None if dS is None else dS.contiguous(), None)
    return d["q"], d["k"], d["v"], d["g"], d["a"], d["b"], like(d["state"], state), None


def _fake(q, k, v, g, a, b, state, reset, save):
    made = [fake_pairs(v, q, k, a, b) if save else v.new_empty(0) for _ in range(4)]
    return torch.empty_like(v), fake_state(k, v), *made


_dplr = define(
    "dplr_gpu",
    "Tensor q, Tensor k, Tensor v, Tensor g, Tensor a, Tensor b, Tensor? state, Tensor? reset",
    2, 4, _forward, _backward, _fake,
)  # fmt: skip


def dplr(q, k, v, g, a, b, state: Tensor | None = None, reset: Tensor | None = None):
    y, S = _dplr(q, k, v, g, a, b, state, reset)
    return y, S
