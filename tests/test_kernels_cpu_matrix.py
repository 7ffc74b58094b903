"""The compiled matrix memories against their definition: results, states and every gradient, in float64."""

import pytest
import torch
import torch.nn.functional as F

from riverrun import ops
from riverrun.state import leaves, tree_map

# both sides compute in float64, on sums of a few hundred terms whose order differs
CLOSE = {"rtol": 1e-9, "atol": 1e-10}
B, H, K, V = 2, 4, 5, 3
FORMS = [
    "outer", "outer head", "outer key", "outer bonus", "outer head bonus", "outer key bonus",
    "mlstm", "delta", "delta head", "delta key", "dplr",
]  # fmt: skip


def arguments(form: str, T: int, groups: int = H, V: int = V, K: int = K, seed: int = 0):
    """Random float64 arguments of the op that `form` begins with, leaves that want gradients."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=r, dtype=torch.float64)

    name, *words = form.split()
    q, k, v = normal(B, T, groups, K), normal(B, T, groups, K), normal(B, T, H, V)
    g = next(
        (3 * F.logsigmoid(normal(B, T, *s)) for w, s in (("head", (H,)), ("key", (H, K))) if w in words), None
    )
    unit = F.normalize(k, dim=-1)
    args = {
        "outer": lambda: (q, k, v, g, normal(H, K) if "bonus" in words else None),
        "mlstm": lambda: (q, k, v, 3 * F.logsigmoid(normal(B, T, H)), 5 * normal(B, T, H)),
        "delta": lambda: (q, unit, v, 2 * torch.rand(B, T, H, generator=r, dtype=torch.float64), g),
        "dplr": lambda: (q, k, v, F.logsigmoid(normal(B, T, H, K)), -0.7 * unit, unit),
    }[name]()
    return name, tuple(x if x is None else x.requires_grad_() for x in args)


def results(name, args, state, reset, impl):
    """y, the last state, and the gradients of a loss on both to all arguments and the state."""
    y, last = getattr(ops, name)(*args, state=state, reset=reset, impl=impl)
    loss = (y**2).sum() + sum((x**3).sum() for x in leaves(last))
    wanted = [x for x in (*args, *leaves(state)) if x is not None]
    return [y, *leaves(last), *torch.autograd.grad(loss, wanted)]


def start(name, args):
    """A state such as an earlier stretch would have left."""
    with torch.no_grad():
        _, state = getattr(ops, name)(*args, impl="sequential")
    return tree_map(lambda x: (0.3 * x.detach()).requires_grad_(), state)


def resets(T: int) -> torch.Tensor:
    """Dense in one row, with neighbours and at multiples of the block; one at the very start in the other."""
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, [t for t in (3, 4, 16, 31, 63, 64, 67) if t < T]] = True
    reset[1, 0] = True
    return reset


def compare(name, args, state, reset):
    ours, theirs = (results(name, args, state, reset, impl) for impl in ("cpu", "sequential"))
    for x, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, expected, **CLOSE)


@pytest.mark.parametrize("T", [1, 7, 147])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_definition(form, cut, continued, T):
    name, args = arguments(form, T, groups=H if form == "dplr" else 2)
    compare(name, args, start(name, args) if continued else None, resets(T) if cut else None)


@pytest.mark.parametrize("form", FORMS)
def test_columns_are_shared_out(form):
    """More value columns than a task takes, and more keys than lanes of a vector."""
    name, args = arguments(form, 21, V=97, K=18)
    compare(name, args, start(name, args), resets(21))


@pytest.mark.parametrize("form", FORMS)
def test_any_strides(form):
    name, args = arguments(form, 19)
    apart = tuple(
        x
        if x is None
        else torch.stack([x, x], -1).detach()[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
        for x in args
    )
    assert not apart[0].is_contiguous()
    compare(name, tuple(x if x is None else x.requires_grad_() for x in apart), None, resets(19))


@pytest.mark.parametrize("form", ["outer head", "outer key", "delta head", "delta key", "dplr"])
def test_extreme_decays(form):
    """Decays from none at all to everything at once; what is forgotten completely leaves no trace."""
    name, args = arguments(form, 40)
    at = 4 if name == "delta" else 3
    g = -1e3 * torch.rand(args[at].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g[:, ::3], g[:, 5], g[:, 7] = -0.0, -torch.inf, -1e-30
    compare(name, (*args[:at], g.requires_grad_(), *args[at + 1 :]), None, None)


@pytest.mark.parametrize("T", [3, 40])
@pytest.mark.parametrize("continued", [False, True])
def test_extreme_gates(continued, T):
    """Gates of mlstm open and shut at once, and both terms of the maximum equal for a stretch."""
    name, args = arguments("mlstm", T, groups=2)
    r = torch.Generator().manual_seed(1)
    state = start(name, args) if continued else None
    choice = torch.randint(5, (2, B, T, H), generator=r)
    f = torch.tensor([-0.0, -1e-30, -2.0, -1e3, -torch.inf], dtype=torch.float64)[choice[0]]
    i = torch.tensor([-torch.inf, -500.0, -20.0, 3.0, 500.0], dtype=torch.float64)[choice[1]]
    i[f.isinf()] = 3.0  # nothing to keep and nothing to write is a normaliser of 0 / 0
    f[1], i[1] = 0.0, 1.0
    compare(name, (*args[:3], f.requires_grad_(), i.requires_grad_()), state, resets(T))


@pytest.mark.parametrize("T", [4, 40])
@pytest.mark.parametrize("part", [0, 2, 3])
def test_gates_below_the_cut(part, T):
    """e^{-m} is cut off at e^60, so that y depends on m. Values are large, else y would vanish; the loss is
    y, n or m alone."""
    _, (q, k, v, f, i) = arguments("mlstm", T)
    f, i = (f.detach() - 30).requires_grad_(), (i.detach() - 70).requires_grad_()
    given = [q, k, (v.detach() * 1e26).requires_grad_(), f, i]
    m = (torch.full((B, H), -65.0, dtype=torch.float64) + torch.arange(H)).requires_grad_()
    S, n = (torch.zeros(B, H, *shape, dtype=torch.float64, requires_grad=True) for shape in ((K, V), (K,)))
    grads = []
    for impl in ("cpu", "sequential"):
        y, last = ops.mlstm(*given, state=(S, n, m), reset=resets(T), impl=impl)
        loss = (y, *last)[part].sum()
        grads.append(torch.autograd.grad(loss, (*given, S, n, m), allow_unused=True, materialize_grads=True))
    for x, expected in zip(*grads, strict=True):
        torch.testing.assert_close(x, expected, **CLOSE)


@pytest.mark.parametrize("T", [2, 20])
def test_nothing_is_divided_by_zero(T):
    """With m > 88 float32 has no e^{-m}, and a query of zeros reads a normaliser of 0."""
    args = [x.detach().float() for x in arguments("mlstm", T)[1]]
    args[0][:, ::2], args[4][:] = 0, 95
    y, _ = ops.mlstm(*args, impl="cpu")
    assert y.isfinite().all() and (y[:, ::2] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_large_inputs_stay_finite(form):
    name, args = arguments(form, 40)
    args = tuple(x if x is None else x.detach().float().requires_grad_() for x in args)
    large = (args[0] * 1e3, args[1] if name in ("delta", "dplr") else args[1] * 1e3, args[2] * 1e3, *args[3:])
    assert all(x.isfinite().all() for x in results(name, large, None, None, "cpu"))


def test_a_reset_clears_what_is_not_finite():
    _, args = arguments("delta head", 20)
    spoiled = torch.full((B, H, K, V), torch.nan, dtype=torch.float64)
    reset = torch.zeros(B, 20, dtype=torch.bool)
    reset[:, 0] = True
    y, state = ops.delta(*args, state=spoiled, reset=reset, impl="cpu")
    expected, last = ops.delta(*args, impl="cpu")
    assert torch.equal(y, expected) and torch.equal(state, last)


@pytest.mark.parametrize("form", ["outer key bonus", "mlstm", "delta head", "dplr"])
def test_gradcheck(form):
    name, args = arguments(form, 3, K=2, V=2)
    given = [x for x in args if x is not None]

    def run(*xs):
        rest = iter(xs)
        y, last = getattr(ops, name)(*(x if x is None else next(rest) for x in args), impl="cpu")
        return y, *leaves(last)

    assert torch.autograd.gradcheck(run, given)


@pytest.mark.parametrize("form", ["outer key bonus", "mlstm", "delta key", "dplr"])
def test_same_bits_on_any_number_of_threads(form):
    name, args = arguments(form, 37, V=70, groups=H if form == "dplr" else 2)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(name, args, None, resets(37), "cpu"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("form", ["outer head", "mlstm", "delta key", "dplr"])
def test_compiles_whole(form):
    name, args = arguments(form, 9)
    given = [x for x in args if x is not None]

    def loss(*xs):
        rest = iter(xs)
        y, last = getattr(ops, name)(*(x if x is None else next(rest) for x in args), impl="cpu")
        return (y**2).sum() + sum(x.sum() for x in leaves(last))

    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True, backend="aot_eager")(*given), given)
    for x, expected in zip(ours, torch.autograd.grad(loss(*given), given), strict=True):
        torch.testing.assert_close(x, expected, **CLOSE)


def test_a_second_derivative_raises():
    name, args = arguments("delta head", 5)
    y, _ = getattr(ops, name)(*args, impl="cpu")
    (first,) = torch.autograd.grad((y**2).sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        first.sum().backward()
