"""Triton kernels: chunks on tensor cores, scans in registers, single steps. Importing compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import attend as attend  # no op but what layers run, as the modules below are
from . import cells, conv, delta, dplr, memory, outer, scan, selective, softmax
from . import headnorm as headnorm
from . import loss as loss
from . import norm as norm
from . import removal as removal
from . import rotary as rotary
from . import scaled as scaled
from . import shift as shift
from . import swiglu as swiglu

KERNELS: dict[str, Callable[..., Any]] = {
    "outer": outer.outer,
    "mlstm": outer.mlstm,
    "delta": delta.delta,
    "dplr": dplr.dplr,
    "diagonal": scan.diagonal,
    "selective": selective.selective,
    "softmax": softmax.softmax,
    "short_conv": conv.short_conv,
    "short_conv_silu": conv.short_conv_silu,
    "elman": cells.elman,
    "lstm": cells.lstm,
    "gru": cells.gru,
    "slstm": cells.slstm,
}


def refuses(name: str, args: tuple[Tensor | None, ...]) -> str | None:
    """Why the kernel of op `name` cannot run these arguments, or None."""
    if any(x is not None and x.dtype in (torch.float64, torch.complex128) for x in args):
        return "it computes in float32, and an argument is float64"
    if name in memory.OPS:
        return memory.refuses(args[1])
    if name in cells.GATES:
        return cells.refuses(args[0], args[1])
    if name == "softmax":
        return softmax.refuses(args[1])
    if name in ("short_conv", "short_conv_silu"):
        return conv.refuses(args[1])
    return None
