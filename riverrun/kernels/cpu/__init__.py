"""Numba kernels: on a CPU the state fits in the L1 cache, and compiled code keeps it there.

Importing this compiles nothing; each kernel is compiled when first called and cached on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import cells, conv, matrix, scan, selective, softmax

KERNELS: dict[str, Callable[..., Any]] = {
    "diagonal": scan.diagonal,
    "selective": selective.selective,
    "outer": matrix.outer,
    "mlstm": matrix.mlstm,
    "delta": matrix.delta,
    "dplr": matrix.dplr,
    "softmax": softmax.softmax,
    "short_conv": conv.short_conv,
    "short_conv_silu": conv.short_conv_silu,
    "elman": cells.elman,
    "lstm": cells.lstm,
    "gru": cells.gru,
    "slstm": cells.slstm,
}


def refuses(name: str, args: tuple[Tensor | None, ...]) -> str | None:
    """Why the kernel of op `name` cannot run these arguments, or None: it takes every dtype and shape."""
    return None
