"""How Numba is compiled and run here: cached on disk, and on as many threads as PyTorch is set to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

# contracted multiply-adds and reordered sums, but no assumption that inputs are finite: NaN must stay visible
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}


def parallel(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compile with `prange` over threads."""
    return numba.njit(parallel=True, fastmath=FASTMATH, cache=True, error_model="numpy", nogil=True)(f)


def inline(f: Callable[..., Any]) -> Callable[..., Any]:
    """Compile as a part of the kernels that call it."""
    return numba.njit(fastmath=FASTMATH, cache=True, error_model="numpy", inline="always")(f)


def use_threads() -> None:
    """Run the next kernel on PyTorch's number of threads."""
    numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))


def array(x: Tensor | None, like: Tensor | None = None) -> np.ndarray:
    """A tensor's memory as an array; a missing reset becomes an empty (0, 0) array, which kernels test by its shape."""
    if x is None:
        return np.empty((0, 0), np.bool_)
    return x.detach().numpy()
