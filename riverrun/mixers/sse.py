"""Sparse state expansion: one set of keys and values for many partitions of a state, of which each token
writes and reads the few that a classifier names; and one partition that every token meets.

    q, k, v = silu(W x), softmax(W x), silu(W x)    e = softmax(W_e x) over the N partitions
    q', k' as q, k, from W x + U V x    g, g' = log σ(U V x + c) / 16, per key
    S  ← diag(e^g) S + k vᵀ
    S_i ← diag(e^{g'}) S_i + e_i k' vᵀ    for the `writers` largest e_i; the others stay as they are
    y = Sᵀ q + Σ_i e_i S_iᵀ q'            over the `readers` largest e_i    out = W_o (norm(y) ⊙ silu(U V x))

Keys are probabilities: a softmax sends each token to few rows of a partition. What grows with N is the state
and W_e, nothing else. Source: Pan et al. 2025 (arXiv:2507.16577); q', k', the two decays and the two gates
e_i are from the authors' layer. There, and here, q is scaled by K^{-1/2}.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import GatedRMSNorm, carried, checked, fitting, head_width, heads, wide
from riverrun.nn.route import Router, masked, packed


class SSE(nn.Module):
    """arXiv:2507.16577. State: (S (B, H, K, K), partitions (B, N, H, K, K)) with K = width / H.

    `rank` is that of U V for q', k' and the output gate, K unless given. `masked` runs every partition over
    every step, for torch.compile(fullgraph=True).
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_partitions: int = 4,
        writers: int = 1,
        readers: int = 1,
        rank: int | None = None,
        decay_rank: int = 16,
        masked: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        K = head_width(width, num_heads)
        R = rank or K
        self.width, self.num_heads, self.num_partitions = width, num_heads, num_partitions
        self.writers, self.readers, self.masked = writers, readers, masked
        self.sizes = (width, width, width, R, R, R, decay_rank, decay_rank)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, V for q', k', z, g, g']
        self.query, self.key, self.gate = (nn.Linear(R, width, bias=False) for _ in range(3))
        self.decay, self.decays = nn.Linear(decay_rank, width), nn.Linear(decay_rank, width)
        self.router = Router(width, num_partitions, max(writers, readers), "writers or readers")
        self.norm = GatedRMSNorm(width, K, eps, shared=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        H, N, K = self.num_heads, self.num_partitions, self.width // self.num_heads
        S, parts = carried(self, x, state, reset, 2)
        parts = fitting(self, parts, x.shape[0], N, H, K, K)
        q, k, v, low_q, low_k, low_z, low, lows = self.inp(x).split(self.sizes, -1)
        v = F.silu(v)
        args = *self.pair(q, k), heads(v, H), self.forget(self.decay, low)
        y, S = ops.outer(*args, state=S, reset=reset)

        q, k = (a.flatten(2) for a in self.pair(q + self.query(low_q), k + self.key(low_k)))
        p, index = self.router(x)
        e, rank = p.gather(-1, index)[..., None], torch.arange(index.shape[-1], device=x.device)[:, None]
        write, read = rank < self.writers, rank < self.readers
        routes = (masked if self.masked else packed)(index, N, reset)
        q, k = ((e * use).to(x.dtype) * a[:, :, None] for use, a in ((read, q), (write, k)))
        g = write * self.forget(self.decays, lows).flatten(2)[:, :, None]
        rows = [heads(routes.spread(a), H) for a in (q, k, v, g)]
        more, new = ops.outer(*rows, state=routes.take(parts), reset=routes.reset)
        y = y.flatten(2) + routes.collect(more.flatten(2)).sum(2)
        return self.out(self.norm(y, self.gate(low_z))), (S, routes.put(parts, new))

    def pair(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """The query and the key by heads."""
        q, k = heads(q, self.num_heads), heads(k, self.num_heads)
        return F.silu(q) * q.shape[-1] ** -0.5, wide(k).softmax(-1).to(k.dtype)

    def forget(self, decay: nn.Linear, low: Tensor) -> Tensor:
        """The log-decay (B, T, H, K)."""
        return heads(F.logsigmoid(wide(decay(low))) / 16, self.num_heads)
