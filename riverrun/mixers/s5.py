"""S5: one linear state space for all channels together, with complex eigenvalues in conjugate pairs.

    λ = -e^ρ + i ω    α = e^{λ dt}    h_t = α ⊙ h_{t-1} + (α - 1) / λ ⊙ B x_t    s_t = 2 Re(C h_t) + D ⊙ x_t
    y = u ⊙ σ(W u + b), u = gelu(s)

Zero-order hold, exact for inputs that are constant over a step dt. Each of the N states stands for itself and
its conjugate, hence the 2.
Source: Smith et al. 2023 (arXiv:2208.04933) eq. 2, 6 and sec. 3. At first ω are the eigenvalues of the normal
part of HiPPO-LegS (Gu et al. 2022, arXiv:2206.11893), and e^ρ is their real part, 1/2.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import carried, checked, fitting, wide
from riverrun.nn.init import hippo_frequencies


class S5(nn.Module):
    """arXiv:2208.04933. State: h (B, N, 2), real and imaginary parts, with N = num_states conjugate pairs."""

    @checked
    def __init__(self, width: int, num_states: int = 64):
        super().__init__()
        N = num_states
        self.width = width
        self.log_rate = nn.Parameter(torch.full((N,), math.log(0.5)))  # ρ
        self.frequency = nn.Parameter(hippo_frequencies(N))  # ω
        self.log_step = nn.Parameter(torch.empty(N).uniform_(math.log(1e-3), math.log(0.1)))
        self.inp = nn.Linear(width, 2 * N, bias=False)  # [Re B, Im B]
        self.read = nn.Linear(2 * N, width, bias=False)  # [Re C, Im C]
        self.skip = nn.Parameter(torch.randn(width))
        self.gate = nn.Linear(width, width)

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        N = self.log_rate.shape[0]
        state = fitting(self, carried(self, x, state, reset), x.shape[0], N, 2)
        rate = torch.complex(-wide(self.log_rate).exp(), wide(self.frequency))
        decay = (rate * wide(self.log_step).exp()).exp()
        drive = torch.complex(*wide(self.inp(x)).chunk(2, -1)) * ((decay - 1) / rate)
        h = None if state is None else torch.view_as_complex(state)
        h, last = ops.diagonal(decay.expand_as(drive), drive, state=h, reset=reset)
        s = 2 * self.read(torch.cat([h.real, -h.imag], -1).to(x.dtype)) + self.skip * x
        u = F.gelu(s)
        return u * self.gate(u).sigmoid(), torch.view_as_real(last)
