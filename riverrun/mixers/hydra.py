"""Hydra: Mamba-2 forward and backward with shared values and rates, each one step late, and a diagonal.

    [z, u, dt] = W x    [x', B, C, B', C'] = silu(conv(u))    g = -A softplus(dt + c), dt for each direction
    Y(B, C, g): S_t = e^{g_t} S_{t-1} + B_t (dt_t x'_t)ᵀ    y_t = S_tᵀ C_t
    y = shift(Y) + flip(shift(Y' of the reversed)) + (D + W_d x') x'    out = W_o (norm(y) ⊙ silu(z))

shift moves all by one step, so the two triangles are strict and the diagonal is free: a quasiseparable
matrix. The convolution is centred.
Source: Hwang et al. 2024 (arXiv:2407.09941) sec. 3; the layout of its code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import (
    GatedRMSNorm,
    LocalConv,
    apart,
    both_resets,
    both_ways,
    checked,
    head_width,
    heads,
    parts,
    previous,
    scaled,
    whole,
    wide,
)
from riverrun.nn.init import log_rate, step_size_bias


class Hydra(nn.Module):
    """arXiv:2407.09941. State: none, it sees both ways. G groups share B and C among H / G heads each."""

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 8,
        num_states: int = 64,
        num_groups: int = 1,
        expand: int = 2,
        window: int = 7,
        eps: float = 1e-5,
    ):
        super().__init__()
        E, H, G, N = expand * width, num_heads, num_groups, num_states
        head_width(E, H)
        head_width(H, G, "num_groups", "num_heads")
        self.width, self.num_heads, self.num_groups = width, H, G
        self.sizes, self.inner = (E, E + 4 * G * N, 2 * H), (E, G * N, G * N, G * N, G * N)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [z, (x, B, C, B', C'), (dt, dt')]
        self.conv = LocalConv(self.sizes[1], (1, window))
        self.log_rate, self.dt_bias = log_rate(H, 1.0, 1.0), step_size_bias(H)
        self.skip = nn.Linear(E, H)  # its bias is D
        nn.init.ones_(self.skip.bias)
        self.norm = GatedRMSNorm(E, eps=eps)
        self.out = nn.Linear(E, width, bias=False)

    def forward(self, x: Tensor, state: None = None, reset: Tensor | None = None) -> tuple[Tensor, None]:
        whole(self, x, state, reset)
        z, u, dt = parts(self.inp, x, self.sizes)
        u, *maps = F.silu(self.conv(u, reset=reset)).split(self.inner, -1)
        B, C, B_back, C_back = (heads(p, self.num_groups) for p in maps)
        values = heads(u, self.num_heads)
        dt = F.softplus(wide(both_ways(*dt.chunk(2, -1))) + wide(self.dt_bias))
        g, resets = -wide(self.log_rate).exp() * dt, both_resets(reset)
        v = scaled(both_ways(values), dt)
        y, _ = ops.outer(both_ways(C, C_back), both_ways(B, B_back), v, g, reset=resets)
        forward, backward = apart(previous(y.flatten(2), None, resets))
        y = forward + backward + (self.skip(u)[..., None] * values).flatten(2)
        return self.out(self.norm(y, z)), None
