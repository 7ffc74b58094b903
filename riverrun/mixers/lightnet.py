"""LightNet, causal: memory that is a running mean, weighted by the exponentials of its keys.

    q = silu(W_q x)    k, v = W x    z_t = log(e^{z_{t-1}} + e^{k_t})    f_t = e^{z_{t-1} - z_t}
    S_t = diag(f_t) S_{t-1} + (1 - f_t) v_tᵀ    y_t = S_tᵀ q_t / sqrt(K)    out = W_o (norm(y) ⊙ silu(U V x))

Nothing is forgotten by distance: S_t is Σ_s softmax_s(k_s) v_sᵀ over s ≤ t. f_t = σ(z_{t-1} - k_t), without
cancellation. With `base`, q and k carry their positions (LRPE), which doubles K; with `tpe`, leaky sums of x
are added to it first, which the paper does once, before its first layer.
Source: Qin et al. 2024 (arXiv:2405.21022); the layer as in flash-linear-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import GatedRMSNorm, LowRank, carried, checked, fitting, head_width, heads, positions, wide
from riverrun.nn.axes import TPE, lrpe
from riverrun.nn.logsum import log_sums
from riverrun.state import State


class LightNet(nn.Module):
    """arXiv:2405.21022. State: (S (B, H, K, V), z (B, H, K), position (B)); V = width / H.

    K = key_width, V unless given, and twice that in S with `base`; with `tpe` its sum (B, width) comes last.
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
        eps: float = 1e-6,
    ):
        super().__init__()
        K = key_width or head_width(width, num_heads)
        self.width, self.num_heads, self.key_width, self.base = width, num_heads, K, base
        self.sizes = (num_heads * K, num_heads * K, width)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v]
        self.gate = LowRank(width, rank, width)
        self.tpe = TPE(width) if tpe else None
        self.norm = GatedRMSNorm(width, eps=eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, state: State = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        S, last, start, *sums = carried(self, x, state, reset, 3 if self.tpe is None else 4)
        B, H, K = x.shape[0], self.num_heads, self.key_width
        last, start = fitting(self, last, B, H, K), fitting(self, start, B)
        if self.tpe is not None:
            added, *sums = self.tpe.along(0, x, sums[0], reset)
            x = x + added.to(x.dtype)
        q, k, v = (heads(p, H) for p in self.inp(x).split(self.sizes, -1))
        q, k = F.silu(q) * K**-0.5, wide(k)
        z = log_sums(k, last, reset)
        before = torch.cat([z[:, :1] if last is None else last[:, None], z[:, :-1]], 1)
        forget, write = F.logsigmoid(before - k), (k - before).sigmoid()
        first = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device) if reset is None else reset
        if last is None:  # a document's first token is all there is to average
            first = torch.cat([torch.ones_like(first[:, :1]), first[:, 1:]], 1)
        forget, write = (
            forget.masked_fill(first[..., None, None], 0),
            write.masked_fill(first[..., None, None], 1),
        )
        position, start = positions(x, start, reset)
        if self.base is not None:
            q, write = (lrpe(p, position[..., None], self.base) for p in (q, write))
            forget = torch.cat([forget, forget], -1)
        y, S = ops.outer(q, write, v, forget, state=S, reset=reset)
        return self.out(self.norm(y.flatten(2), self.gate(x))), (S, z[:, -1], start, *sums)
