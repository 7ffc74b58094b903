"""A few steps of a matrix memory in one launch: decoding. The plain recurrences, a block of values a program.

Nothing is saved for a backward and nothing depends on the host, so a CUDA graph can capture it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launch as kept

FEW = 8  # steps up to which walking one at a time beats chunks


def fits(v: Tensor, save: bool) -> bool:
    """Whether these few steps are to be walked one at a time."""
    return not save and v.shape[1] <= FEW


@triton.jit
def steps(
    q, k, v, a, b, u, beta, g, f, i, reset, S0, n0, m0, y, S1, n1, m1, T,
    H: tl.constexpr, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RULE: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, B·H). RULE is outer, mlstm, delta or dplr; the arguments a rule does not know are
    None."""
    pv, bh = tl.program_id(0), tl.program_id(1)
    batch, h = (bh // H).to(tl.int64), bh % H
    GH: tl.constexpr = H // R
    rows, cols = tl.arange(0, BK), pv * BV + tl.arange(0, BV)
    mk, mv = rows < K, cols < V
    at = (bh.to(tl.int64) * K + rows[:, None]) * V + cols[None, :]
    S = tl.zeros((BK, BV), tl.float32)
    if S0 is not None:
        S = tl.load(S0 + at, mask=mk[:, None] & mv[None, :], other=0.0)
    if RULE == "mlstm":
        norm, top = tl.zeros((BK,), tl.float32), 0.0
        if n0 is not None:
            norm, top = tl.load(n0 + bh * K + rows, mask=mk, other=0.0), tl.load(m0 + bh)
    for t in range(0, T):
        group = ((batch * T + t) * GH + h // R) * K
        head = (batch * T + t) * H + h
        q_ = tl.load(q + group + rows, mask=mk, other=0.0).to(tl.float32)
        k_ = tl.load(k + group + rows, mask=mk, other=0.0).to(tl.float32)
        v_ = tl.load(v + head * V + cols, mask=mv, other=0.0).to(tl.float32)
        if reset is not None:
            keep = 1.0 - tl.load(reset + batch * T + t).to(tl.float32)
            S *= keep
            if RULE == "mlstm":
                norm, top = norm * keep, top * keep
        old = S
        if DECAY == 1:
            S *= tl.exp(tl.load(g + head).to(tl.float32))
        if DECAY == 2:
            S *= tl.exp(tl.load(g + head * K + rows, mask=mk, other=0.0).to(tl.float32))[:, None]
        if RULE == "mlstm":
            kept, new = top + tl.load(f + head).to(tl.float32), tl.load(i + head).to(tl.float32)
            top = tl.maximum(kept, new)
            S, norm, k_ = S * tl.exp(kept - top), norm * tl.exp(kept - top), k_ * tl.exp(new - top)
            norm += k_
        if RULE == "delta":
            v_ = (v_ - tl.sum(S * k_[:, None], 0)) * tl.load(beta + head).to(tl.float32)
        if RULE == "dplr":
            a_ = tl.load(a + head * K + rows, mask=mk, other=0.0).to(tl.float32)
            b_ = tl.load(b + head * K + rows, mask=mk, other=0.0).to(tl.float32)
            S += a_[:, None] * tl.sum(old * b_[:, None], 0)[None, :]
        S += k_[:, None] * v_[None, :]
        if u is not None:
            u_ = tl.load(u + h * K + rows, mask=mk, other=0.0).to(tl.float32)
            out = tl.sum(old * q_[:, None], 0) + tl.sum(q_ * u_ * k_, 0) * v_
        else:
            out = tl.sum(S * q_[:, None], 0)
        if RULE == "mlstm":
            out /= tl.maximum(tl.abs(tl.sum(norm * q_, 0)), tl.exp(-top))
        tl.store(y + head * V + cols, out.to(y.dtype.element_ty), mask=mv)
    tl.store(S1 + at, S, mask=mk[:, None] & mv[None, :])
    if RULE == "mlstm":
        tl.store(n1 + bh * K + rows, norm, mask=mk & (pv == 0))
        tl.store(m1 + bh, top, mask=pv == 0)


def launch(rule, q, k, v, g=None, a=None, b=None, u=None, beta=None, f=None, i=None, state=None, reset=None):
    """(y, S) or for mlstm (y, S, n, m)."""
    B, T, H, V = v.shape
    G, K = q.shape[2:]
    S0, n0, m0 = state if rule == "mlstm" else (state, None, None)
    tensors = [x if x is None else x.contiguous() for x in (q, k, v, a, b, u, beta, g, f, i)]
    flag = None if reset is None else reset.contiguous().view(torch.uint8)
    S0, n0, m0 = (x if x is None else x.float().contiguous() for x in (S0, n0, m0))
    y, S1 = v.new_empty(v.shape), v.new_empty(B, H, K, V, dtype=torch.float32)
    n1 = m1 = None
    if rule == "mlstm":
        n1, m1 = S1.new_empty(B, H, K), S1.new_empty(B, H)
    BK, BV = kept.power_of_2(K), min(32, kept.power_of_2(V))
    decay = 0 if g is None else g.dim() - 2
    args = (*tensors, flag, S0, n0, m0, y, S1, n1, m1, T)
    kept.launch(steps, (kept.cdiv(V, BV), B * H), args, (H, H // G, K, V, BK, BV, rule, decay), 4)
    return (y, S1, n1, m1) if rule == "mlstm" else (y, S1)


def outer(q, k, v, g, u, state, reset):
    return launch("outer", q, k, v, g, u=u, state=state, reset=reset)


def mlstm(q, k, v, f, i, state, reset):
    return launch("mlstm", q, k, v, f=f, i=i, state=state, reset=reset)


def delta(q, k, v, beta, g, state, reset):
    return launch("delta", q, k, v, g, beta=beta, state=state, reset=reset)


def dplr(q, k, v, g, a, b, state, reset):
    return launch("dplr", q, k, v, g, a, b, state=state, reset=reset)
