"""What a mixer must refuse to be built of, and how it says so: every row, every argument that is a number."""

import math
import re
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

from riverrun.mixers import MIXERS, build, mixer_class
from riverrun.nn import head_width

WIDTH = 16


def numeric(name):
    """The arguments of a mixer that hold numbers, from its signature."""
    hints = get_type_hints(mixer_class(name).__init__)
    return [k for k, kind in hints.items() if {int, float} & {kind, *get_args(kind)}]


@pytest.mark.parametrize("name", MIXERS)
def test_a_wrong_number_is_named_with_what_is_accepted(name, monkeypatch):
    """By name and by class, and before a parameter is made."""
    monkeypatch.setattr(torch.nn.Parameter, "__new__", None)
    assert "width" in numeric(name)
    for field in numeric(name):
        for wrong in (-2, 0, 2.5, -0.5, "four", "", True, [], [3], {}, math.nan):
            if not fits(name, field, wrong):
                said = rf"^\w+: {field} is {re.escape(repr(wrong))}; it must be \w+"
                for make in (lambda **args: build(name, **args), mixer_class(name)):
                    with pytest.raises(ValueError, match=said):
                        make(**{"width": WIDTH, **MIXERS[name].small, field: wrong})


def fits(name, field, value):
    """Which of these values a field may be after all."""
    kind = get_type_hints(mixer_class(name).__init__)[field]
    if isinstance(value, (bool, str, dict)) or value != value:
        return False
    if isinstance(value, list):
        return field == "sizes"
    if field in ("prefix", "persistent") and value == 0:
        return True
    if field == "lower_bound":
        return value < 0 if name == "kda" else 0 <= value < 1
    return float in (kind, *get_args(kind)) and get_origin(kind) is not tuple and value > 0


def test_none_is_for_what_may_be_left_out():
    for name in MIXERS:
        for field, kind in get_type_hints(mixer_class(name).__init__).items():
            if type(None) not in get_args(kind):
                with pytest.raises(ValueError, match=rf"{field} is None; it must be"):
                    build(name, **{"width": WIDTH, field: None})


def test_numbers_of_other_libraries_and_of_json_are_numbers():
    mixer = build("liger", np.int64(WIDTH), num_heads=2.0, blend=[1, 0], temperature=np.float32(8))
    assert (mixer.width, mixer.num_heads, mixer.blend, mixer.temperature) == (WIDTH, 2, (1.0, 0.0), 8.0)
    assert [type(x) for x in (mixer.width, mixer.num_heads, *mixer.blend)] == [int, int, float, float]


@pytest.mark.parametrize(
    "args, match",
    [
        (dict(num_heads=-2), "^GatedDeltaNet: num_heads is -2; it must be int, greater than 0; unless"),
        (dict(num_heads="four"), r"num_heads is 'four'; it must be int; unless given it is 4$"),
        (dict(num_heads=3), r"num_heads = 3 does not divide the width 16; accepted are \[1, 2, 4, 8, 16\]$"),
        (dict(key_width=0), "key_width is 0; it must be int or none, greater than 0; unless"),
        (dict(negative_eigenvalues=1), "negative_eigenvalues is 1; it must be bool; unless given it is"),
        (dict(num_key_heads=8), r"num_key_heads = 8 does not divide num_heads 4; accepted are \[1, 2, 4\]$"),
    ],
)  # fmt: skip
def test_what_is_said(args, match):
    with pytest.raises(ValueError, match=match):
        build("gated_deltanet", WIDTH, **args)


def test_a_width_that_is_none_has_no_divisors():
    for width in (0, -2):  # in a layer of one's own, whose arguments nobody has checked
        with pytest.raises(ValueError, match=f"num_heads is {width}; it must be at least 1"):
            head_width(width, 1, "num_key_heads", "num_heads")
