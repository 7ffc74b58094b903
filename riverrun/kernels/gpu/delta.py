"""Delta-rule memory on a GPU, as an operator; the kernels and the plan are in `memory.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from . import memory, step
from .outer import fake_pairs, fake_state, like
from .plan import Inputs
from .tape import define


def _forward(q, k, v, beta, g, state, reset, save):
    if step.fits(v, save):
        return *step.delta(q, k, v, beta, g, state, reset), v.new_empty(0), v.new_empty(0)
    x = Inputs("delta", q, k, v, g, beta, state=state, reset=reset)
    made = memory.pairs(x)
    y, S, _, _ = memory.run(x, made)
    return y, S, *((made.A, made.W) if save else (v.new_empty(0), v.new_empty(0)))


def _backward(q, k, v, beta, g, state, reset, y, S, A, W, dy, dS):
    x = Inputs("delta", q, k, v, g, beta, state=state, reset=reset, back=True)
    dy = torch.zeros_like(y) if dy is None else dy.contiguous()
    made = memory.pairs(x, (A, None, None, W))
    d = memory.run_backward(x, made, dy, None, None if dS is None else dS.contiguous(), None)
    return d["q"], d["k"], d["v"], d["weight"], d["g"], like(d["state"], state), None


def _fake(q, k, v, beta, g, state, reset, save):
    made = [fake_pairs(v, q, k) if save else v.new_empty(0) for _ in range(2)]
    return torch.empty_like(v), fake_state(k, v), *made


_delta = define(
    "delta_gpu", "Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor? state, Tensor? reset",
    2, 2, _forward, _backward, _fake,
)  # fmt: skip


def delta(q, k, v, beta, g=None, state: Tensor | None = None, reset: Tensor | None = None):
    y, S = _delta(q, k, v, beta, g, state, reset)
    return y, S
