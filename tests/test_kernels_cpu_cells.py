"""The compiled CPU kernels of the nonlinear cells, against their definitions and PyTorch's own networks."""

from dataclasses import replace

import pytest
import torch

from riverrun import ops
from riverrun.kernels.cpu import product
from riverrun.state import leaves, tree_map
from riverrun.testing.inputs import Size, make
from riverrun.testing.tolerance import close, close_states

CELLS = ("elman", "lstm", "gru", "slstm")


def run(case, impl):
    """Output, final state and every gradient of a loss that reads both."""
    args = [None if x is None else x.clone().requires_grad_() for x in case.args]
    state = tree_map(lambda x: x.clone().requires_grad_(), case.state)
    y, end = ops.OPS[case.op](*args, state=state, reset=case.reset, impl=impl)
    weights = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=weights, dtype=torch.float64)).square().sum()
        for x in (y, *leaves(end))
    )
    return y, end, torch.autograd.grad(loss, [x for x in (*args, *leaves(state)) if x is not None])


def agree(case):
    (y, end, grads), (y0, end0, grads0) = run(case, "cpu"), run(case, "sequential")
    close(y, y0, "output")
    close_states(end, end0, "final state")
    for i, (a, b) in enumerate(zip(grads, grads0, strict=True)):
        close(a, b, f"gradient {i}")


@pytest.mark.parametrize("op", CELLS)
@pytest.mark.parametrize("T", [1, 7, 70])  # 70 is past a stretch of the sum over time
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("form", ["bias", "no bias"])
def test_equals_the_definition(op, T, state, reset, form):
    agree(make(op, form, Size(T=T), state=state, reset=reset))


@pytest.mark.parametrize("op", CELLS)
@pytest.mark.parametrize(
    "B, H, P", [(1, 1, 1), (1, 1, 33), (3, 2, 40), (5, 1, 5), (18, 1, 4), (7, 3, 16), (2, 8, 3)]
)
def test_groups_of_rows_and_tiles_of_columns_that_are_not_full(op, B, H, P):
    agree(make(op, "bias", Size(B=B, T=5, H=H, P=P)))


@pytest.mark.parametrize("op", CELLS)
def test_extremes(op):
    """Saturated gates: finite, and gradients, which cancel, right against the largest of them."""
    case = make(op, "bias", Size(T=37), extreme=True)
    (y, end, grads), (y0, end0, grads0) = run(case, "cpu"), run(case, "sequential")
    close(y, y0, "output")
    close_states(end, end0, "final state")
    largest = max(float(g.abs().max()) for g in grads0)
    assert all(float((a - b).abs().max()) <= 1e-9 * largest for a, b in zip(grads, grads0, strict=True))


def test_equal_candidates_share_the_gradient_of_the_maximum():
    """σ(0) m = ½ and i = log ½ are equal to the bit where the state's maximum is 0 and nothing is added."""
    case = make("slstm", "no bias", Size(T=1), reset=False)
    x, R, c = case.args
    x = torch.zeros_like(x)
    x[:, :, 0] = torch.nn.functional.logsigmoid(torch.zeros((), dtype=x.dtype))
    h, s, n, m = case.state
    case = replace(case, args=(x, torch.zeros_like(R), c), state=(h, s, n, torch.zeros_like(m)))
    for impl in ("cpu", "sequential"):
        m = case.state[3].clone().requires_grad_()
        _, end = ops.slstm(*case.args, state=(*case.state[:3], m), impl=impl)
        close(torch.autograd.grad(end[3].sum(), m)[0], torch.full_like(m, 0.5), impl)
    agree(case)


@pytest.mark.parametrize("op", CELLS)
@pytest.mark.parametrize("T", [3, 37])
def test_states_and_gradients_that_are_given_are_left_alone(op, T):
    """What a kernel works on in place is its own copy; a reset at once would clear the first state."""
    case = make(op, "bias", Size(T=T))
    case.reset[:, 0] = True
    args = [None if x is None else x.clone().requires_grad_() for x in case.args]
    y, end = ops.OPS[op](*args, state=case.state, reset=case.reset, impl="cpu")
    outputs = [y, *leaves(end)]
    given = [torch.ones_like(x) for x in outputs]
    torch.autograd.grad(outputs, [x for x in args if x is not None], given)
    assert all((g == 1).all() for g in given)
    case_again = make(op, "bias", Size(T=T))
    assert all(torch.equal(a, b) for a, b in zip(leaves(case.state), leaves(case_again.state), strict=True))


