"""Initial values of parameters that are neither matrices nor norms: decay rates and step sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .check import head_width


def step_size_bias(size: int, low: float = 1e-3, high: float = 0.1) -> nn.Parameter:
    """b with softplus(b) log-uniform in [low, high]: Gu & Dao 2023 (arXiv:2312.00752) sec. 3.6."""
    dt = torch.exp(torch.empty(size).uniform_(math.log(low), math.log(high)))
    return nn.Parameter(inverse_softplus(dt))


def inverse_softplus(y: Tensor) -> Tensor:
    """x with softplus(x) = y, for y > 0, without overflow for large y."""
    return y + torch.log(-torch.expm1(-y))


def log_rate(size: int, low: float = 1.0, high: float = 16.0) -> nn.Parameter:
    """log A with A uniform in [low, high]: Dao & Gu 2024 (arXiv:2405.21060), whose code names it A_log."""
    return nn.Parameter(torch.empty(size).uniform_(low, high).log())


def recurrent(gates: int, width: int, num_heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """R (gates, H, P, P) and c (gates, H, P), uniform in ± P^{-1/2} as in `torch.nn.LSTM`."""
    P = head_width(width, num_heads)
    R, c = torch.empty(gates, num_heads, P, P), torch.empty(gates, num_heads, P)
    return nn.Parameter(R.uniform_(-(P**-0.5), P**-0.5)), nn.Parameter(c.uniform_(-(P**-0.5), P**-0.5))


def hippo_frequencies(size: int) -> Tensor:
    """Imaginary parts, the positive ones, of the eigenvalues of HiPPO-LegS's normal part of order 2·size.

    Gu et al. 2022 (arXiv:2206.11893) sec. 3: A = N - p pᵀ with N = -1/2 + a skew-symmetric matrix.
    """
    p = torch.sqrt(torch.arange(2 * size, dtype=torch.float64) + 0.5)
    skew = (p[:, None] * p).tril(-1)
    skew = skew - skew.mT
    return torch.linalg.eigvalsh(1j * skew)[size:].to(torch.get_default_dtype())
