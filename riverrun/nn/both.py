"""Both directions of time, and documents that are read whole.

A recurrence runs both ways in one call of its op: the sequences and, below them in the batch, the same ones
in reverse, whose documents begin where the others end.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from riverrun import ops

from .shape import wide


def both_ways(forward: Tensor, backward: Tensor | None = None) -> Tensor:
    """(2B, T, ...): `forward` (B, T, ...), and below it `backward` in reverse, the same unless given."""
    return torch.cat([forward, (forward if backward is None else backward).flip(1)])


def both_resets(reset: Tensor | None) -> Tensor | None:
    """(2B, T): where documents begin, and where they begin when read backwards."""
    if reset is None:
        return None
    ends = torch.cat([reset[:, 1:], torch.zeros_like(reset[:, :1])], 1)  # the next token is another's
    return both_ways(reset, ends)


def apart(y: Tensor) -> tuple[Tensor, Tensor]:
    """What `both_ways` put together: (B, T, ...) forward, and backward in the order of time again."""
    forward, backward = y.chunk(2)
    return forward, backward.flip(1)


def pooled(q: Tensor, k: Tensor, v: Tensor, reset: Tensor | None = None) -> Tensor:
    """y_t = Sᵀ q_t, where all tokens s of t's document have written S = Σ_s k_s v_sᵀ.

    q, k: (B, T, G, K), v, y: (B, T, H, V); head h reads group h // (H / G). Summed in float32 or wider. One
    sum a sequence; packed documents are summed from both ends, each token's own pair half from either.
    """
    if reset is None:
        values = wide(v).unflatten(2, (k.shape[2], -1))
        S = torch.einsum("btgk,btgrv->bgrkv", wide(k), values)
        return torch.einsum("btgk,bgrkv->btgrv", wide(q), S).flatten(2, 3).to(v.dtype)
    half = v.new_full((v.shape[2], k.shape[3]), 0.5)
    y, _ = ops.outer(both_ways(q), both_ways(k), both_ways(v), None, half, reset=both_resets(reset))
    forward, backward = apart(y)
    return forward + backward


def each_document(f: Callable[[Tensor], Tensor], x: Tensor, reset: Tensor | None) -> Tensor:
    """f (1, T, D) -> (1, T, D) on one document after another of x (B, T, D), or on all of x without `reset`.

    For what cannot tell documents apart itself. How many there are is data, so no graph can hold it.
    """
    if reset is None:
        return f(x)
    rows = []
    for row, marks in zip(x.split(1), reset, strict=True):
        starts = [0, *marks[1:].nonzero().flatten().add(1).tolist(), x.shape[1]]
        lengths = [b - a for a, b in pairwise(starts)]
        rows.append(torch.cat([f(document) for document in row.split(lengths, 1)], 1))
    return torch.cat(rows)
