"""Recorded calls of Triton's matrix memories give the bits of plain ones, whatever they are given next."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from test_kernels_gpu_matrix import BACKWARD, DEVICE, FORMS, FORWARD, inputs, states  # noqa: E402

from riverrun.kernels.gpu import delta, dplr, outer, tape  # noqa: E402
from riverrun.kernels.gpu import launch as launching  # noqa: E402
from riverrun.kernels.gpu.launch import recording  # noqa: E402
from riverrun.kernels.gpu.tape import repeated  # noqa: E402

OPS = {"outer": outer._outer, "mlstm": outer._mlstm, "delta": delta._delta, "dplr": dplr._dplr}


def counted(function):
    """`repeated(function)`, and the number of calls that reached the function itself and ran it."""
    calls = []

    def plain(*args):
        if recording.waiting is None:  # not only to learn what to compile
            calls.append(1)
        return function(*args)

    return repeated(plain), calls


def same(found, true):
    for a, b in zip(found, true, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b))


def given(form, seed, state, reset, T=70, **sizes):
    rule = form.split("-")[0]
    args = inputs(form, T=T, seed=seed, **sizes)
    start = states(form, args, seed + 1) if state else (None,) * (3 if rule == "mlstm" else 1)
    flags = None
    if reset:
        flags = torch.zeros(args[2].shape[:2], dtype=torch.bool)
        flags[0, [3 + seed, T // 3]] = True
    return [None if x is None else x.to(DEVICE, x.dtype if x.dtype == torch.bool else torch.float32)
            for x in (*args, *start, flags)]  # fmt: skip


def repeat(form, state, reset, save, **sizes):
    """Three calls of a form with tensors of their own: one as it is, one recorded, one repeated."""
    rule = form.split("-")[0]
    forward, forwards = counted(FORWARD[rule])
    backward, backwards = counted(BACKWARD[rule])
    before = []
    for seed in range(3):
        args = given(form, seed, state, reset, **sizes)
        out = found = forward(*args, save)
        last = out[1 : 4 if rule == "mlstm" else 2]
        if save:
            dy = torch.full_like(out[0], seed + 0.5)
            ends = [torch.full_like(s, seed - 1.0) if state else None for s in last]
            found = backward(*args, *out, dy, *ends)
        found = found[: len(found) if save else 1 + len(last)]  # nothing is saved then
        before.append((found, [None if x is None else x.clone() for x in found]))
    if not save:
        same(found, FORWARD[rule](*args, save)[: len(found)])
    else:
        same(out, FORWARD[rule](*args, save))
        same(found, BACKWARD[rule](*args, *out, dy, *ends))
    assert len(forwards) == 2 and len(backwards) == 2 * save
    for found, then in before:  # later calls have memory of their own
        same(found, then)


@pytest.mark.parametrize("form", FORMS)
def test_bits(form):
    repeat(form, False, False, True, T=36)


@pytest.mark.parametrize("form", ["mlstm", "outer-key-bonus", "delta-head", "dplr"])
def test_bits_with_operators_between(form):
    """Resets are counted by PyTorch, as shares of two blocks of keys, or of heads, are added."""
    repeat(form, True, True, True, T=20, K=72, G=1, H=2)


@pytest.mark.parametrize("form", ["mlstm", "delta", "dplr"])
def test_bits_of_few_steps(form):
    repeat(form, True, True, False, T=6)


def test_given_twice_and_in_pieces():
    """One tensor as two arguments, and as two that are not one; rows that do not lie side by side."""
    forward, calls = counted(FORWARD["outer"])
    for seed in range(4):
        q, k, v, *rest = given("outer-head", seed, False, False, T=20)
        wide = torch.cat([q, k], -1)
        q, k = wide.split(q.shape[-1], -1)
        k = q if seed == 1 else k
        same(forward(q, k, v, *rest, True), FORWARD["outer"](q, k, v, *rest, True))
    assert len(calls) == 2


def test_what_cannot_be_repeated():
    """Numbers that are looked at, and tensors that no argument leads to."""
    kept = torch.ones(3, device=DEVICE)
    for function in (lambda x: (x * x.sum().item(),), lambda x: (x + kept,), lambda x: (kept,)):
        call, calls = counted(function)
        for n in range(4):
            x = torch.full((3,), n + 1.0, device=DEVICE)
            same(call(x), function(x))
        assert len(calls) == 4


LOADED = """
import sys, torch
from riverrun.kernels.gpu.tape import repeated
call = repeated(lambda x: (x + 1,))
for n in range(3):
    assert call(torch.full((2,), 1.0 * n, device="{device}"))[0][0] == n + 1
print("torch._dynamo" in sys.modules)
"""


def test_recording_loads_no_compiler():
    """PyTorch's takes seconds, and is what a mode loads unless it says that it need not."""
    code = LOADED.format(device=DEVICE)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_kinds():
    """Another shape, dtype, stride or alignment is another recording."""
    call, calls = counted(lambda x: (x.contiguous() + 1,))
    base = torch.arange(40.0, device=DEVICE)
    for x in (base[:8], base[:9], base[:8].double(), base[:16:2], base[1:9]) * 3:
        same(call(x), (x.contiguous() + 1,))
    assert len(calls) == 10


def test_kernels_of_a_call_are_compiled_at_once(monkeypatch):
    """Each group that shares a setting together, before anything is launched; one alone is not worth it. Then
    what is compiled is loaded."""
    seen, loaded = [], []

    class Compiled:
        @property
        def run(self):
            loaded.append(len(seen))

    class Kernel:
        def __getitem__(self, grid):
            raise AssertionError("launched")

        def run(self, *args, grid, warmup, **options):
            seen.append((args[1:], warmup, options["num_warps"], os.environ.get("DISABLE_MMA_V3")))
            return Compiled()

    def call(x, *others):
        for wgmma, numbers in ((True, range(2)), (False, range(others[0]))):
            for n in numbers:
                launching.launch(Kernel(), (1,), (x,), (n,), 4, wgmma=wgmma)

    monkeypatch.setattr(launching, "DEVICE", "cuda")
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.delenv("DISABLE_MMA_V3", raising=False)
    launching.compile_together((call, (torch.ones(1), 3)))
    fast, plain = [((n,), True, 4, None) for n in range(2)], [((n,), True, 4, "1") for n in range(3)]
    assert seen == fast + plain and recording.waiting is None and loaded == [2, 2, 5, 5, 5]
    seen.clear()
    launching.compile_together((call, (torch.ones(1), 1)))
    assert seen == fast
    seen.clear()
    launching.compile_together((call, (torch.ones(1), 1)), (call, (torch.ones(1), 2)))
    assert seen == fast + fast + plain[:1] + plain[:2]  # of several calls together


@pytest.mark.parametrize("form", FORMS)
def test_the_backward_is_compiled_with_its_forward(form, monkeypatch):
    """The first call that saves compiles for its backward, too: for just what that is then given."""
    seen = []
    monkeypatch.setattr(tape, "compile_together", lambda *calls: seen.append(calls))
    monkeypatch.setattr(tape, "_kept", {})
    monkeypatch.setattr(tape, "_compiled", set())
    args = given(form, 0, True, False)
    OPS[form.split("-")[0]](*args)
    assert len(seen) == 1 and len(seen[0]) == 1
    seen.clear()
    floats = [None if x is None else x.requires_grad_(x.is_floating_point()) for x in args]
    OPS[form.split("-")[0]](*floats)[0].sum().backward()
    (_, (function, promised)), ((other, found),) = seen
    assert function is other and [tape.sizes(x) for x in promised] == [tape.sizes(x) for x in found]
