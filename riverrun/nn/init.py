"""Initial values of parameters that are neither matrices nor norms: decay rates and step sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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
