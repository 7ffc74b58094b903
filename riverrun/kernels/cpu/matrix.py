"""The matrix memories outer, delta, dplr and mlstm on a CPU: which kernel runs, on what, in what tasks."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from . import by_head, by_key, short
from .block import DELTA, DPLR, OUTER
from .blocks import SMALL
from .gemm import SIDE as C
from .memory import SEGMENT
from .normaliser import Back, Norm
from .threads import array, in_threads

TASKS = 4  # wanted at the least; a part of the columns repeats what columns share, so parts cost
WIDEST = 80  # value columns of a task
GROUP = 8  # heads a task at most


def _columns(B: int, H: int, V: int) -> int:
    """Value columns a task: as many as fit well, fewer where there would be fewer than TASKS tasks."""
    parts = max(math.ceil(V / WIDEST), min(math.ceil(TASKS / (B * H)), math.ceil(V / C)))
    return math.ceil(V / parts / C) * C


def _heads(B: int, H: int, parts: int) -> int:
    """Heads a task: neighbours in memory, so as many as leave every thread the same. Each is computed as if
    alone, so that results do not depend on it."""
    threads = torch.get_num_threads()
    return max(
        (n for n in range(1, min(H, GROUP) + 1) if H % n == 0 and B * parts * H // n % threads == 0),
        default=1,
    )


def _arrays(q, k, v, g, beta, u, a, b, reset):
    """Every input as an array, the absent ones of width 0."""
    q, k, v = (array(x.contiguous()) for x in (q, k, v))
    none = np.empty((*v.shape[:3], 0), v.dtype)
    return (
        q,
        k,
        v,
        none if g is None else array(g.contiguous()).reshape(*v.shape[:3], -1),
        none if beta is None else array(beta.contiguous()).reshape(*v.shape[:3], 1),
        none[0, 0] if u is None else array(u.contiguous()),
        none if a is None else array(a.contiguous()),
        none if b is None else array(b.contiguous()),
        np.empty((v.shape[0], 0), np.bool_) if reset is None else array(reset.contiguous()),
    )


def _kernel(q, k, v, g, beta, u, a, b, reset):
    """The module whose kernels take these arrays, and the arguments with which they begin."""
    if g.shape[3] < 2 and u.shape[1] == 0 and a.shape[3] == 0:
        return by_head, (), (q, k, v, g, beta, reset)
    mode = DELTA if beta.shape[3] else DPLR if a.shape[3] else OUTER
    return by_key, (mode,), (q, k, v, g, beta, u, a, b, reset)


def _mode(beta, a) -> int:
    return DELTA if beta is not None else DPLR if a is not None else OUTER


def _run(q, k, v, g, beta, u, a, b, state, reset, save):
    (B, T, H, V), K = v.shape, k.shape[3]
    y, inputs = torch.empty(v.shape, dtype=v.dtype), _arrays(q, k, v, g, beta, u, a, b, reset)
    if T <= short.STEPS:
        before = v.new_zeros(B, H, K, V) if state is None else state.contiguous()
        S = torch.empty(B, H, K, V, dtype=v.dtype)
        tasks = B * H if S.numel() * T > SMALL else 1
        in_threads(short.forward, tasks, _mode(beta, a), *inputs, array(before), array(S), array(y))
        return y, S, before.clone() if save else v.new_empty(B, 0, K, V)
    S = v.new_zeros(B, H, K, V) if state is None else state.clone(memory_format=torch.contiguous_format)
    saved = v.new_empty(B, H * -(-T // SEGMENT) if save else 0, K, V)
    share = _columns(B, H, V)
    group = _heads(B, H, -(-V // share))
    module, mode, given = _kernel(*inputs)
    tasks = B * (H // group) * -(-V // share)
    in_threads(module.forward, tasks, *mode, share, group, *given, *(array(x) for x in (S, y, saved)))
    return y, S, saved


def _run_backward(q, k, v, g, beta, u, a, b, state, reset, y, S, saved, dy, dS):
    (B, T, H, V), K = v.shape, k.shape[3]
    share = _columns(B, H, V)
    dy = v.new_zeros(v.shape) if dy is None else dy.contiguous()
    dS = v.new_zeros(B, H, K, V) if dS is None else dS.clone(memory_format=torch.contiguous_format)
    inputs = _arrays(q, k, v, g, beta, u, a, b, reset)
    parts = -(-V // share)
    dv = v.new_empty(v.shape)
    dq, dk = (v.new_empty(parts * B, T, H, K) for _ in range(2))
    dg, dbeta, da, db = (v.new_empty(parts * B, T, H, inputs[i].shape[3]) for i in (3, 4, 6, 7))
    du = v.new_zeros(parts * B, *inputs[5].shape)
    arrays = [array(x) for x in (saved, dy, dS, dq, dk, dv, dg, dbeta, du, da, db)]
    group = _heads(B, H, parts)
    module, mode, given = _kernel(*inputs)
    results = arrays if mode else arrays[:-3]  # by_head knows no u, a, b
    in_threads(module.backward, B * (H // group) * parts, *mode, share, group, *given, *results)
    return (
        _grouped(_sum(dq, parts), q.shape[2]),
        _grouped(_sum(dk, parts), k.shape[2]),
        dv,
        None if g is None else _sum(dg, parts).view(g.shape),
        None if beta is None else _sum(dbeta, parts).view(beta.shape),
        None if u is None else du.sum(0),
        None if a is None else _sum(da, parts),
        None if b is None else _sum(db, parts),
        None if state is None else dS,
        None,
    )


def _sum(x: Tensor, parts: int) -> Tensor:
    """Over the blocks of columns, which stand in front of the batch."""
    return x if parts == 1 else x.unflatten(0, (parts, -1)).sum(0)


def _grouped(x: Tensor, groups: int) -> Tensor:
    """Gradients of q or k, summed over the heads that share a group."""
    return x if x.shape[2] == groups else x.unflatten(2, (groups, -1)).sum(3)


def _fake(q, k, v, g, beta, u, a, b, state, reset, save):
    (B, T, H, V), K = v.shape, k.shape[3]
    segments = (T + SEGMENT - 1) // SEGMENT if save else 0
    return v.new_empty(v.shape), v.new_empty(B, H, K, V), v.new_empty(B, H * segments, K, V)


_matrix = define(
    "matrix_cpu",
    "Tensor q, Tensor k, Tensor v, Tensor? g, Tensor? beta, Tensor? u, Tensor? a, Tensor? b, "
    "Tensor? state, Tensor? reset",
    2,
    1,
    "cpu",
    _run,
    _run_backward,
    _fake,
)


def outer(q, k, v, g=None, u=None, state: Tensor | None = None, reset: Tensor | None = None):
    return _matrix(q, k, v, g, None, u, None, None, state, reset)


def delta(q, k, v, beta, g=None, state: Tensor | None = None, reset: Tensor | None = None):
    return _matrix(q, k, v, g, beta, None, None, None, state, reset)


def dplr(q, k, v, g, a, b, state: Tensor | None = None, reset: Tensor | None = None):
    return _matrix(q, k, v, g, None, None, a, b, state, reset)


def _norm(i, n, m, n_last, m_last, saved, tops, sums) -> Norm:
    n, n_last, saved = (array(x[:, :, None]) for x in (n, n_last, saved))
    return Norm(i, n, array(m), n_last, array(m_last), saved, array(tops), array(sums))


def _run_mlstm(q, k, v, f, i, S, n, m, reset, save):
    (B, T, H, V), K = v.shape, k.shape[3]
    inputs, segments = _arrays(q, k, v, f, i, None, None, None, reset), H * -(-T // SEGMENT) if save else 0
    S = v.new_zeros(B, H, K, V) if S is None else S.clone(memory_format=torch.contiguous_format)
    n = v.new_zeros(B, H, K) if n is None else n.contiguous()
    m = v.new_zeros(B, H) if m is None else m.contiguous()
    shapes = v.shape, n.shape, m.shape, (B, segments, K, V), (B, segments, K), (B, T, H), (B, T, H)
    y, n_last, m_last, saved, saved_n, tops, sums = (torch.empty(shape, dtype=v.dtype) for shape in shapes)
    norm = _norm(inputs[4], n, m, n_last, m_last, saved_n, tops, sums)
    if T <= short.STEPS:
        before, tasks = S, B * H if S.numel() * T > SMALL else 1
        S = torch.empty(S.shape, dtype=v.dtype)
        in_threads(short.forward, tasks, OUTER, *inputs, array(before), array(S), array(y), norm)
        return y, S, n_last, m_last, before if save else saved, n.clone() if save else saved_n, tops, sums
    share = _columns(B, H, V)
    group = _heads(B, H, -(-V // share))
    *given, _, _, _, _, cut = inputs
    tasks, results = B * (H // group) * -(-V // share), (array(x) for x in (S, y, saved))
    in_threads(by_head.forward, tasks, share, group, *given, None, cut, *results, norm)
    return y, S, n_last, m_last, saved, saved_n, tops, sums


def _run_mlstm_backward(
    q, k, v, f, i, S, n, m, reset, y, S_last, n_last, m_last, saved, saved_n, tops, sums, dy, dS, dn, dm
):
    (B, T, H, V), K = v.shape, k.shape[3]
    share = _columns(B, H, V)
    parts = -(-V // share)
    group = _heads(B, H, parts)
    dy, dn, dm = (
        torch.zeros_like(x) if d is None else d.contiguous() for d, x in ((dy, y), (dn, n_last), (dm, m_last))
    )
    dS = torch.zeros_like(S_last) if dS is None else dS.clone(memory_format=torch.contiguous_format)
    before = v.new_zeros(B, H) if m is None else m.contiguous()
    dv, dn_first = v.new_empty(v.shape), v.new_empty(parts * B, H, K)
    dq, dk, df, di = (v.new_empty(parts * B, T, H, width) for width in (K, K, 1, 1))
    *given, gate, _, _, _, cut = _arrays(q, k, v, f, i, None, None, None, reset)
    norm = _norm(gate, n_last, before, n_last, m_last, saved_n, tops, sums)
    back = Back(
        array(y), array(S_last), array(dn[:, :, None]), array(dm), array(dn_first[:, :, None]), array(di)
    )
    results = (array(x) for x in (saved, dy, dS, dq, dk, dv, df))
    tasks = B * (H // group) * parts
    in_threads(by_head.backward, tasks, share, group, *given, None, cut, *results, None, norm, back)
    df, di = (_sum(x, parts).view(f.shape) for x in (df, di))
    dm = df[:, 0].clone() if reset is None else df[:, 0].masked_fill(reset[:, :1], 0)
    return (
        _grouped(_sum(dq, parts), q.shape[2]),
        _grouped(_sum(dk, parts), k.shape[2]),
        dv,
        df,
        di,
        None if S is None else dS,
        None if n is None else _sum(dn_first, parts),
        None if m is None else dm,
        None,
    )


def _fake_mlstm(q, k, v, f, i, S, n, m, reset, save):
    (B, T, H, V), K = v.shape, k.shape[3]
    segments = H * ((T + SEGMENT - 1) // SEGMENT if save else 0)
    shapes = (B, H, K, V), (B, H, K), (B, H), (B, segments, K, V), (B, segments, K), (B, T, H), (B, T, H)
    return v.new_empty(v.shape), *(v.new_empty(shape) for shape in shapes)


_mlstm = define(
    "mlstm_cpu",
    "Tensor q, Tensor k, Tensor v, Tensor f, Tensor i, Tensor? S, Tensor? n, Tensor? m, Tensor? reset",
    4,
    4,
    "cpu",
    _run_mlstm,
    _run_mlstm_backward,
    _fake_mlstm,
)


def mlstm(q, k, v, f, i, state=None, reset: Tensor | None = None):
    y, *state = _mlstm(q, k, v, f, i, *(state or (None, None, None)), reset)
    return y, tuple(state)
