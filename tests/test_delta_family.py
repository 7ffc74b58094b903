"""What the papers of the delta family state as equalities, and laws for what the table's rows leave out."""

from pathlib import Path

import pytest
import torch
from golden_delta import DELTA

from riverrun import ops
from riverrun.mixers import MIXERS, build
from riverrun.nn import unit
from riverrun.nn.solve import solve
from riverrun.state import leaves
from riverrun.testing import golden
from riverrun.testing.laws import LAWS, WIDTH, instance
from riverrun.testing.tolerance import close, close_all

SIGNED = ["deltanet", "gated_deltanet", "mamba", "rwkv7"]


@pytest.mark.parametrize(
    "law", ["shape", "agreement", "split", "reset", "select", "half", "extremes", "bounded"]
)
@pytest.mark.parametrize("name", SIGNED)
def test_laws_with_negative_eigenvalues(name, law):
    """The table's rows leave the switch off, except deltanet's."""
    args, row = {**MIXERS[name].small, "negative_eigenvalues": True}, MIXERS[name]
    LAWS[law](lambda: build(name, WIDTH, **args), row)


def test_signed_mamba_is_its_equation(float64):
    """h = (2 e^{dt A} - 1) h + dt u B, one step after another."""
    m = instance(lambda: build("mamba", WIDTH, num_states=3, negative_eigenvalues=True))
    x = torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        u, z = m.inp(x).chunk(2, -1)
        s = m.scan
        u = s.conv(u)[0]
        delta, B, C = s.dt_bc(u).split(s.sizes, -1)
        dt, h, ys = torch.log1p(torch.exp(s.dt(delta))), 0, []
        for t in range(11):
            a = 2 * torch.exp(-dt[:, t, :, None] * s.log_rate.exp()) - 1
            h = a * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1))
        y = torch.stack(ys, 1) + s.skip * u
        close(m(x)[0], m.out(y * z * torch.sigmoid(z)), "mamba")


def test_signed_mamba_keeps_no_more_for_its_gradient():
    """Not the T × E × N states: what is kept beside plain Mamba's is `low`, E × N, in and out of the op."""
    kept = []
    for negative in (False, True):
        m = build("mamba", WIDTH, num_states=16, negative_eigenvalues=negative)
        sizes = []

        def note(x, sizes=sizes):
            sizes.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            m(torch.randn(1, 64, WIDTH))
        kept.append(sum(sizes))
    states = 64 * 2 * WIDTH * 16
    assert kept[1] - kept[0] <= 2 * states / 64 < states / 4


def test_one_step_is_deltanet(float64):
    args = dict(num_heads=2, negative_eigenvalues=True)
    product, plain = (
        instance(lambda: build("deltaproduct", WIDTH, num_steps=1, gated=False, **args)),
        build("deltanet", WIDTH, **args),
    )
    plain.load_state_dict(product.state_dict())
    x = torch.randn(2, 37, WIDTH, generator=torch.Generator().manual_seed(1))
    reset = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) < 0.1
    for mine, its in zip(product(x, None, reset), plain(x, None, reset), strict=True):
        close_all(leaves(mine), leaves(its), "against deltanet")


def test_one_step_is_gated_deltanet(float64):
    args = dict(num_heads=2, key_width=5, value_width=7, negative_eigenvalues=True)
    product = instance(lambda: build("deltaproduct", WIDTH, num_steps=1, **args))
    gated = build("gated_deltanet", WIDTH, **args)
    gated.load_state_dict(product.state_dict())
    x = torch.randn(2, 37, WIDTH, generator=torch.Generator().manual_seed(1))
    for mine, its in zip(product(x), gated(x), strict=True):
        close_all(leaves(mine), leaves(its), "against gated_deltanet")


@pytest.mark.parametrize("law", ["shape", "agreement", "split", "reset", "trained"])
def test_laws_of_ungated_deltaproduct(law):
    LAWS[law](
        lambda: build("deltaproduct", WIDTH, num_heads=2, num_steps=3, gated=False), MIXERS["deltaproduct"]
    )


