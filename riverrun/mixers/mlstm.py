"""mLSTM: the LSTM whose cell is a matrix, written by an exponential input gate and read through a normaliser.

    q, k, v, o, i, f = W x + c    i = cap(i)    f = log σ(cap(f))    cap(u) = 15 tanh(u / 15)
    C_t = e^{f_t} C_{t-1} + e^{i_t} k_t v_tᵀ    n_t = e^{f_t} n_{t-1} + e^{i_t} k_t
    h_t = C_tᵀ q_t / max(|n_tᵀ q_t|, 1), q scaled by K^{-1/2}    y = W_o (norm(h) ⊙ σ(o))

Source: Beck et al. 2024 (xLSTM, arXiv:2405.04517) eq. 19-27; the layer, its soft caps and K = V / 2 are those
of Beck et al. 2025 (xLSTM 7B, arXiv:2503.13427).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import HeadNorm, carried, checked, head_width, heads, parts, wide


class MLSTM(nn.Module):
    """arXiv:2405.04517. State: (C (B, H, K, V), n (B, H, K), m (B, H)) with V = width / H, C and n scaled by
    e^{-m}.

    K = key_width, V / 2 unless given.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        key_width: int | None = None,
        cap: float = 15.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        V = head_width(width, num_heads)
        K = key_width or -(-V // 2)
        self.width, self.num_heads, self.key_width, self.cap = width, num_heads, K, cap
        self.sizes = (num_heads * K, num_heads * K, width, width, 2 * num_heads)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, o, (i, f)]
        # write little and keep much at first: the paper's way to stable training
        self.gate_bias = nn.Parameter(
            torch.cat([torch.full((num_heads,), -10.0), torch.linspace(3, 6, num_heads)])
        )
        self.norm = HeadNorm(width, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        state = carried(self, x, state, reset)
        q, k, v, o, gates = parts(self.inp, x, self.sizes)
        q, k, v = (heads(p, self.num_heads) for p in (q * self.key_width**-0.5, k, v))
        i, f = (self.cap * torch.tanh(wide(gates + self.gate_bias) / self.cap)).chunk(2, -1)
        y, state = ops.mlstm(q, k, v, F.logsigmoid(f), i, state=state, reset=reset)
        return self.out(self.norm(y, o.sigmoid())), state
