"""Mamba-3: Mamba-2 with a trapezoid for what a step adds, a state that turns, and several inputs at once.

    [z, u, B, C, δ, a, m, ω] = W x    dt = softplus(δ + c)    g = -softplus(a) dt    λ = σ(m)
    θ_t = θ_{t-1} + π tanh(ω_t) dt_t    k = R(θ) (norm(B) + b_B)    q = R(θ) (norm(C) + b_C)
    h_t = e^{g_t} h_{t-1} + (1 - λ_t) dt_t e^{g_t} k_{t-1} u_{t-1}ᵀ + λ_t dt_t k_t u_tᵀ
    y_t = h_tᵀ q_t + D u_t    out = W_o (y ⊙ silu(z))
    rank > 1: k, q of each rank r; u_r = u ⊙ x_r writes, y_r reads, out = W_o Σ_r (y_r ⊙ silu(z ⊙ z_r)) ⊙ o_r

What a token adds a step later is written at once: S_t = e^{g_t} S_{t-1} + (λ_t dt_t + (1 - λ_{t+1}) dt_{t+1})
k_t u_tᵀ. Then h_t = e^{g_t} S_{t-1} + λ_t dt_t k_t u_tᵀ reads S before it is written: no later token is seen.
Source: Lahoti et al. 2026 (arXiv:2603.15569); the layout of its first code, without its optional norm.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import RMSNorm, carried, checked, fitting, head_width, heads, wide
from riverrun.nn.init import step_size_bias
from riverrun.nn.phase import phases, turn
from riverrun.nn.steps import among

SLOWEST = 1e-4  # rate of forgetting
State = tuple[Tensor, Tensor, Tensor, Tensor]


class Mamba3(nn.Module):
    """arXiv:2603.15569. State: the last h (B, H, N, P), θ (B, H, A), k (B, R, H, N) and u (B, R, H, P);
    P = expand · width / H, A = turning · N / 2, R = rank. G groups share B and C among H / G heads each.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        num_states: int = 64,
        num_groups: int = 1,
        rank: int = 1,
        turning: float = 0.5,
        expand: int = 2,
    ):
        super().__init__()
        E, H, G, N, R = expand * width, num_heads, num_groups, num_states, rank
        P, A = head_width(E, H), int(turning * N) // 2
        head_width(H, G, "num_groups", "num_heads")
        if N % 2 or not 0 < A <= N // 2:
            raise ValueError(f"num_states = {N}, turning = {turning}: it takes pairs to turn")
        self.width, self.num_heads, self.num_groups, self.rank = width, H, G, R
        self.sizes, self.inner = (E, E, R * G * N, R * G * N, H, H, H, A), (R, G, N)
        self.axes = (H, N, P), (H, A), (R, H, N), (R, H, P)  # of the state's parts
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [z, u, B, C, δ, a, m, ω]
        self.dt_bias = step_size_bias(H)
        self.norms = nn.ModuleList(RMSNorm(N, 1e-5) for _ in "BC")
        self.biases = nn.Parameter(torch.ones(2, R, H, N))  # of B and C
        self.ranks = None
        if R > 1:  # x_r, z_r and o_r
            self.ranks = nn.Parameter(torch.tensor([1 / R, 1, 1 / R])[:, None, None, None].repeat(1, R, H, P))
        self.skip = nn.Parameter(torch.ones(H))
        self.out = nn.Linear(E, width, bias=False)

    def forward(
        self, x: Tensor, state: State | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, State]:
        parts = carried(self, x, state, reset, 4)
        S, phase, k_last, u_last = (
            fitting(self, p, len(x), *axes) for p, axes in zip(parts, self.axes, strict=True)
        )
        z, u, B, C, dt, a, m, w = self.inp(x).split(self.sizes, -1)
        z, u = (wide(heads(p, self.num_heads))[:, :, None] for p in (z, u))
        dt, mix = F.softplus(wide(dt) + wide(self.dt_bias)), wide(m).sigmoid()
        g, at_once, later = -F.softplus(wide(a)).clamp_min(SLOWEST) * dt, mix * dt, (1 - mix) * dt
        phase = phases(math.pi * torch.tanh(wide(w))[:, :, None] * dt[..., None], phase)
        k, q = (
            turn(self.by_head(p, norm) + wide(bias), phase[:, :, None])
            for p, norm, bias in zip((B, C), self.norms, self.biases, strict=True)
        )
        if self.ranks is not None:
            u, z = u * self.ranks[0], z * self.ranks[1]
        if S is not None:
            S = S + later[:, 0, :, None, None] * torch.einsum("brhn,brhp->bhnp", k_last, u_last)
        y, S = self.read(q, k, u, g, at_once + F.pad(later[:, 1:], (0, 0, 0, 1)), S, reset)
        own = torch.einsum("bthrs,btshp->btrhp", torch.einsum("btrhn,btshn->bthrs", q, k), u)
        y = g.exp()[:, :, None, :, None] * y + at_once[:, :, None, :, None] * own + self.skip[:, None] * u
        y = y * F.silu(z)
        y = (y if self.ranks is None else y * self.ranks[2]).sum(2)
        return self.out(y.flatten(2).to(x.dtype)), (S, phase[:, -1], k[:, -1], u[:, -1])

    def by_head(self, p: Tensor, norm: nn.Module) -> Tensor:
        """(B, T, R·G·N) -> (B, T, R, H, N), normed."""
        return norm(wide(p).unflatten(-1, self.inner)).repeat_interleave(self.num_heads // self.num_groups, 3)

    def read(self, q, k, u, g, strength, S, reset):
        """S_{t-1}ᵀ q_t for every rank, and the last S. Of a token's 2 R - 1 steps the first R read, the
        last R write: with a bonus, here of zero, the op reads before it decays and writes."""
        R, n, T = self.rank, 2 * self.rank - 1, q.shape[1]
        u, g = u * strength[:, :, None, :, None], among(g[:, :, None], n, R - 1)
        flags = None if reset is None else among(reset[:, :, None], n)
        none = q.new_zeros(q.shape[3:])
        y, S = ops.outer(among(q, n), among(k, n, R - 1), among(u, n, R - 1), g, none, state=S, reset=flags)
        return y.unflatten(1, (T, n))[:, :, :R], S
