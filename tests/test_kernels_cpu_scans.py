"""The compiled CPU kernels of the scans: diagonal, selective, softmax, short_conv."""

from dataclasses import replace

import pytest
import torch

from riverrun import ops
from riverrun.kernels.cpu.blocks import rows
from riverrun.state import leaves, tree_map
from riverrun.testing.inputs import FORMS, Size, make
from riverrun.testing.tolerance import close, close_states

SCANS = ("diagonal", "selective", "softmax", "short_conv", "short_conv_silu")
CASES = [(op, form) for op in SCANS for form in FORMS[op]]
# 37 steps are past two saved states of the selective kernel; 150 and 200 channels need a last block that is
# not full
LENGTHS = (1, 7, 37)


def run(case, impl):
    """Output, final state and every gradient of a loss that reads both."""
    args = [None if x is None else x.clone().requires_grad_() for x in case.args]
    state = tree_map(lambda x: x.clone().requires_grad_(), case.state)
    y, end = ops.OPS[case.op](*args, state=state, reset=case.reset, impl=impl)
    weights = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=weights, dtype=torch.float64)).abs().square().sum()
        for x in (y, *leaves(end))
    )
    wanted = [x for x in (*args, *leaves(state)) if x is not None]
    return y, end, torch.autograd.grad(loss, wanted)


def agree(case):
    (y, end, grads), (y0, end0, grads0) = run(case, "cpu"), run(case, "sequential")
    close(y, y0, "output")
    close_states(end, end0, "final state")
    for i, (a, b) in enumerate(zip(grads, grads0, strict=True)):
        close(a, b, f"gradient {i}")


@pytest.mark.parametrize("op, form", CASES)
@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("reset", [False, True])
def test_equals_the_definition(op, form, T, state, reset):
    agree(make(op, form, Size(T=T), state=state, reset=reset))


@pytest.mark.parametrize("op, form", CASES)
@pytest.mark.parametrize("T", [2, 3, 4, 16, 32])
def test_short_runs_and_whole_stretches(op, form, T):
    """A few steps take a way of their own; 16 and 32 end with the last step of a stretch."""
    agree(make(op, form, Size(T=T)))
    agree(make(op, form, Size(T=T), reset=False))


@pytest.mark.parametrize("op, form", CASES)
def test_a_reset_at_every_step(op, form):
    """Row i starts over at step i: at every place of a stretch, of a chunk and of a filter's reach."""
    case = make(op, form, Size(B=40, T=40, D=16, W=4))
    agree(replace(case, reset=torch.eye(40, dtype=torch.bool)))


def test_equal_scores_share_the_gradient_of_the_maximum():
    case = make("softmax", "head", Size(T=5))
    s, v = case.args
    m, c, a = case.state
    agree(replace(case, args=(torch.zeros_like(s), v), state=(torch.zeros_like(m), c, a)))


@pytest.mark.parametrize("op, form", CASES)
@pytest.mark.parametrize("T", [3, 37])
def test_states_and_gradients_that_are_given_are_left_alone(op, form, T):
    """What a kernel works on in place is its own copy; a reset at once would clear the first state."""
    case = make(op, form, Size(T=T))
    case.reset[:, 0] = True
    args = [None if x is None else x.clone().requires_grad_() for x in case.args]
    y, end = ops.OPS[op](*args, state=case.state, reset=case.reset, impl="cpu")
    outputs = [y, *leaves(end)]
    given = [torch.ones_like(x) for x in outputs]
    torch.autograd.grad(outputs, [x for x in args if x is not None], given)
    assert all((g == 1).all() for g in given)
    case_again = make(op, form, Size(T=T))
    assert all(torch.equal(a, b) for a, b in zip(leaves(case.state), leaves(case_again.state), strict=True))


