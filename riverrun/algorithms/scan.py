"""Associative scans over axis 1 in log2(T) passes (Hillis & Steele 1986), with resets and carried state.

A reset at t makes element t forget everything to its left: flags ride along, and `combine` keeps the right
element where its flag is set (Lu et al. 2023, arXiv:2303.03982, sec. 3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from riverrun.recurrences import diagonal as _diagonal
from riverrun.recurrences import selective as _selective
from riverrun.recurrences import softmax as _softmax

BLOCK = 64  # steps scanned at a time where all states would not fit in memory


def scan(combine: Callable, xs: tuple[Tensor, ...], reset: Tensor | None = None) -> tuple[Tensor, ...]:
    """All prefixes of x_1 ∘ x_2 ∘ ... ∘ x_T under an associative `combine(earlier, later)`."""
    shift, T = 1, xs[0].shape[1]
    while shift < T:
        right = tuple(x[:, shift:] for x in xs)
        merged = combine(tuple(x[:, :-shift] for x in xs), right)
        if reset is not None:
            cut = reset[:, shift:]
            merged = tuple(
                torch.where(cut.view(*cut.shape, *[1] * (r.dim() - 2)), r, m)
                for r, m in zip(right, merged, strict=True)
            )
            reset = torch.cat([reset[:, :shift], cut | reset[:, :-shift]], 1)
        xs = tuple(torch.cat([x[:, :shift], m], 1) for x, m in zip(xs, merged, strict=True))
        shift *= 2
    return xs


def diagonal(a: Tensor, b: Tensor, state: Tensor | None = None, reset: Tensor | None = None):
    """The diagonal recurrence; a reset is a_t = 0, which is exact in every product and never inverted."""
    if reset is not None:
        a = a.masked_fill(reset.view(*reset.shape, *[1] * (a.dim() - 2)), 0)
    decay, h = scan(_diagonal.combine, (a, b))
    if state is not None:
        h = h + decay * state[:, None]
    return h, h[:, -1]


def selective(x, dt, A, B, C, low=None, state: Tensor | None = None, reset: Tensor | None = None):
    """The selective recurrence, BLOCK steps of T × E × N at a time."""
    ys = []
    resets = [None] * -(-x.shape[1] // BLOCK) if reset is None else reset.split(BLOCK, 1)
    for x_, dt_, B_, C_, reset_ in zip(*(s.split(BLOCK, 1) for s in (x, dt, B, C)), resets, strict=True):
        drive = (dt_ * x_)[..., None] * B_[:, :, None]
        h, state = diagonal(_selective.decay(dt_, A, low), drive, state, reset_)
        ys.append(torch.einsum("bten,btn->bte", h, C_))
    return torch.cat(ys, 1), state


def softmax(s: Tensor, v: Tensor, state=None, reset: Tensor | None = None):
    """The (m, c, a) triple. The carried state is one more element on the left."""
    xs: tuple[Tensor, ...] = (s, torch.ones_like(s), v)
    if state is not None:
        xs = tuple(torch.cat([c[:, None], x], 1) for c, x in zip(state, xs, strict=True))
        if reset is not None:
            reset = torch.cat([torch.zeros_like(reset[:, :1]), reset], 1)
    m, c, a = (x[:, -s.shape[1] :] for x in scan(_softmax.combine, xs, reset))
    return a / c[..., None], (m[:, -1], c[:, -1], a[:, -1])


def maximum(f: Tensor, i: Tensor, state: Tensor, reset: Tensor | None = None) -> Tensor:
    """m_t = max(f_t + m_{t-1}, i_t) for f, i (B, T, H) and m_0 = state (B, H); a reset puts m_{t-1} to 0."""

    def combine(left, right):
        return left[0] + right[0], torch.maximum(left[1] + right[0], right[1])

    if reset is not None:  # the element that no longer reads m_{t-1}
        f, i = (
            f.masked_fill(reset[..., None], -torch.inf),
            torch.where(reset[..., None], torch.maximum(f, i), i),
        )
    shift, top = scan(combine, (f, i))
    return torch.maximum(shift + state[:, None], top)
