"""Every head's row times a number of its own."""

from __future__ import annotations

from torch import Tensor

from riverrun.kernels.cpu import scaled as cpu
from riverrun.ops import gpu

from .norm import in_one_pass


def scaled(x: Tensor, s: Tensor) -> Tensor:
    """s x for x (B, T, H, P) and s (B, T, H), in the wider of their dtypes, then rounded to x's."""
    if gpu is not None and gpu.scaled.refuses(x, s) is None:
        return gpu.scaled.scaled(x, s)
    if in_one_pass(x) and s.dtype == x.dtype:
        return cpu.scaled(x, s)
    return (s[..., None] * x).to(x.dtype)
