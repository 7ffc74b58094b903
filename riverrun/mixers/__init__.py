"""Sequence mixers, (B, T, D) -> (B, T, D), that hand their state to the caller: one file and one row each.

    mixer = build("gated_deltanet", width=256, num_heads=4)
    y, state = mixer(x, state=None, reset=None)        any T ≥ 1: the same call trains, prefills and decodes

To add one: write `mixers/NAME.py` and its row in `mixers/table.py`. Tests, docs and the command line find it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from riverrun.config import nearest

from .table import MIXERS, Row

__all__ = ["MIXERS", "Row", "build", "mixer_class", "row"]


def row(name: str) -> Row:
    """The row of a mixer. Raises ValueError with the nearest name when there is none."""
    if name not in MIXERS:
        raise ValueError(f"no mixer '{name}'; {nearest(name, MIXERS)}")
    return MIXERS[name]


def mixer_class(name: str) -> type[nn.Module]:
    """The class of a mixer, imported now."""
    cls = row(name).cls
    return getattr(import_module(f"{__name__}.{name}"), cls)


def build(name: str, width: int, **args: Any) -> nn.Module:
    """The mixer called `name` at model width `width`; `args` are its constructor's.

    Raises ValueError for a name that is no mixer and an argument that the mixer does not take, with the
    nearest one, and for a value that it cannot be.
    """
    return mixer_class(name)(width, **args)
