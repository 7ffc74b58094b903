"""Selective state space: a diagonal recurrence per channel whose step size and maps in and out are data.

    h_t[e, n] = exp(dt_t[e] A[e, n]) h_{t-1}[e, n] + dt_t[e] B_t[n] x_t[e]
    y_t[e] = Σ_n C_t[n] h_t[e, n]

    x, dt, y: (B, T, E)    A: (E, N), ≤ 0    B, C: (B, T, N)    h: (B, E, N)    dt ≥ 0

A is held exactly (zero-order hold), B by Euler's rule, as in the paper's code. No implementation but this one
and its plain parallel form ever stores the T × E × N states.
Source: Gu & Dao 2023 (Mamba, arXiv:2312.00752) eq. 2-4 and algorithm 2.
"""

import torch
from torch import Tensor

from .fold import Recurrence


def step(h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    h = (dt[..., None] * A).exp() * h + (dt * x)[..., None] * B[:, None]
    return h, torch.einsum("ben,bn->be", h, C)


def initial(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return x.new_zeros(x.shape[0], *A.shape)


selective = Recurrence(
    "selective", step, initial,
    {"x": "B T E", "dt": "B T E", "A": "E N", "B": "B T N", "C": "B T N"}, y="B T E", state="B E N", like="x",
)  # fmt: skip
