"""MambaMixer: Mamba over the tokens, then Mamba both ways over the channels of every token.

    y = Mamba(x)    c: y_t as a sequence of D / P steps of P channels each    [u, z] = W c
    y' = W' ((S(u) + flip(S'(flip u))) ⊙ silu(z)), S and S' Mamba's recurrence with weights of their own
    out = α y + β y'

In the paper a step's features are one channel's values at all times, so its weights fix T. Here they are P
channels at one time: T is free, nothing looks ahead, a state continues. α = 1, β = 0 is Mamba.
Its blocks also read earlier ones: the token mixer Σ_{i < l} α_i y_i + β_i y'_i, the channel mixer Σ_{i ≤ l}
θ_i y_i + Σ_{i < l} γ_i y'_i. That is of a stack, `riverrun.nn.WeightedAverage`; here θ_l = 1 and the rest 0.
Source: Behrouz et al. 2024 (arXiv:2403.19888) sec. 3.2, Gu & Dao 2023 (arXiv:2312.00752). Without code.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.nn import SelectiveScan, WeightedAverage, carried, checked, head_width


class MambaMixer(nn.Module):
    """arXiv:2403.19888. State: (h (B, E, N), conv (B, window - 1, E)), of tokens, with E = expand · width."""

    @checked
    def __init__(
        self,
        width: int,
        num_states: int = 16,
        expand: int = 2,
        window: int = 4,
        channel_width: int = 8,
        channel_states: int = 8,
    ):
        super().__init__()
        E, P = expand * width, channel_width
        head_width(width, P, "channel_width")
        self.width, self.channel_width = width, P
        self.inp = nn.Linear(width, 2 * E, bias=False)  # [u, z]
        self.scan = SelectiveScan(E, num_states, -(-width // 16), window)
        self.out = nn.Linear(E, width, bias=False)
        self.channel_inp = nn.Linear(P, 2 * expand * P, bias=False)  # [u, z]
        self.forwards, self.backwards = (
            SelectiveScan(expand * P, channel_states, -(-P // 16), window) for _ in range(2)
        )
        self.channel_out = nn.Linear(expand * P, P, bias=False)
        self.average = WeightedAverage(2)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        h, past = carried(self, x, state, reset, 2)
        u, z = self.inp(x).chunk(2, -1)
        y, state = self.scan(u, h, past, reset)
        y = self.out(y * F.silu(z))
        return self.average([y, self.channels(y)]), state

    def channels(self, x: Tensor) -> Tensor:
        """The channel mixer on x (B, T, D): every token by itself, a row of D / P steps."""
        u, z = self.channel_inp(x.reshape(-1, self.width // self.channel_width, self.channel_width)).chunk(
            2, -1
        )
        forward, _ = self.forwards(u)
        backward, _ = self.backwards(u.flip(1))
        return self.channel_out((forward + backward.flip(1)) * F.silu(z)).reshape(x.shape)