def test_comba_without_feedback_is_gated_linear_attention(float64):
    """d → 0 removes nothing and corrects nothing."""
    m = instance(lambda: build("comba", WIDTH, num_heads=2))
    with torch.no_grad():
        m.feedback.fill_(-1e4)
        x = torch.randn(2, 30, WIDTH, generator=torch.Generator().manual_seed(1))
        qkv, _, b, a = m.inp(x).split(m.sizes, -1)
        q, k, v = (p.unflatten(-1, (2, -1)) for p in m.conv(qkv)[0].split(m.inner, -1))
        g = -m.log_rate.exp() * torch.nn.functional.softplus(a + m.dt_bias)
        _, S = ops.outer(unit(q), unit(k), b.sigmoid()[..., None] * v, g)
        close(m(x)[1][0], S, "comba's state")


def test_solve_is_the_solution_and_its_gradient(float64):
    """Against the systems written out and solved one by one, with a state and a reset."""
    g = torch.Generator().manual_seed(0)
    B, T, H, K = 2, 21, 2, 5
    q, k = (torch.randn(B, T, H, K, generator=g) for _ in range(2))
    beta, log_decay = torch.rand(B, T, H, generator=g), -torch.rand(B, T, H, generator=g)
    ridge, start = 0.3 + torch.rand(H, K, generator=g), torch.randn(B, H, K, K, generator=g)
    given = [x.requires_grad_() for x in (q, k, beta, log_decay, ridge, start)]
    reset = torch.rand(B, T, generator=g) < 0.1
    seen = torch.randn(B, T, H, K, generator=g)

    def one_by_one(q, k, beta, log_decay, ridge, S):
        S, xs = S @ S.mT, []
        for t in range(T):
            S = torch.where(reset[:, t, None, None, None], 0, S)
            S = log_decay[:, t].exp()[..., None, None] * S
            S = S + beta[:, t, :, None, None] * k[:, t, :, :, None] * k[:, t, :, None]
            xs.append(torch.linalg.solve(S + torch.diag_embed(ridge), q[:, t]))
        return torch.stack(xs, 1), S

    def at_once(q, k, beta, log_decay, ridge, S):
        return solve(q, k, beta, log_decay, ridge, 2 * K, S @ S.mT, reset)

    outcomes = []
    for run in (one_by_one, at_once):
        x, last = run(*given)
        slopes = torch.autograd.grad((x * seen).sum() + last.square().sum(), given)
        outcomes.append((x, last, *slopes))
    close_all(outcomes[1], outcomes[0], "solution, state and gradients", bound=1e-7)


def test_second_derivatives_of_solve_raise():
    q, k = torch.randn(1, 3, 1, 4, requires_grad=True), torch.randn(1, 3, 1, 4)
    x, _ = solve(q, k, torch.rand(1, 3, 1), -torch.rand(1, 3, 1), torch.ones(1, 4), 4)
    (slope,) = torch.autograd.grad(x.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_liger_has_the_parameters_of_attention():
    """Name for name and shape for shape, so that trained weights load."""
    args = dict(num_heads=4, num_key_heads=2)
    liger, attention = build("liger", WIDTH, **args), build("attention", WIDTH, **args)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (liger, attention)]
    assert shapes[0] == shapes[1] and not list(liger.buffers())
    liger.load_state_dict(attention.state_dict())


def test_liger_with_all_weight_on_the_window_is_the_window():
    """w_1 = 1, w_2 = 0: bit for bit, resets included."""
    args = dict(num_heads=4, num_key_heads=2, window=8)
    window = build("sliding_window", WIDTH, **args)
    liger = build("liger", WIDTH, blend=(1.0, 0.0), **args)
    liger.load_state_dict(window.state_dict())
    x = torch.randn(2, 40, WIDTH, generator=torch.Generator().manual_seed(1))
    reset = torch.rand(2, 40, generator=torch.Generator().manual_seed(2)) < 0.1
    assert torch.equal(liger(x, None, reset)[0], window(x, None, reset)[0])