@pytest.mark.parametrize("op, form", CASES)
def test_blocks_of_channels_add_up(op, form):
    """More channels than one task takes, and a last block that is not full."""
    agree(make(op, form, Size(B=1, T=5, D=150, V=150, H=1, N=3)))
    agree(make(op, form, Size(B=3, T=5, D=200, V=200, H=3, N=1, W=1)))


@pytest.mark.parametrize("op", ["short_conv", "short_conv_silu"])
@pytest.mark.parametrize("reset", [False, True])
def test_four_taps_in_registers(op, reset):
    """Channels that fill vectors, over stretches that a reset cuts and others that none does."""
    agree(make(op, "bias", Size(T=150, D=48, W=4), state=True, reset=reset))


@pytest.mark.parametrize("op", ["short_conv", "short_conv_silu"])
def test_an_input_that_is_a_part_of_another(op):
    """Columns of wider rows are read where they stand, at the end of memory too; sequences with gaps between
    them and columns that are not neighbours are copied."""
    case = make(op, "bias", Size(B=2, T=40, D=48, W=4))
    for shape, part in (
        ((2, 40, 80), lambda x: x[..., :48]),
        ((2, 40, 80), lambda x: x[..., 20:68]),
        ((2, 40, 80), lambda x: x[..., 32:]),
        ((2, 43, 48), lambda x: x[:, :40]),
        ((48, 40, 2), lambda x: x.permute(2, 1, 0)),
    ):
        whole, found = torch.randn(shape, dtype=torch.float64).requires_grad_(), []
        for impl in ("cpu", "sequential"):
            y, _ = ops.OPS[op](part(whole), *case.args[1:], state=case.state, reset=case.reset, impl=impl)
            found.append((y, *torch.autograd.grad(y.square().sum(), whole)))
        for a, b in zip(*found, strict=True):
            close(a, b, f"a part of {shape}")


def test_parts_of_rows_are_not_copied():
    whole = torch.arange(2 * 5 * 12.0).view(2, 5, 12)
    for x, copied in (
        (whole, False),
        (whole[..., 3:7], False),
        (whole[1:, :, 8:], False),
        (whole[:, :4, :3], True),
        (whole.mT, True),
        (whole[:, :1].expand(2, 5, 12), True),
        (whole.view(-1)[5:-7].view(2, 3, 18)[..., 14:], True),  # its rows begin where those of memory do not
    ):
        found, at = rows(x)
        assert torch.equal(found[:, at : at + x.shape[-1]], x.flatten(0, 1))
        assert (found.data_ptr() + 4 * at != x.data_ptr()) == copied


@pytest.mark.parametrize("op, form", CASES)
def test_extremes(op, form):
    """Terms a hundred times as large cancel: gradients are measured against the largest of them."""
    case = make(op, form, Size(T=37), extreme=True)
    (y, end, grads), (y0, end0, grads0) = run(case, "cpu"), run(case, "sequential")
    close(y, y0, "output")
    close_states(end, end0, "final state")
    largest = max(float(g.abs().max()) for g in grads0)
    assert all(float((a - b).abs().max()) <= 1e-9 * largest for a, b in zip(grads, grads0, strict=True))


@pytest.mark.parametrize("op, form", CASES)
def test_strides_do_not_matter(op, form):
    case = make(op, form, Size(T=9))

    def flip(x):
        return x if x is None or x.dim() < 2 else x.mT.contiguous().mT

    args = tuple(map(flip, case.args))
    strided = replace(case, args=args, state=tree_map(flip, case.state), reset=flip(case.reset))
    for a, b in zip(run(case, "cpu")[2], run(strided, "cpu")[2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("shape", [(6,), (9, 6), (2, 1, 6), (2, 9, 1)])
def test_diagonal_takes_a_decay_that_is_the_same_everywhere(shape, state, reset):
    """Learned decays come as one vector, expanded over the batch and time without memory of their own."""
    case = make("diagonal", "real", Size(T=9), state=state, reset=reset)
    a = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)).expand(2, 9, 6)
    agree(replace(case, args=(a, case.args[1])))
    grads = []
    for impl in ("cpu", "sequential"):
        small = torch.full(shape, 0.5, dtype=torch.float64, requires_grad=True)
        decay = small.expand(2, 9, 6)
        y, _ = ops.diagonal(decay, case.args[1], state=case.state, reset=case.reset, impl=impl)
        grads.append(torch.autograd.grad(y.square().sum(), small)[0])
    close(*grads, "gradient of the vector")


