"""How Numba is compiled and run here: cached on disk, and on as many threads as PyTorch is set to."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .team import address

# contracted multiply-adds and reordered sums, but no assumption that inputs are finite: NaN must stay visible
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}


TEAM = address()
_used, _lost = False, False  # OpenMP's threads, by kernels; by a fork
_pool: ThreadPoolExecutor | None = None


def _forget_threads() -> None:
    """A forked process inherits what knows of threads, but not these."""
    global _pool, _lost
    _pool, _lost = None, _used


os.register_at_fork(after_in_child=_forget_threads)


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

    f releases the interpreter's lock (nogil), begins as in team.py and does tasks first, first + step, ... It
    compiles several times faster than a `prange` of the same body and may be called from several threads at
    once. Where there is no OpenMP, and in a process forked off one that has used it, threads are our own.
    """
    global _pool, _used
    threads = min(tasks, torch.get_num_threads())
    if threads == 1:
        flushed(f, 0, 1, *args)
    elif TEAM and not _lost:
        _used = True
        f(TEAM, -threads, *args)
    else:
        _pool = _pool or ThreadPoolExecutor(os.cpu_count(), "riverrun")
        others = [_pool.submit(flushed, f, first, threads, *args) for first in range(1, threads)]
        flushed(f, 0, threads, *args)
        for other in others:
            other.result()


NO_RESET = np.empty((0, 0), np.bool_)


def array(x: Tensor | None) -> np.ndarray:
    """A tensor's memory as an array; a missing reset becomes an empty (0, 0) array, told by its shape."""
    if x is None:
        return NO_RESET
    return x.detach().numpy() if x.requires_grad else x.numpy()
