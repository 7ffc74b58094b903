"""Selective state space: a diagonal recurrence per channel whose step size and maps in and out are data.

    h_t[e, n] = a_t[e, n] h_{t-1}[e, n] + dt_t[e] B_t[n] x_t[e]    a_t = e^{dt_t A}
    y_t[e] = Σ_n C_t[n] h_t[e, n]

    x, dt, y: (B, T, E)    A: (E, N), ≤ 0    B, C: (B, T, N)    h: (B, E, N)    dt ≥ 0

With `low` (E, N), in [-1, 1], a_t = e^{dt_t A} + low (1 - e^{dt_t A}), which falls from 1 to low as dt grows,
not to 0: low = -1 is 2 e^{dt A} - 1, eigenvalues in [-1, 1]. The exponent is ≤ 0 as it was, and |a_t| ≤ 1.

A is held exactly (zero-order hold), B by Euler's rule, as in the paper's code. No implementation but this one
and its plain parallel form ever stores the T × E × N states.
Sources: Gu & Dao 2023 (Mamba, arXiv:2312.00752) eq. 2-4 and algorithm 2; Grazzi et al. 2025
(arXiv:2411.12537) and its code for low = -1, which leaves the input's term as it is.
"""

import torch
from torch import Tensor

from .fold import Recurrence


def decay(dt: Tensor, A: Tensor, low: Tensor | None) -> Tensor:
    """a (..., E, N) for step sizes (..., E)."""
    a = (dt[..., None] * A).exp()
    return a if low is None else a + low * (1 - a)  # exactly 1 and low at its ends


def step(
    h: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, low: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    h = decay(dt, A, low) * h + (dt * x)[..., None] * B[:, None]
    return h, torch.einsum("ben,bn->be", h, C)


def initial(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, low: Tensor | None = None) -> Tensor:
    return x.new_zeros(x.shape[0], *A.shape)


selective = Recurrence(
    "selective", step, initial,
    {"x": "B T E", "dt": "B T E", "A": "E N", "B": "B T N", "C": "B T N", "low": "E N ?"},
    y="B T E", state="B E N", like="x",
)  # fmt: skip
