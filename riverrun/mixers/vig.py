"""ViG: gated linear attention both ways in one scan, with a gate for each direction, beside a local path.

    l = silu(conv(x))    [q, k, v, r] = W l    [g, g'] = log σ(U r + c) / τ
    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ    S'_t = diag(e^{g'_t}) S'_{t+1} + k_t v_tᵀ
    o_t = (S_t + S'_t)ᵀ q_t / (2 sqrt(K))    z = σ(W_z l + c_z)    y = W_o (norm(o) ⊙ z + norm'(l) ⊙ (1 - z))

The convolution looks around every token, in a picture in both dimensions; norms are by head, with one weight
for all. Source: Liao et al. 2024 (arXiv:2405.18425); the layout of its code, with its τ = 16 and K = V / 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import (
    LocalConv,
    RMSNorm,
    apart,
    both_resets,
    both_ways,
    checked,
    head_width,
    heads,
    whole,
    wide,
)


class ViG(nn.Module):
    """arXiv:2405.18425. State: none, it sees both ways. K = key_width, half of V = width / H unless given.

    `columns`: how many tokens make a row of a picture; None for sequences.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        key_width: int | None = None,
        rank: int = 16,
        temperature: float = 16.0,
        window: int = 3,
        columns: int | None = None,
        eps: float = 1e-6,
    ):
        super().__init__()
        V = head_width(width, num_heads)
        K = key_width or -(-V // 2)
        self.width, self.num_heads, self.temperature, self.columns = width, num_heads, temperature, columns
        self.sizes, self.scale = (num_heads * K, num_heads * K, width, rank), K**-0.5 / 2
        self.conv = LocalConv(width, (window, window), bias=False)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, r]
        self.decay = nn.Linear(rank, 2 * num_heads * K)  # [g, g']
        self.gate = nn.Linear(width, width)
        self.norm, self.local_norm = RMSNorm(V, eps), RMSNorm(V, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: None = None, reset: Tensor | None = None, columns: int | None = None
    ) -> tuple[Tensor, None]:
        whole(self, x, state, reset)
        local = F.silu(self.conv(x, columns or self.columns, reset))
        q, k, v, low = self.inp(local).split(self.sizes, -1)
        q, k, v = (both_ways(heads(p, self.num_heads)) for p in (q * self.scale, k, v))
        g = F.logsigmoid(wide(both_ways(*self.decay(low).chunk(2, -1)))) / self.temperature
        y, _ = ops.outer(q, k, v, heads(g, self.num_heads), reset=both_resets(reset))
        forward, backward = apart(y)
        gate = heads(self.gate(local).sigmoid(), self.num_heads)
        seen, near = self.norm(forward + backward), self.local_norm(heads(local, self.num_heads))
        return self.out((seen * gate + near * (1 - gate)).flatten(2)), None
