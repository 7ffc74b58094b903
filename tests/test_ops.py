"""What the dispatcher refuses, chooses and explains, and that every parallel form means the definition."""

from dataclasses import replace

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from riverrun import ops
from riverrun.recurrences.fold import fold
from riverrun.signature import REMEMBERED
from riverrun.state import leaves, tree_map
from riverrun.testing.inputs import FORMS, SMALL, Size, make
from riverrun.testing.tolerance import close, close_states

ALL = [(op, form) for op, forms in FORMS.items() for form in forms]
PARALLEL = [(op, form, impl) for op, form in ALL for impl in ops.OPS[op].parallel]


def run(op, case, impl, gradients=True):
    """Output, final state, and the gradients of Σ |y|² + Σ |state|² to every argument and the first state."""
    args = [None if x is None else x.clone().requires_grad_() for x in case.args]
    state = tree_map(lambda x: x.clone().requires_grad_(), case.state)
    y, end = ops.OPS[op](*args, state=state, reset=case.reset, impl=impl)
    wanted = [x for x in args if x is not None] + list(leaves(state))
    finite = [x for x in leaves(end) if torch.isfinite(x).all()]
    loss = sum(x.abs().square().sum() for x in [y, *finite])
    found = torch.autograd.grad(loss, wanted, allow_unused=True)  # a carried memory forgets its first weights
    return y, end, [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("op, form, impl", PARALLEL)
@pytest.mark.parametrize("start", ["fresh", "carried", "carried and reset"])
def test_parallel_forms_mean_the_fold(op, form, impl, start):
    case = make(op, form, state=start != "fresh", reset=start.endswith("reset"))
    y, end, grads = run(op, case, impl)
    y0, end0, grads0 = run(op, case, "sequential")
    close(y, y0, "output")
    close_states(end, end0, "final state")
    for i, (a, b) in enumerate(zip(grads, grads0, strict=True)):
        close(a, b, f"gradient {i}")


@pytest.mark.parametrize("op, form, impl", PARALLEL)
def test_parallel_forms_survive_extremes(op, form, impl):
    """Decays of exactly 0 and 1, exponents of a thousand: finite, and still the definition's."""
    case = make(op, form, extreme=True)
    y, _, grads = run(op, case, impl)
    y0, _, _ = run(op, case, "sequential")
    close(y, y0, "output", 1e-7)  # sums of terms a hundred times larger cancel: two digits fewer than EXACT
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("op, form", ALL)
def test_definition_passes_gradcheck(op, form):
    size = Size(B=1, T=4, G=1, H=2, K=2, V=2, D=2, N=2, W=3, P=2)
    case = make(op, form, size, state=False)
    here = [i for i, x in enumerate(case.args) if x is not None]

    def f(*given):
        args = list(case.args)
        for i, x in zip(here, given, strict=True):
            args[i] = x
        return ops.OPS[op](*args, reset=case.reset, impl="sequential")[0]

    given = [case.args[i].clone().requires_grad_() for i in here]
    assert torch.autograd.gradcheck(f, given)
    assert torch.autograd.gradgradcheck(f, given)


@pytest.mark.parametrize("op", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_half_and_its_state_wide(op, dtype):
    case = make(op, FORMS[op][0]).to(dtype)
    y, end = ops.OPS[op](*case.args, state=case.state, reset=case.reset)
    assert y.dtype == dtype
    assert {x.dtype for x in leaves(end)} == {torch.float32}


@pytest.mark.parametrize("op, form", ALL)
def test_strides_do_not_matter(op, form):
    case = make(op, form)
    plain = ops.OPS[op](*case.args, state=case.state, reset=case.reset)
    strided = [None if x is None else x.mT.contiguous().mT if x.dim() > 1 else x for x in case.args]
    state = tree_map(lambda x: x.mT.contiguous().mT if x.dim() > 1 else x, case.state)
    y, end = ops.OPS[op](*strided, state=state, reset=case.reset.t().contiguous().t())
    close(y, plain[0], "output")
    close_states(end, plain[1], "state")


@pytest.mark.parametrize("op", FORMS)
def test_inputs_and_states_are_left_alone(op):
    case = make(op, FORMS[op][0])
    before = [None if x is None else x.clone() for x in (*case.args, *leaves(case.state))]
    ops.OPS[op](*case.args, state=case.state, reset=case.reset)
    for old, new in zip(before, (*case.args, *leaves(case.state)), strict=True):
        assert old is None or torch.equal(old, new)


def delta(**changes):
    case = make("delta", "head", Size(T=5), state=False, reset=False)
    return {**dict(zip(ops.delta.signature.names, case.args, strict=True)), **changes}


BAD = {
    "no time": (delta(**{k: v[:, :0] for k, v in delta().items()}), ValueError, "T = 0"),
    "wrong rank": (delta(q=torch.randn(2, 5, 10)), ValueError, r"q has shape \(2, 5, 10\).*B T G K"),
    "other T": (delta(k=torch.randn(2, 4, 2, 5)), ValueError, r"k has shape \(2, 4, 2, 5\).*T = 5"),
    "heads that do not divide": (
        delta(q=torch.randn(2, 5, 3, 5), k=torch.randn(2, 5, 3, 5)),
        ValueError,
        "3 q/k heads do not divide 4",
    ),
    "integers": (delta(v=torch.ones(2, 5, 4, 3, dtype=torch.long)), TypeError, "v is torch.int64"),
    "complex": (delta(v=torch.ones(2, 5, 4, 3, dtype=torch.complex64)), TypeError, "v is torch.complex64"),
    "a list": (delta(q=[1.0]), TypeError, "q is a list"),
    "no beta": (delta(beta=None), TypeError, "needs the argument 'beta'"),
    "a stranger": (delta(gamma=torch.ones(1)), TypeError, "'gamma' is not an argument"),
    "another device": (delta(g=delta()["g"].to("meta")), ValueError, "g is on meta"),
    "state of another batch": (delta(state=torch.zeros(3, 4, 5, 3)), ValueError, r"state has shape \(3, 4"),
    "state of another op": (delta(state=(torch.zeros(2, 4), None)), ValueError, "state has shape"),
    "integer state": (delta(state=torch.zeros(2, 4, 5, 3, dtype=torch.long)), TypeError, "torch.int64"),
    "reset of numbers": (delta(reset=torch.zeros(2, 5)), ValueError, "must be bool"),
    "reset on another device": (
        delta(reset=torch.zeros(2, 5, dtype=torch.bool, device="meta")), ValueError, "reset is on meta",
    ),
    "no sequences": (delta(**{k: v[:0] for k, v in delta().items()}), ValueError, "B = 0"),
    "reset of another T": (delta(reset=torch.zeros(2, 4, dtype=torch.bool)), ValueError, r"\(2, 4\)"),
    "unknown impl": (delta(impl="fast"), ValueError, "no implementation 'fast'; it has"),
}  # fmt: skip


@pytest.mark.parametrize("args, error, message", BAD.values(), ids=BAD)
def test_bad_input_is_named_before_anything_runs(args, error, message):
    ops.delta(**delta())  # what is remembered of a call that was right excuses none that is not
    with pytest.raises(error, match=message):
        ops.delta(**args)


def test_axes_of_one_name_are_equal_and_arguments_are_given_once():
    with pytest.raises(ValueError, match=r"R has shape \(1, 2, 3, 4\)"):
        ops.elman(torch.ones(1, 5, 1, 2, 3), torch.ones(1, 2, 3, 4))
    x = torch.ones(1, 2, 3)
    with pytest.raises(TypeError, match="'a' was given twice"):
        ops.diagonal(x, a=x)


def test_what_is_remembered_is_bounded():
    for T in range(1, REMEMBERED + 20):
        ops.diagonal(torch.ones(1, T, 1), torch.ones(1, T, 1), impl="cpu")
    assert len(ops.diagonal.plans) <= REMEMBERED and len(ops.diagonal.signature.known) <= REMEMBERED


def test_a_kernel_that_refuses_is_not_run(monkeypatch):
    odd = replace(ops.diagonal.kernels["cpu"], refuses=lambda name, args: "too odd")
    monkeypatch.setitem(ops.diagonal.kernels, "cpu", odd)
    x = torch.ones(3, 5, 7)
    with pytest.raises(ValueError, match=r"cannot run impl='cpu': too odd\. Leave impl=None"):
        ops.diagonal(x, x, impl="cpu")
    assert "cpu cannot: too odd" in ops.explain("diagonal", x, x)
    with pytest.raises(ValueError, match="b has shape"):
        ops.explain("diagonal", x, x[0])


def test_a_wider_state_widens_the_sums_and_not_the_output():
    x = torch.full((1, 3, 2), 0.1)
    y, end = ops.diagonal(x, x, state=torch.zeros(1, 2, dtype=torch.float64))
    assert (y.dtype, end.dtype) == (torch.float32, torch.float64)
    with pytest.raises(ValueError, match="the state has shape"):
        ops.diagonal(x, x, state=(end,))  # the same tensors, otherwise nested


@pytest.mark.parametrize("impl", ops.delta.impls)
def test_autocast_rounds_nothing_inside_an_op(impl):
    if impl == "gpu":
        pytest.skip("arguments are on a CPU")
    case = make("delta", "head", Size(T=5), state=False, reset=False).to(torch.float32)
    y, end = ops.delta(*case.args, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        y1, end1 = ops.delta(*case.args, impl=impl)
    assert torch.equal(y, y1) and torch.equal(end, end1)


def test_too_many_arguments():
    with pytest.raises(TypeError, match="takes 2 arguments"):
        ops.diagonal(*[torch.ones(1, 2, 3)] * 3)


def test_explain_says_what_runs_and_why_not_the_others():
    said = ops.explain("delta", **delta())
    assert said.splitlines()[-1] == "delta: cpu runs"
    for line in said.splitlines()[:-1]:
        assert "cannot: it runs on cuda, the arguments are on cpu" in line
    with pytest.raises(ValueError, match="no op 'delt'"):
        ops.explain("delt")


def test_forced_holds_inside_and_only_there():
    case = make("delta", "head", replace(SMALL, T=70), reset=False)
    with ops.forced(delta="sequential"):
        inside = ops.delta(*case.args, state=case.state)[0]
    assert torch.equal(inside, fold(ops.delta.recurrence, case.args, case.state)[0])
    assert not torch.equal(inside, ops.delta(*case.args, state=case.state)[0]), "rounding tells kernels apart"
    with ops.forced(delta="sequential"):
        with ops.forced(delta="chunk", outer="chunk"):
            pass
        assert torch.equal(inside, ops.delta(*case.args, state=case.state)[0]), "what was forced outside"
    with pytest.raises(ValueError, match="no implementation delta='fast'"), ops.forced(delta="fast"):
        pass


def test_a_state_that_needs_a_gradient_gets_one():
    case = make("outer", "key")
    state = case.state.clone().requires_grad_()
    y, end = ops.outer(*case.args, state=state)
    for loss in (y.sum(), end.sum()):
        (grad,) = torch.autograd.grad(loss, state, retain_graph=True)
        assert grad.abs().max() > 0


def test_tracers_see_kernels_that_otherwise_run_directly():
    """A kernel is called past PyTorch's dispatcher only while nothing but autograd would look."""
    case = make("delta", "head", Size(T=5), state=False, reset=False).to(torch.float32)

    def f(q):
        return ops.delta(q, *case.args[1:], impl="cpu")[0]

    graph = make_fx(f)(case.args[0])
    assert "matrix_cpu" in graph.code
    other = torch.randn_like(case.args[0])
    assert torch.equal(graph(other), f(other))
