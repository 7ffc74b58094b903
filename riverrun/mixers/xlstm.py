"""xLSTM's block around mLSTM: widened first, with a short convolution before queries, keys and gates.

    [u, z] = W x    c = silu(conv(u))    q, k, v = B_q c, B_k c, B_v u, each B of small diagonal blocks
    i, f = G [q, k, v] + b    h = mLSTM(q / sqrt(K), k, v, log σ(f), i)
    y = W_o ((norm(h) + s ⊙ c) ⊙ silu(z)), s a learned skip

`mlstm` is the narrower layer of the later xLSTM 7B. Here inner states are wider than the model, and K = V.
Source: Beck et al. 2024 (arXiv:2405.04517) fig. 11, and its code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import HeadNorm, ShortConv, carried, checked, head_width, heads, wide
from riverrun.nn.headwise import Headwise
from riverrun.state import State


class XLSTM(nn.Module):
    """arXiv:2405.04517. State: ((C (B, H, P, P), n (B, H, P), m (B, H)), conv (B, window - 1, E)).

    E = expand · width, P = E / H; C and n are scaled by e^{-m}. `block` channels share a block of q, k and v.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        expand: int = 2,
        block: int = 4,
        window: int = 4,
        eps: float = 1e-5,
    ):
        super().__init__()
        E, H = expand * width, num_heads
        self.width, self.num_heads, self.key_width = width, H, head_width(E, H)
        if E % block:
            raise ValueError(f"block = {block} does not divide the inner width {E}")
        self.inp = nn.Linear(width, 2 * E, bias=False)  # [u, z]
        self.conv = ShortConv(E, window, bias=True)
        self.qk, self.v = Headwise(E, E // block, 2), Headwise(E, E // block, 1)
        self.gate = nn.Linear(3 * E, 2 * H)  # [i, f]
        with (
            torch.no_grad()
        ):  # the same gates for all inputs at first, keeping much, some heads more than others
            self.gate.weight.zero_()
            self.gate.bias.copy_(torch.cat([0.1 * torch.randn(H), torch.linspace(3, 6, H)]))
        self.norm = HeadNorm(E, eps)
        self.skip = nn.Parameter(torch.ones(E))
        self.out = nn.Linear(E, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[State, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Tensor]]:
        C, past = carried(self, x, state, reset, 2)
        u, z = self.inp(x).chunk(2, -1)
        c, past = self.conv(u, past, reset)
        (q, k), (v,) = self.qk(c), self.v(u)
        i, f = wide(self.gate(torch.cat([q, k, v], -1))).chunk(2, -1)
        q, k, v = (heads(p, self.num_heads) for p in (q * self.key_width**-0.5, k, v))
        h, C = ops.mlstm(q, k, v, F.logsigmoid(f), i, state=C, reset=reset)
        return self.out((self.norm(h) + self.skip * c) * F.silu(z)), (C, past)
