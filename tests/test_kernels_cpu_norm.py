"""Compiled norms and scaled heads against PyTorch's operators, in float64, and when a layer runs them."""

import pytest
import torch
import torch.nn.functional as F

from riverrun import nn, ops
from riverrun.kernels.cpu.norm import rms_norm
from riverrun.kernels.cpu.scaled import scaled
from riverrun.nn import norm
from riverrun.nn.norm import GatedRMSNorm, RMSNorm
from riverrun.testing.tolerance import close, close_all

EPS, WIDTH = 1e-5, 24


def by_operators(x, z, w, group, before):
    gate = 1.0 if z is None else F.silu(z)
    n = F.rms_norm((x * gate if before else x).unflatten(-1, (-1, group)), (group,), eps=EPS)
    y = (n * w.view(-1, group)).flatten(-2)
    return y if before else y * gate


@pytest.mark.parametrize("group, shared", [(24, False), (8, False), (8, True)])
@pytest.mark.parametrize("place", ["plain", "after", "before"])
@pytest.mark.parametrize("steps", [1, 5, 33])
def test_against_operators(place, group, shared, steps):
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, steps, WIDTH, dtype=torch.float64, generator=random).requires_grad_()
    both = torch.randn(2, steps, 2 * WIDTH, dtype=torch.float64, generator=random).requires_grad_()
    w = torch.randn(group if shared else WIDTH, dtype=torch.float64, generator=random).requires_grad_()
    z = None if place == "plain" else both[..., WIDTH:]  # a gate is often a part of a wider row
    slope = torch.randn(x.shape, dtype=torch.float64, generator=random)
    wanted = [x, w] if z is None else [x, w, both]
    ours = rms_norm(x, z, w, group, EPS, place == "before")
    theirs = by_operators(x, z, w, group, place == "before")
    close(ours, theirs, place)
    close_all(torch.autograd.grad(ours, wanted, slope), torch.autograd.grad(theirs, wanted, slope), place)


@pytest.mark.parametrize("place", ["plain", "after", "before"])
def test_a_skip_is_added_first(place):
    random = torch.Generator().manual_seed(0)
    x, z, slope = (torch.randn(2, 19, WIDTH, dtype=torch.float64, generator=random) for _ in range(3))
    d, w = (torch.randn(n, dtype=torch.float64, generator=random).requires_grad_() for n in (3, WIDTH))
    wider = torch.randn(2, 19, WIDTH + 5, dtype=torch.float64, generator=random).requires_grad_()
    x, z = x.requires_grad_(), None if place == "plain" else z.requires_grad_()
    u = wider[..., 5:].unflatten(-1, (3, -1))
    ours = rms_norm(x, z, w, 8, EPS, place == "before", (d, u))
    theirs = by_operators(x + (d[:, None] * u).flatten(-2), z, w, 8, place == "before")
    close(ours, theirs, place)
    wanted = [t for t in (x, z, w, d, wider) if t is not None]
    close_all(torch.autograd.grad(ours, wanted, slope), torch.autograd.grad(theirs, wanted, slope), place)


def test_one_row_without_further_axes():
    x, w = torch.randn(WIDTH, dtype=torch.float64), torch.ones(WIDTH, dtype=torch.float64)
    close(rms_norm(x, None, w, WIDTH, EPS), by_operators(x, None, w, WIDTH, False), "one row")


@pytest.mark.parametrize("steps", [1, 33])
def test_scaled_heads(steps):
    random = torch.Generator().manual_seed(0)
    wider = torch.randn(2, steps, 5 * WIDTH, dtype=torch.float64, generator=random).requires_grad_()
    s = torch.randn(2, 3, steps, dtype=torch.float64, generator=random).requires_grad_()
    slope = torch.randn(2, 3, steps, WIDTH, dtype=torch.float64, generator=random).transpose(1, 2)
    x, across = wider[..., WIDTH:-WIDTH].unflatten(-1, (3, -1)), s.transpose(1, 2)
    ours, theirs = scaled(x, across), across[..., None] * x
    close(ours, theirs, "product")
    close_all(*(torch.autograd.grad(y, [wider, s], slope) for y in (ours, theirs)), "gradients")


def large(dtype=torch.float32):
    return torch.randn(2, norm.SMALL // WIDTH, WIDTH, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "layer", [RMSNorm(WIDTH), GatedRMSNorm(WIDTH, 8, shared=True)], ids=["plain", "gated"]
)
def test_when_a_layer_runs_them(layer, monkeypatch):
    calls = []
    monkeypatch.setattr(norm.cpu, "rms_norm", lambda *args: calls.append(args) or rms_norm(*args))

    def run(x):
        return layer(x) if isinstance(layer, RMSNorm) else layer(x, x.flip(1))

    y = run(large())
    assert len(calls) == 1
    with ops.forced(outer="chunk"):
        close(run(large()), y, "operators", 1e-5)  # a few float32 roundings of numbers near 1
    run(large()[:, :4])
    layer.double()
    run(large(torch.float64))
    layer.float()
    assert len(calls) == 1, "forced, a few steps and float64 are PyTorch's"
    assert run(large().bfloat16()).dtype == torch.bfloat16 and len(calls) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_skips_and_scaled_heads_are_the_same_either_way(dtype):
    """Compiled in float32, inside `forced` by operators: a few roundings apart."""
    x, layer = large(dtype), GatedRMSNorm(WIDTH, before=True)
    d, u = torch.randn(3), large(dtype).unflatten(-1, (3, -1))
    steps = torch.rand(*x.shape[:2], 3)
    found = []
    for impls in ({}, {"outer": "chunk"}):
        with ops.forced(**impls):
            found.append((layer(x, x.flip(1), (d, u)), nn.scaled(u, steps)))
    for a, b in zip(*found, strict=True):
        assert a.dtype == b.dtype == dtype
        close(a.float(), b.float(), "one way and the other", 1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("case", ["plain", "gated", "skip", "scaled"])
def test_the_same_bits_from_a_compiled_graph(case):
    """An operator with one result, and gradients of all that has one."""
    x, z, w, d, s = (
        large(),
        large().flip(1),
        torch.rand(WIDTH),
        torch.randn(3),
        torch.rand(*large().shape[:2], 3),
    )
    run, given = {
        "plain": (lambda x, w: rms_norm(x, None, w, WIDTH, EPS), (x, w)),
        "gated": (lambda x, z, w: rms_norm(x, z, w, 8, EPS), (x, z, w)),
        "skip": (
            lambda x, w, d: rms_norm(x, None, w, 8, EPS, False, (d, x.unflatten(-1, (3, -1)))),
            (x, w, d),
        ),
        "scaled": (lambda x, s: scaled(x.unflatten(-1, (3, -1)), s), (x, s)),
    }[case]
    found = []
    for call in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = [t.detach().clone().requires_grad_() for t in given]
        y = call(*inputs)
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_any_number_of_threads_gives_the_same_bits():
    x, w, threads = large().requires_grad_(), torch.ones(WIDTH, requires_grad=True), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            y = rms_norm(x, x, w, WIDTH, EPS)
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, w])))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_second_derivative_is_refused_with_what_gives_one():
    x = large().requires_grad_()
    y = RMSNorm(WIDTH)(x)
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*forced"):
        g.sum().backward()
    with ops.forced(outer="chunk"):
        (g,) = torch.autograd.grad(RMSNorm(WIDTH)(x).square().sum(), x, create_graph=True)
        g.sum().backward()
