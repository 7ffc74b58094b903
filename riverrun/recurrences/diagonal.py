"""Diagonal linear recurrence: every channel is its own leaky integrator.

    h_t = a_t ⊙ h_{t-1} + b_t          a, b, y: (B, T, D)    h: (B, D)    y_t = h_t

Real or complex. |a| ≤ 1 keeps it stable; nothing here requires it.
Sources: Martin & Cundy 2018 (arXiv:1709.04057) eq. 5; Smith et al. 2023 (S5, arXiv:2208.04933) sec. 2.2.
"""

from torch import Tensor

from .fold import Recurrence


def step(h: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    h = a * h + b
    return h, h


def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Compose two stretches of time: (a, b) then (a', b') is (a'a, a'b + b'). Not commutative."""
    (a1, b1), (a2, b2) = left, right
    return a2 * a1, a2 * b1 + b2


def initial(a: Tensor, b: Tensor) -> Tensor:
    return b.new_zeros(b.shape[0], b.shape[2])


diagonal = Recurrence(
    "diagonal", step, initial, {"a": "B T D", "b": "B T D"}, y="B T D", state="B D", like="b", complex=True
)
