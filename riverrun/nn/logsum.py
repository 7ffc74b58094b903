"""Running sums of exponentials, in logarithms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from riverrun import ops


def log_sums(k: Tensor, before: Tensor | None = None, reset: Tensor | None = None) -> Tensor:
    """z_t = log(e^{z_{t-1}} + e^{k_t}) for k (B, T, ...); z_0 is `before` (B, ...) or -∞, as at a reset.

    z = m + log c with c_t = e^{m_{t-1} - m_t} c_{t-1} + e^{k_t - m_t}, and m the largest k so far: z does not
    depend on it, so it needs no gradient.
    """
    T = k.shape[1]
    if before is not None:
        k = torch.cat([before[:, None], k], 1)
        reset = None if reset is None else F.pad(reset, (1, 0))
    flat = k.flatten(2)
    with torch.no_grad():
        m = largest(flat, reset)
        decay = (torch.cat([m[:, :1], m[:, :-1]], 1) - m).clamp(max=0).exp()
    c, _ = ops.diagonal(decay, (flat - m).exp(), reset=reset)
    return (m + c.log()).view_as(k)[:, -T:]


def largest(k: Tensor, reset: Tensor | None) -> Tensor:
    """The largest k (B, T, D) so far in each token's document, up to rounding."""
    if reset is None:
        return k.cummax(1).values
    step = k.amax() - k.amin() + 1  # later documents above all earlier ones
    return k.gather(1, (k + step * reset.cumsum(1)[..., None]).cummax(1).indices)
