"""One map for several results: wide matrix products are fast ones, and narrow ones cost a launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .remade import plain

WHOLE = 16  # numbers: the rows of what is split then lie on 32 bytes in half precision
MANY = 256  # rows from which a product takes longer than padding its weight


def parts(layer: nn.Module, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """`layer(x)`, split along its last axis.

    On a GPU a width such as 3,084 leaves cuBLAS with kernels a third as fast (1.35 instead of 0.45 ms for
    65,536 rows of 768, on an H200), and other kernels with loads of two bytes: there a weight is padded.
    """
    many = x.is_cuda and x.numel() >= MANY * x.shape[-1]
    if many and sum(sizes) % WHOLE and not torch.compiler.is_compiling() and plain(layer):
        return padded(layer, x, sizes)
    return layer(x).split(list(sizes), -1)


def padded(layer: Any, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The same with rows of zeros below the weight; x may have any number of axes."""
    more = -sum(sizes) % WHOLE
    return F.linear(x, F.pad(layer.weight, (0, 0, 0, more))).split([*sizes, more], -1)[:-1]