@pytest.mark.parametrize("op", CELLS)
def test_strides_do_not_matter(op):
    case = make(op, "bias", Size(T=9))
    plain = run(case, "cpu")
    args = [x.mT.contiguous().mT.requires_grad_() for x in case.args]
    state = tree_map(lambda x: x.mT.contiguous().mT, case.state)
    y, end = ops.OPS[op](*args, state=state, reset=case.reset.t().contiguous().t(), impl="cpu")
    assert torch.equal(y, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(leaves(end), leaves(plain[1]), strict=True))


@pytest.mark.parametrize("op", CELLS)
def test_gradcheck(op):
    case = make(op, "bias", Size(B=2, T=4, H=2, P=2))
    given = [x.clone().requires_grad_() for x in (*case.args, *leaves(case.state))]

    def f(x, R, c, *state):
        y, end = ops.OPS[op](x, R, c, state=state, reset=case.reset, impl="cpu")
        return y, *leaves(end)

    assert torch.autograd.gradcheck(f, given)


@pytest.mark.parametrize("op", CELLS)
def test_second_derivatives_are_refused(op):
    case = make(op, "bias", Size(T=3))
    x = case.args[0].clone().requires_grad_()
    y, _ = ops.OPS[op](x, *case.args[1:], impl="cpu")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(grad.sum(), x)


@pytest.mark.parametrize("op", CELLS)
def test_threads_do_not_change_a_bit(op):
    case = make(op, "bias", Size(B=5, T=70, H=2, P=40)).to(torch.float32)
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


@pytest.mark.parametrize("op", CELLS)
def test_compiles_whole(op):
    case = make(op, "bias", Size(T=5))

    def f(args, state, reset):
        return ops.OPS[op](*args, state=state, reset=reset, impl="cpu")

    args = [x.clone().requires_grad_() for x in case.args]
    expected, _ = f(args, case.state, case.reset)
    y, _ = torch.compile(f, fullgraph=True, backend="aot_eager")(args, case.state, case.reset)
    assert torch.equal(y, expected)
    grads = [torch.autograd.grad(z.square().sum(), args) for z in (y, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", CELLS)
def test_single_precision_is_single_precision(op):
    """Three digits above float32's rounding: what 37 steps may lose, and no wrong constant may."""
    case = make(op, "bias", Size(T=37))
    y, end, grads = run(case.to(torch.float32), "cpu")
    y0, end0, grads0 = run(case, "sequential")
    for a, b in zip((y, *leaves(end), *grads), (y0, *leaves(end0), *grads0), strict=True):
        assert a.dtype == torch.float32
        close(a.double(), b, "float32", 1e-4)


@pytest.mark.parametrize(
    "op, Network", [("elman", torch.nn.RNN), ("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)]
)
def test_equals_the_networks_of_pytorch(op, Network, float64):
    """The same weights give the same outputs, states and gradients as PyTorch's own code."""
    torch.manual_seed(0)
    net = Network(3, 10, batch_first=True)
    x, y_weight = torch.randn(2, 12, 3), torch.randn(2, 12, 10)
    states = torch.randn(2 if op == "lstm" else 1, 1, 2, 10)
    y0, end0 = net(x, (states[0], states[1]) if op == "lstm" else states[0])
    end0 = end0 if op == "lstm" else (end0,)

    def ours():
        gates = net.weight_hh_l0.shape[0] // 10
        inputs = torch.nn.functional.linear(x, net.weight_ih_l0, net.bias_ih_l0).view(2, 12, gates, 1, 10)
        R, c = net.weight_hh_l0.view(gates, 1, 10, 10), net.bias_hh_l0.view(gates, 1, 10)
        y, end = ops.OPS[op](inputs, R, c, state=tuple(s.transpose(0, 1) for s in states), impl="cpu")
        return y[:, :, 0], end

    y, end = ours()
    close(y, y0, "output")
    for a, b in zip(end, end0, strict=True):
        close(a.transpose(0, 1), b, "state")
    parameters = list(net.parameters())
    grads = [torch.autograd.grad((z * y_weight).sum(), parameters) for z in (y, y0)]
    for a, b, (name, _) in zip(*grads, net.named_parameters(), strict=True):
        close(a, b, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 4])
@pytest.mark.parametrize("K, n", [(1, 1), (7, 64), (64, 65), (33, 200)])
def test_products(dtype, rows, K, n):
    """Products of small integers are exact in any order of summation."""
    generator = torch.Generator().manual_seed(0)
    v, M = (torch.randint(-9, 9, size, generator=generator).to(dtype) for size in ((rows, K), (K, n)))
    acc = torch.ones(rows, product.padded(n, dtype), dtype=dtype)
    product.add_product(acc.numpy(), v.numpy(), product.packed(M[None])[0].numpy())
    assert torch.equal(acc[:, :n], 1 + v @ M)
    assert (acc[:, n:] == 1).all()
