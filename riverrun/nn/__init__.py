"""Layers that do not mix time, and a few that do: short convolutions, attention, both ways at once."""

from .attend import attend
from .average import WeightedAverage
from .both import apart, both_resets, both_ways, each_document, pooled
from .check import FRACTION, NOT_NEGATIVE, Only, carried, checked, fitting, head_width, whole
from .conv import LocalConv, ShortConv, previous
from .lowrank import LowRank
from .mlp import GatedMLP
from .norm import GatedRMSNorm, HeadNorm, RMSNorm, unit
from .parts import parts
from .removal import removal
from .rotary import positions, rotate
from .scaled import scaled
from .selective import SelectiveScan
from .shape import heads, wide
from .shift import shifted

__all__ = [
    "FRACTION",
    "NOT_NEGATIVE",
    "GatedMLP",
    "GatedRMSNorm",
    "HeadNorm",
    "LocalConv",
    "LowRank",
    "Only",
    "RMSNorm",
    "SelectiveScan",
    "ShortConv",
    "WeightedAverage",
    "apart",
    "attend",
    "both_resets",
    "both_ways",
    "carried",
    "checked",
    "each_document",
    "fitting",
    "head_width",
    "heads",
    "parts",
    "pooled",
    "positions",
    "previous",
    "removal",
    "rotate",
    "scaled",
    "shifted",
    "unit",
    "whole",
    "wide",
]
