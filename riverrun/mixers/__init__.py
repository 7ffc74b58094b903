"""Sequence mixers, (B, T, D) -> (B, T, D), that hand their state to the caller: one file and one row each.

    mixer = build("gated_deltanet", width=256, num_heads=4)
    y, state = mixer(x, state=None, reset=None)        any T ≥ 1: the same call trains, prefills and decodes

To add one: write `mixers/NAME.py` and its row here. Tests, docs and the command line find the row.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Row:
    """One mixer: where it is, what it stands on, and what may be promised of it."""

    cls: str
    arxiv: str  # the paper whose equations it follows; "" for what is older than arXiv
    op: str  # the recurrence under it, a name in riverrun.ops.OPS, or "" when it stands on none
    causal: bool = True
    state: str = "constant"  # its bytes against T: "constant", "window", "grows" or "none"
    small: dict[str, Any] = field(
        default_factory=dict
    )  # arguments of the instance that the laws build at width 16
    breaks: dict[str, str] = field(default_factory=dict)  # law -> why it does not hold; such a law must fail
    golden: str = ""  # a file in tests/golden, or the reason why there is none
    compiles: bool = True  # torch.compile(fullgraph=True) takes it


MIXERS: dict[str, Row] = {
    "gated_deltanet": Row(
        "GatedDeltaNet",
        "2412.06464",
        op="delta",
        small=dict(num_heads=2),
        golden="gated_deltanet.safetensors",
    ),
    "mamba": Row("Mamba", "2312.00752", op="selective", small=dict(num_states=4), golden="mamba.safetensors"),
}


def row(name: str) -> Row:
    """The row of a mixer. Raises ValueError with the nearest name when there is none."""
    if name not in MIXERS:
        near = get_close_matches(name, MIXERS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {sorted(MIXERS)}"
        raise ValueError(f"no mixer '{name}'; {hint}")
    return MIXERS[name]


def mixer_class(name: str) -> type[nn.Module]:
    """The class of a mixer, imported now."""
    cls = row(name).cls
    return getattr(import_module(f"{__name__}.{name}"), cls)


def build(name: str, width: int, **args: Any) -> nn.Module:
    """The mixer called `name` at model width `width`; `args` are its constructor's.

    Raises ValueError for a name that is no mixer and an argument that the mixer does not take, with the nearest one.
    """
    cls = mixer_class(name)
    accepted = list(inspect.signature(cls).parameters)[1:]
    for arg in args:
        if arg not in accepted:
            near = get_close_matches(arg, accepted, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {accepted}"
            raise ValueError(f"mixer '{name}' takes no argument '{arg}'; {hint}")
    return cls(width, **args)
