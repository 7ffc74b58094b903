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


BY_EQUATION = "its equation in float64 stands in tests/test_mixers.py: "

MIXERS: dict[str, Row] = {
    "attention": Row(
        "Attention",
        "1706.03762",
        op="",
        state="grows",
        small=dict(num_heads=4, num_key_heads=2),
        golden=BY_EQUATION + "masked softmax over all pairs",
    ),
    "deltanet": Row(
        "DeltaNet",
        "2406.06484",
        op="delta",
        small=dict(num_heads=2, max_beta=2.0),
        golden=BY_EQUATION + "the authors' code runs on GPUs only",
    ),
    "gated_deltanet": Row(
        "GatedDeltaNet",
        "2412.06464",
        op="delta",
        small=dict(num_heads=4, num_key_heads=2, key_width=6),
        golden="gated_deltanet.safetensors",
    ),
    "gla": Row(
        "GLA",
        "2312.06635",
        op="outer",
        small=dict(num_heads=2, rank=4),
        golden=BY_EQUATION + "the authors' code runs on GPUs only",
    ),
    "gru": Row("GRU", "1406.1078", op="gru", small=dict(num_heads=2), golden="gru.safetensors"),
    "hgrn2": Row(
        "HGRN2",
        "2404.07904",
        op="outer",
        small=dict(num_heads=2, lower_bound=0.2),
        golden=BY_EQUATION + "the authors' code runs on GPUs only",
    ),
    "lact": Row(
        "LaCT",
        "2505.23884",
        op="fastweight",
        state="window",
        small=dict(num_heads=2, num_memories=2, window=8, chunk=8),
        golden=BY_EQUATION + "the authors' layer needs FlashAttention and steps in bfloat16",
        compiles=False,  # with resets: how many chunks there are is data
    ),
    "linear_attention": Row(
        "LinearAttention",
        "2006.16236",
        op="outer",
        small=dict(num_heads=2),
        golden=BY_EQUATION + "the authors' package compiles at install",
    ),
    "lstm": Row("LSTM", "", op="lstm", small=dict(num_heads=2), golden="lstm.safetensors"),
    "mamba": Row("Mamba", "2312.00752", op="selective", small=dict(num_states=4), golden="mamba.safetensors"),
    "mamba2": Row(
        "Mamba2",
        "2405.21060",
        op="outer",
        small=dict(num_heads=4, num_states=3, num_groups=2, step_limits=(0.01, 0.5)),
        golden="mamba2.safetensors",
    ),
    "mingru": Row("MinGRU", "2410.01201", op="diagonal", golden="mingru.safetensors"),
    "miras": Row(
        "Miras",
        "2504.13173",
        op="fastweight",
        small=dict(num_heads=2, chunk=8, expand=2),
        golden=BY_EQUATION + "the authors published no code",
        compiles=False,  # with resets: how many chunks there are is data
    ),
    "mlstm": Row("MLSTM", "2405.04517", op="mlstm", small=dict(num_heads=2), golden="mlstm.safetensors"),
    "retnet": Row(
        "RetNet",
        "2307.08621",
        op="outer",
        small=dict(num_heads=2),
        golden=BY_EQUATION + "the authors' package needs an old PyTorch",
    ),
    "rwkv7": Row(
        "RWKV7",
        "2503.14456",
        op="dplr",
        small=dict(num_heads=2, decay_rank=4, rate_rank=4, gate_rank=4),
        golden="rwkv7.safetensors",
    ),
    "s5": Row(
        "S5",
        "2208.04933",
        op="diagonal",
        small=dict(num_states=4),
        golden=BY_EQUATION + "the exponential of the whole matrix, conjugates included",
    ),
    "sliding_window": Row(
        "SlidingWindow",
        "2004.05150",
        op="",
        state="window",
        small=dict(num_heads=4, num_key_heads=2, window=8),
        golden=BY_EQUATION + "masked softmax over all pairs",
    ),
    "slstm": Row(
        "SLSTM",
        "2405.04517",
        op="slstm",
        small=dict(num_heads=2),
        golden=BY_EQUATION + "the authors' kernels run on GPUs only",
    ),
    "titans": Row(
        "Titans",
        "2501.00663",
        op="fastweight",
        state="window",
        small=dict(num_heads=2, window=8, chunk=8, persistent=2, expand=2),
        golden=BY_EQUATION + "the authors published no code",
        compiles=False,  # with resets: how many chunks there are is data
    ),
    "ttt": Row(
        "TTT",
        "2407.04620",
        op="fastweight",
        small=dict(num_heads=2, chunk=8),
        golden=BY_EQUATION + "the authors' step also depends on a token's place in its chunk",
        compiles=False,  # with resets: how many chunks there are is data
    ),
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

    Raises ValueError for a name that is no mixer and an argument that the mixer does not take, with the
    nearest one.
    """
    cls = mixer_class(name)
    accepted = list(inspect.signature(cls).parameters)[1:]
    for arg in args:
        if arg not in accepted:
            near = get_close_matches(arg, accepted, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"it takes {accepted}"
            raise ValueError(f"mixer '{name}' takes no argument '{arg}'; {hint}")
    return cls(width, **args)
