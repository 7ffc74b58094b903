"""Transitions with eigenvalues in [-1, 1] instead of [0, 1], which let one layer track parity.

    delta rule    I - β k kᵀ with |k| = 1 has the eigenvalue 1 - β along k: β in [0, 2], not [0, 1]
    Mamba         2 exp(dt A) - 1 for exp(dt A), `low` = -1 of the op `selective`; the input term stays dt B x

Source: Grazzi et al. 2025 (arXiv:2411.12537), and its code for the input term of Mamba.
"""

from __future__ import annotations

from torch import Tensor


def write_strength(b: Tensor, negative: bool) -> Tensor:
    """β of a delta rule from what is projected: σ(b), or 2 σ(b) for eigenvalues in [-1, 1]."""
    return 2 * b.sigmoid() if negative else b.sigmoid()
