"""Several steps of an op for one token."""

from __future__ import annotations

import torch
from torch import Tensor


def among(x: Tensor, steps: int, at: int = 0) -> Tensor:
    """x (B, T, R, ...) at the steps at, ..., at + R - 1 of the `steps` of every token, zeros at the others.

    Returns (B, T · steps, ...).
    """
    (B, T, R), rest = x.shape[:3], x.shape[3:]
    before, after = x.new_zeros(B, T, at, *rest), x.new_zeros(B, T, steps - at - R, *rest)
    return torch.cat([before, x, after], 2).flatten(1, 2)