@pytest.mark.parametrize("of", ["a", "b", "dy"])
def test_conjugates(of):
    """PyTorch keeps a conjugate as a flag beside the numbers in memory, in inputs and in gradients."""
    a, b = make("diagonal", "complex", Size(T=9), state=False, reset=False).args
    flagged = {name: x.conj() if name == of else x for name, x in (("a", a), ("b", b), ("dy", b))}
    assert flagged[of].is_conj()
    a, b, dy = (x.detach().requires_grad_(name != "dy") for name, x in flagged.items())
    y, y0 = (ops.diagonal(a, b, impl=impl)[0] for impl in ("cpu", "sequential"))
    close(y, y0, "output")
    for x, x0 in zip(*(torch.autograd.grad(out, (a, b), dy) for out in (y, y0)), strict=True):
        close(x, x0, "gradient")


@pytest.mark.parametrize("op, form", CASES)
def test_gradcheck(op, form):
    case = make(op, form, Size(B=1, T=4, H=1, V=2, D=2, N=2, W=3))
    given = [x.clone().requires_grad_() for x in (*case.args, *leaves(case.state)) if x is not None]
    some = [i for i, x in enumerate(case.args) if x is not None]

    def f(*xs):
        args = list(case.args)
        for i, x in zip(some, xs, strict=False):
            args[i] = x
        rest = xs[len(some) :]
        state = tuple(rest) if isinstance(case.state, tuple) else rest[0]
        y, end = ops.OPS[op](*args, state=state, reset=case.reset, impl="cpu")
        return y, *leaves(end)

    assert torch.autograd.gradcheck(f, given)


@pytest.mark.parametrize("op, form", CASES)
def test_second_derivatives_are_refused(op, form):
    case = make(op, form, Size(T=3))
    x = case.args[0].clone().requires_grad_()
    y, _ = ops.OPS[op](x, *case.args[1:], impl="cpu")
    (grad,) = torch.autograd.grad(y.abs().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.abs().sum(), x)


@pytest.mark.parametrize("op, form", CASES)
def test_threads_do_not_change_a_bit(op, form):
    case = make(op, form, Size(B=3, T=37, D=150, V=150)).to(torch.float32)
    results = []
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            y, end, grads = run(case, "cpu")
            results.append([y, *leaves(end), *grads])
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(*results, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("op, form", CASES)
def test_compiles_whole(op, form):
    torch.compiler.reset()  # every case compiles the same function, and after eight PyTorch gives up
    case = make(op, form, Size(T=5))

    def f(args, state, reset):
        return ops.OPS[op](*args, state=state, reset=reset, impl="cpu")

    args = [None if x is None else x.clone().requires_grad_() for x in case.args]
    given = [x for x in args if x is not None]
    expected, _ = f(args, case.state, case.reset)
    y, _ = torch.compile(f, fullgraph=True, backend="aot_eager")(args, case.state, case.reset)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(z.abs().square().sum(), given) for z in (y, expected)]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op, form", CASES)
def test_single_precision_is_single_precision(op, form):
    """Three digits above float32's rounding: what 37 sums and an exponential may lose, and no wrong constant
    may."""
    case = make(op, form, Size(T=37))
    y, end, grads = run(case.to(torch.float32), "cpu")
    y0, end0, grads0 = run(case, "sequential")
    for a, b in zip((y, *leaves(end), *grads), (y0, *leaves(end0), *grads0), strict=True):
        assert a.dtype in (torch.float32, torch.complex64)
        close(a.to(b.dtype), b, "float32", 1e-4)
