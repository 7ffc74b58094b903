"""What laws look at: a mixer with known parameters, known inputs, and gradients that are never None."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from riverrun.state import leaves

BATCH, WIDTH = 2, 16
Make = Callable[[], nn.Module]


def instance(make: Make) -> nn.Module:
    """A mixer with the same parameters at every call, away from special values: zeros hide mistakes."""
    torch.manual_seed(0)
    mixer = make().double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def inputs(T: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(T + seed)
    return torch.randn(BATCH, T, WIDTH, dtype=torch.float64, generator=random)


def resets(T: int, *marks: tuple[int, int]) -> Tensor:
    """(BATCH, T) flags, set at the given (row, time)."""
    flags = torch.zeros(BATCH, T, dtype=torch.bool)
    for mark in marks:
        flags[mark] = True
    return flags


def gradients(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """Gradients of Σ |output|², zeros where there is none."""
    loss = torch.stack([o.abs().square().sum() for o in outputs if o.requires_grad]).sum()
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def floats(state) -> list[Tensor]:
    return [x for x in leaves(state) if x.is_floating_point()]
