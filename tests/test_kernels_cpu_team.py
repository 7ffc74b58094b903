"""Kernels on several threads: each part is done once, as one thread does it, wherever threads come from."""

import os
import signal

import numba
import numpy as np
import pytest
import torch

from riverrun import ops
from riverrun.kernels.cpu import threads
from riverrun.kernels.cpu.team import divided
from riverrun.testing.tolerance import close


@numba.njit(nogil=True)
def marks(first, step, out, modes, tiny):
    """Counts who comes by, and what becomes there of a product below the smallest normal number."""
    if divided(first, step):
        return
    for task in range(first, out.shape[0], step):
        out[task] += 1
        modes[task] = tiny[task] * tiny[task]


@numba.njit(nogil=True)
def large(first, step, sizes):
    if divided(first, step):
        return
    for task in range(first, sizes.shape[0], step):
        np.empty(sizes[task], np.float32)[0] = task


@pytest.fixture(params=["OpenMP", "pool"])
def several(request, monkeypatch):
    """Two or three threads, whatever this machine has."""
    if request.param == "pool":
        monkeypatch.setattr(threads, "TEAM", 0)
    elif not threads.TEAM:
        pytest.skip("PyTorch has no OpenMP here that could be found")
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_each_part_is_done_once(several, count, tasks):
    several(count)
    out, modes = np.zeros(tasks, np.int64), np.ones(tasks, np.float32)
    threads.in_threads(marks, tasks, out, modes, np.full(tasks, 1e-20, np.float32))
    assert out.tolist() == [1] * tasks
    assert modes.tolist() == [0] * tasks  # 1e-40 in float32 is denormal, and taken for zero on every thread


def test_modes_of_threads_are_as_before(several):
    several(2)
    threads.in_threads(marks, 2, np.zeros(2, np.int64), np.ones(2, np.float32), np.ones(2, np.float32))
    assert (torch.full((1 << 16,), 1e-20).square() > 0).all()  # on both threads: denormal, yet not zero


def test_what_a_thread_raises_is_raised(several):
    several(2)
    with pytest.raises(MemoryError):
        threads.in_threads(large, 2, np.array([4, 1 << 60]))


def test_same_bits_as_one_thread(several):
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 70, 4, 16, generator=random, requires_grad=True) for _ in range(3))
    found = []
    for count in (1, 2):
        several(count)
        y, _ = ops.outer(q, k, v, impl="cpu")
        found.append((y, *torch.autograd.grad(y.square().sum(), (q, k, v))))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_does_not_wait_for_threads_it_has_not(several):
    several(2)
    out = torch.zeros(2, dtype=torch.int64).share_memory_()
    given = np.ones(2, np.float32), np.ones(2, np.float32)
    threads.in_threads(marks, 2, out.numpy(), *given)
    child = os.fork()
    if not child:
        signal.alarm(30)  # ends a child that waits for ever
        threads.in_threads(marks, 2, out.numpy(), *given)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    close(out, torch.tensor([2, 2]), "parts done")
