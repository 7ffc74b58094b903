"""Running sums of exponentials, in logarithms."""

from __future__ import annotations

import torch
from torch import Tensor

from riverrun.algorithms.scan import scan


def log_sums(k: Tensor, before: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """z_t = log(e^{z_{t-1}} + e^{k_t}) for k (B, T, ...); z_0 is `before` (B, ...) or -∞, as at a reset."""
    T = k.shape[1]
    if before is not None:
        k = torch.cat([before[:, None], k], 1)
        reset = None if reset is None else torch.cat([torch.zeros_like(reset[:, :1]), reset], 1)
    if reset is None:
        return k.logcumsumexp(1)[:, -T:]
    (z,) = scan(lambda left, right: (torch.logaddexp(left[0], right[0]),), (k,), reset)
    return z[:, -T:]
