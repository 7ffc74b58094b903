"""Denormal numbers are taken for zero inside kernels, and only there."""

import pytest

from riverrun.kernels.cpu.threads import flushed


def product() -> str:
    """As text: where denormals are zero, 5e-324 compares equal to 0."""
    tiny, one = 5e-324, 1.0
    return repr(tiny * one)


def test_denormals_are_zero_inside_and_not_after():
    seen = []
    flushed(lambda: seen.append(product()))
    assert seen == ["0.0"] and product() == "5e-324"


def test_the_mode_is_put_back_after_an_error():
    def fails():
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        flushed(fails)
    assert product() == "5e-324"
