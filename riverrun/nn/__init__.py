"""Layers that do not mix time, and two that do: the short convolution and attention."""

from .attend import attend
from .check import carried, fitting, head_width
from .conv import ShortConv, previous
from .lowrank import LowRank
from .mlp import GatedMLP
from .norm import GatedRMSNorm, HeadNorm, RMSNorm, unit
from .rotary import positions, rotate
from .shape import heads, wide

__all__ = [
    "GatedMLP",
    "GatedRMSNorm",
    "HeadNorm",
    "LowRank",
    "RMSNorm",
    "ShortConv",
    "attend",
    "carried",
    "fitting",
    "head_width",
    "heads",
    "positions",
    "previous",
    "rotate",
    "unit",
    "wide",
]
