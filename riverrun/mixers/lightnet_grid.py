"""LightNet on grids: every token reads the mean of all, weighted by softmax over tokens, in a single scan.

    q = silu(W_q x)    k, v = W x    S = Σ_s softmax_s(k_s) v_sᵀ, key by key    y_t = Sᵀ q_t / sqrt(K)
    out = W_o (norm(y) ⊙ silu(U V x))

A sum needs no order, so one pass serves any number of axes: pictures, videos, volumes. What order there is
comes from positions: LRPE in q and k with `base`, leaky sums of x along the axes with `tpe`. Permuting tokens
together with their places permutes y.
Source: Qin et al. 2024 (arXiv:2405.21022), the form that sees both ways.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.nn import (
    GatedRMSNorm,
    LowRank,
    apart,
    both_resets,
    both_ways,
    checked,
    each_document,
    head_width,
    heads,
    pooled,
    positions,
    whole,
    wide,
)
from riverrun.nn.axes import TPE, lrpe, places
from riverrun.nn.logsum import log_sums


class LightNetGrid(nn.Module):
    """arXiv:2405.21022. State: none, it sees both ways.

    `sizes`: of all axes but the first, () for sequences, (columns,) for pictures, (rows, columns) for videos.
    Tokens stand in row-major order, and the first axis is as long as they reach.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        key_width: int | None = None,
        rank: int = 16,
        base: float | None = 10_000.0,
        tpe: bool = False,
        sizes: tuple[int, ...] = (),
        eps: float = 1e-6,
    ):
        super().__init__()
        K = key_width or head_width(width, num_heads)
        self.width, self.num_heads, self.key_width, self.base, self.sizes = width, num_heads, K, base, sizes
        self.parts = (num_heads * K, num_heads * K, width)
        self.inp = nn.Linear(width, sum(self.parts), bias=False)  # [q, k, v]
        self.gate = LowRank(width, rank, width)
        self.tpe = TPE(width, 1 + len(sizes)) if tpe else None
        self.norm = GatedRMSNorm(width, eps=eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x: Tensor,
        state: None = None,
        reset: Tensor | None = None,
        sizes: tuple[int, ...] | None = None,
        place: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """`sizes` of this call's grid, as many as the constructor's; `place` (B, T, 1 + n), coordinates of
        tokens that do not fill a grid."""
        whole(self, x, state, reset)
        grid = self.sizes if sizes is None else sizes
        if len(grid) != len(self.sizes):
            raise ValueError(
                f"sizes = {grid}; this mixer was made for {len(self.sizes)} beside the first axis"
            )
        if place is None:
            place = places(positions(x, None, reset)[0], grid)
        elif place.shape != (*x.shape[:2], 1 + len(grid)) or self.tpe is not None:
            raise ValueError(
                f"place has shape {tuple(place.shape)}; accepted is {(*x.shape[:2], 1 + len(grid))}, and "
                "none with tpe=True, which sums along the axes of a whole grid"
            )
        if self.tpe is not None:
            tpe = self.tpe
            x = x + each_document(lambda document: tpe(document, grid), x, reset)
        q, k, v = (heads(p, self.num_heads) for p in self.inp(x).split(self.parts, -1))
        q, k = F.silu(q) * self.key_width**-0.5, wide(k)
        k = (k - total(k, reset)).exp()
        if self.base is not None:
            q, k = (lrpe(p, place, self.base) for p in (q, k))
        y = pooled(q, k, v, reset)
        return self.out(self.norm(y.flatten(2), self.gate(x))), None


def total(k: Tensor, reset: Tensor | None) -> Tensor:
    """log Σ_s e^{k_s} over all tokens s of each token's document."""
    if reset is None:
        return k.logsumexp(1, keepdim=True)
    sofar, left = apart(log_sums(both_ways(k), None, both_resets(reset)))
    nothing = torch.full_like(k[:, :1], -torch.inf)
    after = torch.cat([left[:, 1:], nothing], 1)  # from the next token on, if that is the document's
    ends = torch.cat([reset[:, 1:], torch.ones_like(reset[:, :1])], 1)
    return torch.logaddexp(sofar, after.masked_fill(ends[..., None, None], -torch.inf))
