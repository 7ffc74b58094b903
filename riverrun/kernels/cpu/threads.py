"""How Numba is compiled and run here: cached on disk, and on as many threads as PyTorch is set to."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    """A forked process inherits the pool but not its threads."""
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)


_tiny, _one = 5e-324, 1.0  # variables, so that their product is computed when it is asked for


def flushed(f: Callable[..., None], *args: Any) -> None:
    """f(*args) with denormal numbers taken for zero, in this thread, for this long.

    Decays and dying gradients end in them; they are below every rounding of what they are added to, and an
    operation on one takes a hundred times as long.
    """
    already = _tiny * _one == 0.0
    torch.set_flush_denormal(True)
    try:
        f(*args)
    finally:
        torch.set_flush_denormal(already)


def in_threads(f: Callable[..., None], tasks: int, *args: Any) -> None:
    """Call f(first, step, *args) so that each of `tasks` is done once, on PyTorch's number of threads.

    f releases the interpreter's lock (nogil) and does tasks first, first + step, ... It compiles several
    times faster than a `prange` of the same body, may be called from several threads at once and survives a
    fork.
    """
    global _pool
    threads = min(tasks, torch.get_num_threads())
    if threads > 1:
        _pool = _pool or ThreadPoolExecutor(os.cpu_count(), "riverrun")
        others = [_pool.submit(flushed, f, first, threads, *args) for first in range(1, threads)]
        flushed(f, 0, threads, *args)
        for other in others:
            other.result()
    else:
        flushed(f, 0, 1, *args)


NO_RESET = np.empty((0, 0), np.bool_)


def array(x: Tensor | None) -> np.ndarray:
    """A tensor's memory as an array; a missing reset becomes an empty (0, 0) array, told by its shape."""
    if x is None:
        return NO_RESET
    return x.detach().numpy() if x.requires_grad else x.numpy()
