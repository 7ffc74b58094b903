"""Gated slot attention: softmax attention over M slots, each of which forgets and fills at its own rate.

    q, k, v = silu(W x)    g = log σ(W_f x) / τ    s = 1 - e^g, one of each a slot
    K_t = diag(e^{g_t}) K_{t-1} + s_t k_tᵀ    V_t = diag(e^{g_t}) V_{t-1} + s_t v_tᵀ    K, V: a row a slot
    y_t = V_tᵀ softmax(K_t q_t)    out = W_o norm(silu(y))

V is read by slots, which are its keys: the op `outer`. K is read by what its slots hold, which is the op
`selective` with dt = -g, A = -1 and input s / dt, one (batch, head) a sequence.
Source: Zhang et al. 2024 (arXiv:2409.07146), with 64 slots and τ = 8; the layer as in flash-linear-attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import RMSNorm, carried, checked, fitting, head_width, heads, wide


class GSA(nn.Module):
    """arXiv:2409.07146. State: (K (B, H, M, P), V (B, H, M, P)) with M = num_slots, P = width / H."""

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        num_slots: int = 64,
        temperature: float = 8.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        head_width(width, num_heads)
        self.width, self.num_heads, self.num_slots = width, num_heads, num_slots
        self.temperature = temperature
        self.sizes = (width, width, width, num_heads * num_slots)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, f]
        self.norm = RMSNorm(width, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        slots, S = carried(self, x, state, reset, 2)
        B, H, M = x.shape[0], self.num_heads, self.num_slots
        slots = fitting(self, slots, B, H, M, self.width // H)
        q, k, v, f = (heads(p, H) for p in self.inp(x).split(self.sizes, -1))
        g = F.logsigmoid(wide(f)) / self.temperature

        def rows(u: Tensor) -> Tensor:  # (B, T, H, ·) -> (B·H, T, ·)
            return u.transpose(1, 2).flatten(0, 1)

        dt = rows(-g).clamp(min=1e-20)  # a slot that keeps everything: s / dt is 1 there, not 0 / 0
        score, slots = ops.selective(
            -torch.expm1(-dt) / dt, dt, dt.new_full((M, k.shape[3]), -1), rows(F.silu(k)), rows(F.silu(q)),
            state=None if slots is None else slots.flatten(0, 1),
            reset=None if reset is None else reset.repeat_interleave(H, 0),
        )  # fmt: skip
        p = score.unflatten(0, (B, H)).transpose(1, 2).softmax(-1).to(v.dtype)
        y, S = ops.outer(p, -torch.expm1(g), F.silu(v), g, state=S, reset=reset)
        return self.out(self.norm(F.silu(y).flatten(2))), (slots.unflatten(0, (B, H)), S)
