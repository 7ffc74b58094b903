"""How close is equal, and why."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from riverrun.state import State, leaves

# float64 rounds by 1.1e-16. A sum over a state of 1e3 terms carried through 1e3 steps loses at most 1e6 of
# those, 1e-10; another factor 10 is for the exponentials. A mistake of meaning is of order 1e-2 or more.
EXACT = 1e-9

# one rounding to half precision is 2^-8 (bfloat16, 8 bits) or 2^-11 (float16, 11 bits) relative to the value
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def error(a: Tensor, b: Tensor) -> float:
    """max |a - b| relative to max |b|; infinite when either is not finite where the other is."""
    a, b = a.detach(), b.detach()
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)) or not torch.equal(a[~both], b[~both]):
        return float("inf")
    if not both.any():
        return 0.0
    scale = b[both].abs().max().clamp_min(1e-30)
    return float((a[both] - b[both]).abs().max() / scale)


def close(a: Tensor, b: Tensor, what: str, bound: float = EXACT) -> None:
    """Raise AssertionError unless a and b have one shape and differ by at most `bound` of b's largest
    entry."""
    assert a.shape == b.shape, f"{what}: shape {tuple(a.shape)} against {tuple(b.shape)}"
    found = error(a, b)
    assert found <= bound, f"{what}: relative error {found:.2e}, bound {bound:.0e}"


def close_all(a: Iterable[Tensor], b: Iterable[Tensor], what: str, bound: float = EXACT) -> None:
    """`close` for every pair."""
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        close(x, y, f"{what} {i}", bound)


def close_states(a: State, b: State, what: str, bound: float = EXACT) -> None:
    """`close` for every tensor of two states."""
    close_all(leaves(a), leaves(b), f"{what}, state tensor", bound)


def rounded(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Raise AssertionError unless a, computed in half precision, is b up to what rounding explains.

    Some 16 roundings of half a unit lie on a path through projections, gates, memory and norms; they add like
    a random walk, sqrt(16) / 2 = 2 units. Divisions by small norms amplify: ten times that.
    """
    assert torch.isfinite(a).all(), f"not finite in {dtype}"
    found = float((a.detach().double() - b.detach()).norm() / b.detach().norm())
    assert found < 20 * UNIT[dtype], f"relative error {found:.4f} in {dtype}, bound {20 * UNIT[dtype]:.4f}"
