"""Chunkwise matrix memories: matmuls inside chunks of C steps, one state from chunk to chunk.

Everything inside chunks is batched over all of them; only the pass of the C-step states is a loop. With G the
cumulative log-decay inside a chunk, decays enter as exp(G_i - G_j) with i ≥ j, or, per key, as a product
exp(G_i - G_r) exp(G_r - G_j) with i ≥ r ≥ j. g ≤ 0 makes G non-increasing, so every exponent is ≤ 0 and
nothing overflows however strong the forgetting. A reset starts a new segment; pairs and states of other
segments are masked.
Sources: Yang et al. 2024 (GLA, arXiv:2312.06635) sec. 4; Yang et al. 2024 (arXiv:2406.06484) eq. 8-11; Yang
et al. 2025 (arXiv:2412.06464) sec. 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from riverrun.recurrences.mlstm import least
from riverrun.recurrences.outer import spread

from . import scan

C, SUB = 64, 16


class Chunks(NamedTuple):
    """Where time was cut, and who sees whom."""

    G: Tensor  # cumulative log-decay inside the chunk, (B, H, N, C, 1 | K)
    before: Tensor  # G less the step's own decay
    see: Tensor  # (B, 1, N, C, C): j ≤ i and no reset after j up to i
    carried: Tensor  # (B, 1, N, C, 1): the incoming state reaches step i
    kept: Tensor  # (B, 1, N, C, 1): step j reaches the chunk's last state
    T: int


def cut(x: Tensor, heads: int | None = None) -> Tensor:
    """(B, T, H, ·) -> (B, H, N, C, ·), padded at the end with zeros, which neither decay nor write."""
    x = x if heads is None else spread(x, heads)
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % C))
    return x.unflatten(1, (-1, C)).permute(0, 3, 1, 2, 4)


def plan(v: Tensor, g: Tensor | None, reset: Tensor | None) -> Chunks:
    g = v.new_zeros(v.shape[:3]) if g is None else g
    g = cut(g if g.dim() == 4 else g[..., None])
    G = g.cumsum(-2)
    segment = torch.zeros(v.shape[:2], dtype=torch.long, device=v.device) if reset is None else reset.long()
    segment = cut(segment[..., None, None])[..., 0].cumsum(-1)  # resets so far inside the chunk
    lower = torch.ones(C, C, dtype=torch.bool, device=v.device).tril()
    see = (segment[..., :, None] == segment[..., None, :]) & lower
    return Chunks(
        G, G - g, see, (segment == 0)[..., None], (segment == segment[..., -1:])[..., None], v.shape[1]
    )


def scores(x: Tensor, Gx: Tensor, y: Tensor, Gy: Tensor, see: Tensor) -> Tensor:
    """Σ_k x_ik y_jk exp(Gx_ik - Gy_jk) where `see`, else 0. Gx_i ≤ Gy_j wherever j < i, or j ≤ i, is seen."""
    if Gx.shape[-1] == 1:
        gap = (Gx - Gy.mT).masked_fill(~see, -torch.inf)
        return (x @ y.mT) * gap.exp()
    rows = []
    for start in range(0, C, SUB):
        here = slice(start, start + SUB)
        gap = (Gx[..., here, None, :] - Gy[..., None, here, :]).masked_fill(
            ~see[..., here, here, None], -torch.inf
        )
        near = torch.einsum("...ik,...jk,...ijk->...ij", x[..., here, :], y[..., here, :], gap.exp())
        if start:
            anchor = Gy[..., start - 1 : start, :]
            left = x[..., here, :] * (Gx[..., here, :] - anchor).exp()
            far = left @ (y[..., :start, :] * (anchor - Gy[..., :start, :]).exp()).mT
            near = torch.cat([far * see[..., here, :start], near], -1)
        rows.append(F.pad(near, (0, C - start - SUB)))
    return torch.cat(rows, -2)


def chain(decay: Tensor, state: Tensor, update) -> tuple[Tensor, Tensor]:
    """S ← decay_n S + update(n, S) through the chunks: the states before each, stacked, and the last."""
    before = []
    for n in range(decay.shape[2]):
        before.append(state)
        state = decay[:, :, n] * state + update(n, state)
    return torch.stack(before, 2), state


def zeros(k: Tensor, v: Tensor) -> Tensor:
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])


def join(y: Tensor, T: int) -> Tensor:
    """(B, H, N, C, V) -> (B, T, H, V)."""
    return y.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :T]


def outer(q, k, v, g=None, u=None, state: Tensor | None = None, reset: Tensor | None = None):
    H = v.shape[2]
    S, c = zeros(k, v) if state is None else state, plan(v, g, reset)
    q, k, v = cut(q, H), cut(k, H), cut(v)
    if u is None:
        read, pairs = c.G, scores(q, c.G, k, c.G, c.see)
    else:  # read before writing: the step's own decay is not yet applied, its own pair weighs u
        read = c.before
        eye = torch.eye(C, dtype=torch.bool, device=v.device)
        pairs = scores(q, c.before, k, c.G, c.see & ~eye) + torch.diag_embed(
            (q * u[:, None, None] * k).sum(-1)
        )
    write = k * (c.G[..., -1:, :] - c.G).exp() * c.kept
    new = write.mT @ v
    decay = c.G[..., -1, :, None].exp() * c.carried[..., -1:, :]
    before, S = chain(decay, S, lambda n, _: new[:, :, n])
    y = pairs @ v + (q * read.exp() * c.carried) @ before
    return join(y, c.T), S


def mlstm(q, k, v, f, i, state=None, reset: Tensor | None = None):
    """Through `outer`: m by a max-plus scan, the normaliser as one more value column."""
    if state is None:
        state = zeros(k, v), zeros(k, v)[..., 0], torch.zeros_like(f[:, 0])
    S, n, m0 = state
    m = scan.maximum(f, i, m0, reset)
    last = torch.cat([m0[:, None], m[:, :-1]], 1)
    if reset is not None:
        last = last.masked_fill(reset[..., None], 0)
    k = spread(k, v.shape[2]) * (i - m).exp()[..., None]
    v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    y, Sn = outer(q, k, v, f + last - m, None, torch.cat([S, n[..., None]], -1), reset)
    weight = torch.maximum(y[..., -1:].abs(), least(m)[..., None])
    return y[..., :-1] / weight, (Sn[..., :-1], Sn[..., -1], m[:, -1])


def delta(q, k, v, beta, g=None, state: Tensor | None = None, reset: Tensor | None = None):
    """Errors e = β (v - what k reads) solve a unit lower triangular system in each chunk, linear in S."""
    H = v.shape[2]
    S, c = zeros(k, v) if state is None else state, plan(v, g, reset)
    q, k, v, beta = cut(q, H), cut(k, H), cut(v), cut(beta[..., None])
    reach = c.G.exp() * c.carried
    system = beta * scores(k, c.G, k, c.G, c.see)
    solved = solve(system, torch.cat([beta * v, beta * k * reach], -1))
    own, seen = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]  # e = own - seen S
    write = (k * (c.G[..., -1:, :] - c.G).exp() * c.kept).mT
    decay = c.G[..., -1, :, None].exp() * c.carried[..., -1:, :]
    before, S = chain(decay, S, lambda n, S: write[:, :, n] @ (own[:, :, n] - seen[:, :, n] @ S))
    y = scores(q, c.G, k, c.G, c.see) @ (own - seen @ before) + (q * reach) @ before
    return join(y, c.T), S


def dplr(q, k, v, g, a, b, state: Tensor | None = None, reset: Tensor | None = None):
    """What b removes, w = bᵀ S_{t-1}, solves a unit lower triangular system in each chunk, linear in S."""
    S, c = zeros(k, v) if state is None else state, plan(v, g, reset)
    q, k, v, a, b = (cut(x) for x in (q, k, v, a, b))
    strict = c.see & ~torch.eye(C, dtype=torch.bool, device=v.device)
    system = -scores(b, c.before, a, c.G, strict)
    solved = solve(
        system, torch.cat([scores(b, c.before, k, c.G, strict) @ v, b * c.before.exp() * c.carried], -1)
    )
    own, seen = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]  # w = own + seen S
    left = (c.G[..., -1:, :] - c.G).exp() * c.kept
    write_a, new = (a * left).mT, (k * left).mT @ v
    decay = c.G[..., -1, :, None].exp() * c.carried[..., -1:, :]
    before, S = chain(
        decay, S, lambda n, S: new[:, :, n] + write_a[:, :, n] @ (own[:, :, n] + seen[:, :, n] @ S)
    )
    y = scores(q, c.G, a, c.G, c.see) @ (own + seen @ before)
    y = y + scores(q, c.G, k, c.G, c.see) @ v + (q * c.G.exp() * c.carried) @ before
    return join(y, c.T), S


def solve(system: Tensor, target: Tensor) -> Tensor:
    """x with (I + strictly lower part of `system`) x = target."""
    return torch.linalg.solve_triangular(system.tril(-1), target, upper=False, unitriangular=True)
