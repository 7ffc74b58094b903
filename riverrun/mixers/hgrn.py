"""HGRN: complex leaky integrators whose forget gate has a floor and also says how much is written.

    λ = γ + (1 - γ) σ(W_λ x)    h_t = λ_t e^{iθ} ⊙ h_{t-1} + (1 - λ_t) ⊙ c_t    c = silu(W_c x), complex
    out = W_o (norm([Re h, Im h]) ⊙ silu(W_z x))

Source: Qin et al. 2023 (arXiv:2311.04823) sec. 3, with learned θ. `rotate=False` leaves the rotation and
the imaginary parts out, as later code by its authors does, whose RMS norm stands here for a layer norm. The
floor γ, which the paper learns so that it rises from layer to layer, is a constant of each layer here: a
mixer does not see the others.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import FRACTION, GatedRMSNorm, carried, checked, fitting, heads, wide


class HGRN(nn.Module):
    """arXiv:2311.04823. State: h (B, E, 2), real and imaginary parts, or (B, E) without rotation; E = width.

    `lower_bound` γ in [0, 1) of the forget gates.
    """

    @checked
    def __init__(
        self,
        width: int,
        lower_bound: Annotated[float, FRACTION] = 0.0,
        rotate: bool = True,
        eps: float = 1e-6,
    ):
        super().__init__()
        parts = 2 if rotate else 1
        self.width, self.lower_bound = width, lower_bound
        self.sizes = (parts * width, width, parts * width)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [c as pairs (Re, Im), λ, z]
        self.angle = nn.Parameter(1e4 ** (-2 * torch.arange(width) / width)) if rotate else None  # θ
        self.norm = GatedRMSNorm(parts * width, eps=eps)
        self.out = nn.Linear(parts * width, width, bias=False)

    def forward(
        self, x: Tensor, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        state = carried(self, x, state, reset)
        c, f, z = self.inp(x).split(self.sizes, -1)
        c, f, bound = F.silu(wide(c)), wide(f), self.lower_bound
        keep, write = bound + (1 - bound) * f.sigmoid(), (1 - bound) * (-f).sigmoid()
        if self.angle is None:
            h, state = ops.diagonal(keep, write * c, state=state, reset=reset)
            return self.out(self.norm(h.to(x.dtype), z)), state
        state = fitting(self, state, x.shape[0], self.width, 2)
        angle = wide(self.angle)
        turn = torch.stack([angle.cos(), angle.sin()], -1)
        h, last = ops.diagonal(
            torch.view_as_complex(keep[..., None] * turn),
            torch.view_as_complex(write[..., None] * heads(c, self.width)),
            state=None if state is None else torch.view_as_complex(state),
            reset=reset,
        )
        y = torch.view_as_real(h).flatten(-2).to(x.dtype)
        return self.out(self.norm(y, z)), torch.view_as_real(last)
