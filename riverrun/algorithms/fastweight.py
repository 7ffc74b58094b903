"""Test-time memories a chunk at a time: matmuls over all tokens of a chunk, one state from chunk to chunk.

All gradients of a chunk are taken at one W_c, and every matrix of a memory multiplies something, so token s
adds an outer product x_s δ_sᵀ to it. With M and G the cumulative sums of m and g inside the chunk,

    A_t = b_t A + c_t Z - Σ_{s ≤ t} P_ts η_s x_s δ_sᵀ        b = e^G    L_tr = e^{G_t - G_r}, r ≤ t
    P = L (e^{M_r - M_s}), s ≤ r    c = L e^M                without momentum P = L and c = 0
    x A_t = b_t x A + c_t x Z - Σ_s P_ts η_s (x·x_s) δ_s

No weights are made for single tokens, unless W_t = r(A_t) needs all entries of A_t (lq, softmax). g, m ≤ 0
make every exponent ≤ 0. Where rows of a batch stand at different places of their chunks, or begin a new
document, each takes its own next piece of a chunk: a round is one such piece for every row.
Source: the dual form of Sun et al. 2024 (arXiv:2407.04620) sec. 2.5, with decay and momentum as in Behrouz et
al. 2025 (arXiv:2501.00663) sec. 3.2.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from riverrun.recurrences.fastweight import FastState, named
from riverrun.recurrences.memory import Rule, Weights, inner_loss, net, padded, through
from riverrun.recurrences.retention import begin, settle, size, weights


class Rounds(NamedTuple):
    """Which token each slot of each round holds."""

    source: Tensor  # (B, N, C): the time of the token, T for an empty slot
    place: Tensor  # (B, T): the slot of each token, counted through all rounds
    fresh: Tensor  # (B, N): the round begins with a reset
    full: Tensor  # (B, N): the round ends a chunk
    used: Tensor  # (B): tokens of the chunk in which the last step lies


def plan(size: int, used: Tensor | None, like: Tensor, reset: Tensor | None) -> Rounds:
    """Rounds for v `like` (B, T, H, V) and chunks of `size` tokens, of which `used` (B) were seen before."""
    B, T = like.shape[:2]
    steps = torch.arange(T, device=like.device).expand(B, T)
    place = places(size, used, steps, reset)
    starts = (place == 0) | (steps == 0)
    n = starts.cumsum(1) - 1
    C, N = min(size, T), rounds(size, T, used is not None, reset, n)
    slot = n * C + steps - steps.where(starts, 0).cummax(1).values
    source = torch.full((B, N * C), T, device=like.device).scatter(1, slot, steps)
    flags = torch.zeros(B, N, dtype=torch.long, device=like.device)
    full = flags.scatter_add(1, n, (place == size - 1).long()) > 0
    fresh = flags > 0 if reset is None else flags.scatter_add(1, n, reset.long()) > 0
    return Rounds(source.view(B, N, C), slot, fresh, full, (place[:, -1] + 1) % size)


def places(size: int, used: Tensor | None, steps: Tensor, reset: Tensor | None) -> Tensor:
    """The place of each of `steps` (B, T), 0 to T - 1, in its chunk."""
    place = steps if used is None else steps + used.long()[:, None]
    if reset is not None:
        last = steps.where(reset, -1).cummax(1).values
        place = torch.where(last < 0, place, steps - last)
    return place % size


def rounds(size: int, T: int, carried: bool, reset: Tensor | None, n: Tensor) -> int:
    """How many rounds there are; without resets a bound that does not wait for the device."""
    if T == 1 or reset is None:
        return -(-(T + (size - 1 if carried and T > 1 else 0)) // size)
    return int(n.max()) + 1


def gather(x: Tensor, at: Tensor) -> Tensor:
    """(B, T, H, ...) at times (B, N, C), zeros at time T -> (N, B, H, C, ...)."""
    x = torch.cat([x, torch.zeros_like(x[:, :1])], 1)
    rows = torch.arange(len(x), device=x.device)[:, None, None]
    return x[rows, at].movedim(1, 0).movedim(3, 2)


def run(rule: Rule, *args: Tensor | None, state: FastState | None = None, reset: Tensor | None = None):
    initial, a = named(rule, args)
    v = a["v"]
    p = plan(rule.chunk, None if state is None else state[3], v, reset)
    fresh = begin(rule, tuple(w.expand(len(v), *w.shape) for w in initial))
    memory = fresh[:3] if state is None else state[:3]
    if a["lr"].dim() == 3:
        a["lr"] = a["lr"][..., None].expand(*a["lr"].shape, len(initial))
    norm = a.pop("norm")
    a["live"] = torch.ones_like(v[..., 0])
    pieces = {name: gather(x, p.source) for name, x in a.items() if x is not None}
    ys = []
    for n in range(p.source.shape[1]):
        if reset is not None:
            memory = choose(p.fresh[:, n], fresh[:3], memory)
        piece = {name: x[n] for name, x in pieces.items()}
        y, memory = advance(rule, memory, piece, norm)
        ys.append(y)
        if unseen(v) or bool(p.full[:, n].any()):
            W, A, Z = memory
            memory = (*choose(p.full[:, n], settle(rule, W, A, initial), (W, A)), Z)
    y = torch.stack(ys, 1).movedim(2, 3).flatten(1, 2)  # (B, N·C, H, V)
    return y.gather(1, p.place[..., None, None].expand_as(v)), (*memory, p.used.to(v.dtype))


def unseen(x: Tensor) -> bool:
    """Whether no number can be looked at, because a graph is being compiled or recorded."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def choose(rows: Tensor, new: Any, old: Any) -> Any:
    """`new` where `rows` (B), else `old`, for nested tuples of (B, H, in, out)."""
    if isinstance(old, tuple):
        return tuple(choose(rows, n, o) for n, o in zip(new, old, strict=True))
    return torch.where(rows[:, None, None, None], new, old)