def test_liger_pools_gates_only():
    with pytest.raises(ValueError, match="pool = 3 does not divide the width 4"):
        build("liger", WIDTH, num_heads=4, pool=3)


def test_mamba3_of_several_ranks_against_its_authors():
    g = golden.load(Path(__file__).parent / "golden" / "variants" / "mamba3_mimo.safetensors")
    g.check(build("mamba3", g.x.shape[-1], **g.args), *DELTA["mamba3"](g))


def test_kda_with_a_bounded_gate_against_transformers():
    g = golden.load(Path(__file__).parent / "golden" / "variants" / "kda_bounded.safetensors")
    g.check(build("kda", g.x.shape[-1], **g.args), *DELTA["kda"](g))


@pytest.mark.parametrize("name", ["kda", "gated_deltanet", "comba"])
def test_compiles_by_chunks(name):
    """As GPUs run float64. PyTorch, tracing, takes softplus's gradient to lie in memory as its input does."""
    with ops.forced(delta="chunk", short_conv="shift"):
        LAWS["compiles"](lambda: build(name, WIDTH, **MIXERS[name].small).double(), MIXERS[name])


@pytest.mark.parametrize("law", ["split", "trained", "half", "extremes"])
def test_laws_of_kda_with_a_bounded_gate(law):
    LAWS[law](lambda: build("kda", WIDTH, **MIXERS["kda"].small, lower_bound=-5.0), MIXERS["kda"])


@pytest.mark.parametrize("law", ["shape", "agreement", "split", "causality", "reset", "trained", "half"])
def test_laws_of_mamba3_of_several_ranks(law):
    args = {**MIXERS["mamba3"].small, "rank": 3}
    LAWS[law](lambda: build("mamba3", WIDTH, **args), MIXERS["mamba3"])


def test_mamba3_without_turning_and_trapezoid_is_mamba2(float64):
    """λ = 1 and ω = 0: one write a token, dt k uᵀ."""
    m = instance(lambda: build("mamba3", WIDTH, **MIXERS["mamba3"].small))
    x = torch.randn(2, 30, WIDTH, generator=torch.Generator().manual_seed(1))
    x[..., 0] = 1
    with torch.no_grad():
        starts = torch.tensor([0, *m.sizes]).cumsum(0)
        m.inp.weight[starts[6] :] = 0
        m.inp.weight[starts[6] : starts[7], 0] = 100  # σ(100) is one
        z, u, B, C, dt, a, _, _ = m.inp(x).split(m.sizes, -1)
        k, q = (
            (m.by_head(p, norm) + bias)[:, :, 0]
            for p, norm, bias in zip((B, C), m.norms, m.biases, strict=True)
        )
        dt, u = torch.nn.functional.softplus(dt + m.dt_bias), u.unflatten(-1, (4, -1))
        g = -torch.nn.functional.softplus(a) * dt
        y, S = ops.outer(q, k, dt[..., None] * u, g)
        y = (y + m.skip[:, None] * u).flatten(2) * z * z.sigmoid()
        out, state = m(x)
    close(out, m.out(y), "out")
    close(state[0], S, "state")


@pytest.mark.parametrize(
    "name, args, match",
    [
        ("deltaproduct", dict(num_steps=0), "num_steps is 0"),
        ("kda", dict(lower_bound=0.0), r"lower_bound is 0\.0; it must be float or none, less than 0"),
        ("mesanet", dict(iterations=0), "iterations is 0"),
        ("mamba3", dict(num_states=5), "num_states = 5"),
        ("mamba3", dict(turning=0.01), "turning = 0.01"),
        ("mamba3", dict(num_groups=3), "num_groups = 3 does not divide"),
        ("liger", dict(window=1), "≥ 2 steps"),
    ],
)
def test_arguments_that_mean_nothing(name, args, match):
    with pytest.raises(ValueError, match=match):
        build(name, WIDTH, **args)
