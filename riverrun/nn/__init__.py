"""Layers that do not mix time, and the short convolution that does."""

from .conv import ShortConv
from .mlp import GatedMLP
from .norm import GatedRMSNorm, RMSNorm
from .shape import heads, wide

__all__ = ["GatedMLP", "GatedRMSNorm", "RMSNorm", "ShortConv", "heads", "wide"]