def advance(
    rule: Rule, memory: tuple[Weights, Weights, Weights], piece: dict[str, Tensor], norm: Tensor | None
) -> tuple[Tensor, tuple[Weights, Weights, Weights]]:
    """One round: y (B, H, C, V), and the memory after it, W_c as it was."""
    W, A, Z = memory
    xs, slopes = gradients(rule, W, piece, norm)
    us = tuple(-piece["lr"][..., i, None] * d for i, d in enumerate(slopes))
    if rule.by_chunk:
        y = net(rule.memory, piece["q"], through(W), norm)
        return y, (W, tuple(a + x.mT @ u for a, x, u in zip(A, xs, us, strict=True)), Z)
    P, b, c, left = mixing(rule, piece)

    def layer(i: int, x: Tensor) -> Tensor:
        x = padded(x, A[i])
        far = b * (x @ A[i]) + (c * (x @ Z[i]) if rule.momentum else 0)
        return far + (P * (x @ xs[i].mT)) @ us[i]

    def every(i: int) -> Tensor:
        """A_t for every t, (B, H, C, in, out)."""
        steps = P @ (xs[i][..., None] * us[i][..., None, :]).flatten(-2)
        made = steps.unflatten(-1, A[i].shape[-2:]) + b[..., None] * A[i][:, :, None]
        return made + c[..., None] * Z[i][:, :, None] if rule.momentum else made

    def single(i: int, x: Tensor) -> Tensor:
        if rule.retain == "lq":
            return layer(i, x) / size(every(i))[..., 0]
        (W_t,) = weights(rule, (every(i),))
        return (padded(x, A[i])[..., None, :] @ W_t)[..., 0, :]

    y = net(rule.memory, piece["q"], layer if rule.retain == "decay" else single, norm)
    ends = zip(A, Z, xs, us, strict=True) if rule.momentum else ((a, 0, x, u) for a, x, u in zip(A, xs, us))
    A = tuple(b[:, :, -1:] * a + c[:, :, -1:] * z + x.mT @ (P[:, :, -1, :, None] * u) for a, z, x, u in ends)
    Z = tuple(left[:, :, :1] * z + x.mT @ (left[:, :, 1:] * u) for z, x, u in zip(Z, xs, us, strict=False))
    return y, (W, A, Z)


def gradients(
    rule: Rule, W: Weights, piece: dict[str, Tensor], norm: Tensor | None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """For each matrix what it multiplies, x_s, and the slope δ_s of the loss to what comes out."""

    def loss(*shifts: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        xs: dict[int, Tensor] = {}

        def layer(i: int, x: Tensor) -> Tensor:
            xs[i] = padded(x, W[i])
            return xs[i] @ W[i] + shifts[i]

        y = net(rule.memory, piece["k"], layer, norm)
        return inner_loss(rule, y, piece["v"], piece.get("bound")).sum(), tuple(xs[i] for i in range(len(W)))

    zeros = tuple(w.new_zeros(*piece["k"].shape[:3], w.shape[-1]) for w in W)
    slopes, xs = torch.func.grad(loss, argnums=tuple(range(len(W))), has_aux=True)(*zeros)
    return xs, slopes


def mixing(rule: Rule, piece: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, b and c, and what of Z and of each slot's step is left at the end, (B, H, 1 + C, 1)."""
    live = piece["live"]
    G = piece["g"].cumsum(-1) if "g" in piece else torch.zeros_like(live)
    L, b = ratios(G), G.exp()[..., None]
    if not rule.momentum:
        return L, b, b, b
    M = piece["m"].cumsum(-1)
    L = L * live[..., None, :]  # an empty slot adds no Z to A
    last = ratios(M)
    left = torch.cat([M[..., -1:].exp(), last[..., -1, :]], -1)
    return L @ last, b, L @ M.exp()[..., None], left[..., None]


def ratios(G: Tensor) -> Tensor:
    """exp(G_t - G_s) for s ≤ t, else 0."""
    lower = torch.ones(G.shape[-1], G.shape[-1], dtype=torch.bool, device=G.device).tril()
    return (G[..., :, None] - G[..., None, :]).masked_fill(~lower, -torch.inf).exp()
