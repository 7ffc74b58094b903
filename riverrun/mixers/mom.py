"""Mixture-of-Memories: a router sends each token to few of many memories, to keep apart what would disturb.

    p = softmax(W_r x)    the k largest: weights w_m = p_m / Σ p over the chosen, 0 for the rest
    [k, v, gates]_m = W_m x    S_m ← rule(S_m; k_m, v_m, gates_m) for the chosen m, else S_m stays as it is
    y = Σ_m w_m S_mᵀ q (+ S_0ᵀ q, a shared memory that every token meets)    q, z = W x
    out = W_o (norm(y) ⊙ silu(z)), for linear W_o y

    rule    linear: S + φ(k) [v, 1]ᵀ, read as a quotient; φ(u) = elu(u) + 1
            gla: diag(e^g) S + k vᵀ; g = log σ(U x + c) / 16
            gated_delta: S' = e^g S, S' + k β (v - S'ᵀ k)ᵀ; g = -A softplus(a + c), β = σ(b), |k| = 1;
            q, k, v after a short convolution over the tokens of the memory

Source: Du et al. 2025 (arXiv:2502.13685); where the convolution runs, and that memories share it and
the rates, is from the authors' code. `riverrun.nn.route.balances` keeps the load even.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import GatedRMSNorm, ShortConv, carried, checked, fitting, head_width, heads, unit, wide
from riverrun.nn.feature import positive
from riverrun.nn.init import log_rate, step_size_bias
from riverrun.nn.route import PerMemory, Router, Routes, masked, packed
from riverrun.state import State


class MoM(nn.Module):
    """arXiv:2502.13685. State: S (B, M, H, K, V), for gated_delta also conv (B, M, window - 1, 2·H·K + H·V);
    then the same for a shared memory, with M = 1. K = V = width / H; for gla half of it, for linear V + 1.
    `masked` runs every memory over every step, for torch.compile(fullgraph=True).
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_memories: int = 4,
        chosen: int = 2,
        shared: bool = True,
        rule: Literal["linear", "gla", "gated_delta"] = "gated_delta",
        window: int = 4,
        rank: int = 16,
        masked: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        H, V = num_heads, head_width(width, num_heads)
        delta, K = rule == "gated_delta", -(-V // 2) if rule == "gla" else V
        if masked and delta and window > 1:
            raise ValueError(f"masked memories have no short convolution; window = {window} must be 1")
        self.width, self.num_heads, self.num_memories, self.key_width = width, H, num_memories, K
        self.rule, self.masked, self.eps = rule, masked, eps
        self.sizes = (H * K, width, *{"linear": (), "gla": (rank,), "gated_delta": (H, H)}[rule])
        self.inp = nn.Linear(width, H * K + width * (rule != "linear"), bias=False)  # [q, z]
        self.router = Router(width, num_memories, chosen)
        self.write = PerMemory(num_memories, width, sum(self.sizes))  # [k, v, gates]
        self.shared = nn.Linear(width, sum(self.sizes), bias=False) if shared else None
        self.decay = nn.Linear(rank, H * K) if rule == "gla" else None
        self.conv = ShortConv(2 * H * K + width, window) if delta else None
        if delta:
            self.log_rate, self.dt_bias = log_rate(H), step_size_bias(H)
        self.norm = None if rule == "linear" else GatedRMSNorm(width, V, eps, shared=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: State = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        n = 1 + (self.conv is not None)  # parts of a state
        parts = carried(self, x, state, reset, n * (1 + (self.shared is not None)))
        parts = parts if n > 1 or self.shared is not None else (parts,)
        q, z = self.inp(x).tensor_split([self.num_heads * self.key_width], -1)
        p, index = self.router(x)
        weight = F.normalize(p.gather(-1, index), 1, -1).to(x.dtype)[..., None]
        routes = (masked if self.masked else packed)(index, self.num_memories, reset)
        told = self.write(routes.spread(x), routes.used)
        y, ends = self.remember(routes.spread(q), told, parts[:n], routes)
        y = (weight * routes.collect(y)).sum(2)
        if self.shared is not None:
            always = masked(torch.zeros_like(index[..., :1]), 1, reset)
            more, last = self.remember(q, self.shared(x), parts[n:], always)
            y, ends = y + more, ends + last
        if self.norm is None:
            y = heads(y, self.num_heads)
            y = (y[..., :-1] / (y[..., -1:] + self.eps)).flatten(2).to(x.dtype)
        else:
            y = self.norm(y, z)
        return self.out(y), ends if len(ends) > 1 else ends[0]

    def remember(self, q: Tensor, p: Tensor, state: tuple, routes: Routes) -> tuple[Tensor, tuple]:
        """y (U·B, L, H·V) and the state, for the rows q and p = [k, v, gates] of some memories."""
        (_, B, _), M, H, K = routes.shape, routes.num_memories, self.num_heads, self.key_width
        S = fitting(self, state[0], B, M, H, K, self.width // H + (self.rule == "linear"))
        k, v, *gates = p.split(self.sizes, -1)
        ends: tuple = ()
        if self.conv is not None:
            past = fitting(self, state[1], B, M, self.conv.weight.shape[1] - 1, 2 * H * K + self.width)
            qkv, before = torch.cat([q, k, v], -1), routes.take(past)
            u, end = self.conv(qkv, before, routes.reset)
            end = end if routes.count is None else routes.tail(qkv, before, end.shape[1])
            (q, k, v), ends = u.split([H * K, H * K, self.width], -1), (routes.put(past, end),)
        q, k, v, real = heads(q, H), heads(k, H), heads(v, H), routes.real(q)[..., None]
        before, reset = routes.take(S), routes.reset
        if self.conv is not None:
            b, a = gates
            g = -wide(self.log_rate).exp() * F.softplus(wide(a) + wide(self.dt_bias)) * real[..., 0]
            q, k = unit(q) * K**-0.5, unit(k) * real
            y, end = ops.delta(q, k, v, b.sigmoid(), g, state=before, reset=reset)
        elif self.decay is not None:
            g = heads(F.logsigmoid(wide(self.decay(*gates))), H) / 16 * real
            y, end = ops.outer(q * K**-0.5, k * real, v, g, state=before, reset=reset)
        else:
            v = F.pad(wide(v), (0, 1), value=1.0)
            y, end = ops.outer(positive(q), positive(k) * real, v, state=before, reset=reset)
        return y.flatten(2), (routes.put(S, end), *ends)
