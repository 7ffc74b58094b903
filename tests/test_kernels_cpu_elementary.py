"""What compiled CPU kernels of scans stand on: exponentials, and blocks of channels."""

import math
from functools import cache

import numba
import numpy as np
import pytest
import torch

from riverrun.kernels.cpu import elementary
from riverrun.kernels.cpu.blocks import add_parts, block_size

FUNCTIONS = {
    "exp": math.exp,
    "expm1": math.expm1,
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x),
    "log_sigmoid": lambda x: min(x, 0.0) - math.log1p(math.exp(-abs(x))),
}


@cache
def over_arrays(name):
    f = getattr(elementary, name)

    @numba.njit
    def loop(x, y):
        for i in range(x.shape[0]):
            y[i] = f(x[i])

    return loop


def evaluate(name, x):
    y = np.empty_like(x)
    over_arrays(name)(x, y)
    return y


def points(name, lowest, dtype):
    """The whole range down to where e^x is 0, the neighbourhood of 0, and 0; for expm1 what is ≤ 0."""
    rng = np.random.default_rng(0)
    small = -(10.0 ** -np.arange(0, 40, 0.1))
    x = np.concatenate([rng.uniform(lowest, 0, 20000), rng.normal(0, 1, 5000), small, [0.0]]).astype(dtype)
    if name == "sigmoid":  # documented: 0 where the value is denormal
        return x[x > 0.95 * lowest * 0.88]
    return x[x <= 0] if name == "expm1" else x


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("lowest, dtype, bound", [(-105, np.float32, 3), (-746, np.float64, 4)])
def test_elementary_functions(name, lowest, dtype, bound):
    """Against the C library in float64, in units in the last place, denormal results included; for float64
    itself one unit more, which the C library may be wrong by."""
    x = points(name, lowest, dtype)
    true = np.array([FUNCTIONS[name](float(v)) for v in x])
    ulp = np.abs(evaluate(name, x) - true) / np.spacing(np.abs(true).astype(dtype))
    assert ulp.max() < bound, f"{ulp.max():.1f} units at {x[ulp.argmax()]}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_elementary_functions_at_their_ends(dtype):
    x = np.array([-np.inf, 0, np.inf, np.nan], dtype)
    expected = {
        "exp": [0, 1, np.inf, np.nan],
        "tanh": [-1, 0, 1, np.nan],
        "sigmoid": [0, 0.5, 1, np.nan],
        "log_sigmoid": [-np.inf, -math.log(2), 0, np.nan],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(evaluate(name, x), np.array(values, dtype), name)


def test_blocks_depend_on_shapes_alone():
    assert block_size(512, 4, 64) == 64
    assert block_size(6, 1, 64) == 16
    assert block_size(512, 1, 128) == 64, "one row alone still makes eight tasks"
    parts = torch.randn(3, 50, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(add_parts(parts), parts[0] + parts[1] + parts[2])
