"""Softmax attention as a recurrence: carry the running maximum, the weight and the weighted sum.

    m_t = max(m_{t-1}, s_t)    c_t = e^{m_{t-1} - m_t} c_{t-1} + e^{s_t - m_t}
                               a_t = e^{m_{t-1} - m_t} a_{t-1} + e^{s_t - m_t} v_t        y_t = a_t / c_t

    s: (B, T, H)    v, y: (B, T, H, V)    state: (m (B, H), c (B, H), a (B, H, V));  m starts at -∞
Source: Feng et al. 2024 (Aaren, arXiv:2405.13956) sec. 3.1-3.2.
"""

import torch
from torch import Tensor

from .fold import Recurrence

Triple = tuple[Tensor, Tensor, Tensor]


def combine(left: Triple, right: Triple) -> Triple:
    """Merge two stretches of time, of which one must have a finite maximum; exact for any grouping."""
    (m1, c1, a1), (m2, c2, a2) = left, right
    m = torch.maximum(m1, m2)
    w1, w2 = (m1 - m).exp(), (m2 - m).exp()
    return m, w1 * c1 + w2 * c2, w1[..., None] * a1 + w2[..., None] * a2


def step(state: Triple, s: Tensor, v: Tensor) -> tuple[Triple, Tensor]:
    m, c, a = combine(state, (s, torch.ones_like(s), v))
    return (m, c, a), a / c[..., None]


def initial(s: Tensor, v: Tensor) -> Triple:
    return torch.full_like(s[:, 0], -torch.inf), torch.zeros_like(s[:, 0]), torch.zeros_like(v[:, 0])


softmax = Recurrence(
    "softmax",
    step,
    initial,
    {"s": "B T H", "v": "B T H V"},
    y="B T H V",
    state=("B H", "B H", "B H V"),
    like="v",
)
