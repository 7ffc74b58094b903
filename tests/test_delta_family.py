"""What the papers of the delta family state as equalities: negative eigenvalues, products of reflections."""

from dataclasses import replace
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
from riverrun.testing.tolerance import close, close_all, error

SIGNED = ["deltanet", "gated_deltanet", "mamba", "rwkv7"]
OPEN, SHUT = 40.0, -40.0  # pre-activations at which float64's sigmoid and softplus have reached their ends
LONG = 1e5  # a key so long that the 1e-6 inside its norm is lost in rounding


def bits(T=300):
    return torch.randint(2, (1, T), generator=torch.Generator().manual_seed(3)).double()


def blank(name, **args):
    """A mixer of width 8 with negative eigenvalues and all parameters zero; inputs are (bit, 1, 0, ...)."""
    mixer = build(name, 8, negative_eigenvalues=True, **args).double().requires_grad_(False)
    for p in mixer.parameters():
        p.zero_()
    if hasattr(mixer, "conv"):
        mixer.conv.weight[:, -1] = 1  # the step itself
    mixer.out.weight[0, 0] = 1
    return mixer


def seen(b, width=8):
    x = torch.zeros(*b.shape, width, dtype=torch.float64)
    x[..., 0], x[..., 1] = b, 1
    return x


def deltanet_parity():
    """s = s - 2 (s - 1/2) on a one, else s = s."""
    m = blank("deltanet", num_heads=1)
    m.inp.weight[0, 1] = m.inp.weight[8, 1] = LONG  # q and k: e_0 after their norm
    m.inp.weight[16, 1] = 1
    m.inp.weight[24, :2] = torch.tensor([OPEN - SHUT, SHUT])
    m.norm.weight[:] = 1
    return m


def gated_deltanet_parity():
    m = blank("gated_deltanet", num_heads=1)
    m.inp.weight[0, 1] = m.inp.weight[8, 1] = LONG
    m.inp.weight[16, 1] = m.inp.weight[24, 1] = 1
    m.inp.weight[32, :2] = torch.tensor([OPEN - SHUT, SHUT])
    m.dt_bias[:] = SHUT  # forgets nothing
    m.norm.weight[:] = 1
    return m


def mamba_parity():
    """h = -h + dt u B on a one, where exp(-dt) is nothing; else h = h, where dt is nothing."""
    m = blank("mamba", num_states=1, rank=1)
    for row, source in ((0, 1), (1, 0), (16, 1)):  # u_0, u_1 and the gate of channel 0
        m.inp.weight[row, source] = 1
    m.dt_bc.weight[0, 1] = m.dt_bc.weight[1, 0] = m.dt_bc.weight[2, 0] = 1  # δ by the bit, B and C by the one
    m.dt.weight[0, 0], m.dt.bias[0] = 3 * OPEN, SHUT
    return m


def rwkv7_parity():
    """Along the key, the transition is w - c a: its least w less c on a one, else one."""
    m = blank("rwkv7", num_heads=1, decay_rank=1, rate_rank=1, gate_rank=1)
    m.r.weight[0, 1] = m.k.weight[0, 1] = m.v.weight[0, 1] = 1
    for gate, slope in ((m.decay, torch.tanh(torch.ones(()))), (m.rate, 1)):
        gate.inp.weight[0, 0] = 1
        gate.out.weight[:, 0], gate.out.bias[:] = (OPEN - SHUT) / slope, SHUT
    m.removal[:] = LONG
    m.replacement[:] = m.norm.weight[:] = m.gate.out.weight[:] = 1
    return m


PARITY = {
    f.__name__.removesuffix("_parity"): f
    for f in (deltanet_parity, gated_deltanet_parity, mamba_parity, rwkv7_parity)
}


@pytest.mark.parametrize("name", PARITY)
def test_one_layer_counts_modulo_two(name):
    """y is zero after an even number of ones and the same for every odd one, after 1 as after 150."""
    b = bits()
    y = PARITY[name]()(seen(b))[0][..., 0]
    odd = b.cumsum(1) % 2
    assert y.abs().max() > 0.01
    # each step may be off by some roundings, 300 of them by 1e-13, and the norm of an empty state enlarges
    # that a thousandfold: its eps is 1e-6
    close(y, odd * y.abs().max() * y.sum().sign(), name, bound=1e-6)


@pytest.mark.parametrize("name", SIGNED)
def test_without_the_switch_nothing_flips(name):
    """The same weights, with eigenvalues in [0, 1] (rwkv7: down to -0.455), forget the count."""
    b, m = bits(), PARITY[name]()
    if name == "rwkv7":
        m.strength = 1
    m.negative_eigenvalues = False
    y = m(seen(b))[0][..., 0]
    assert error(y, b.cumsum(1) % 2 * y.abs().max() * y.sum().sign()) > 0.3


@pytest.mark.parametrize(
    "law", ["shape", "agreement", "split", "reset", "select", "half", "extremes", "bounded"]
)
@pytest.mark.parametrize("name", SIGNED)
def test_laws_with_negative_eigenvalues(name, law):
    """The table's rows leave the switch off, except deltanet's."""
    args, row = {**MIXERS[name].small, "negative_eigenvalues": True}, MIXERS[name]
    row = replace(row, op="diagonal") if name == "mamba" else row  # which it then stands on
    LAWS[law](lambda: build(name, WIDTH, **args), row)


def test_signed_mamba_is_its_equation(float64):
    """h = (2 e^{dt A} - 1) h + dt u B, one step after another."""
    m = instance(lambda: build("mamba", WIDTH, num_states=3, negative_eigenvalues=True))
    x = torch.randn(2, 11, WIDTH, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        u, z = m.inp(x).chunk(2, -1)
        u = m.conv(u)[0]
        delta, B, C = m.dt_bc(u).split(m.sizes, -1)
        dt, h, ys = torch.log1p(torch.exp(m.dt(delta))), 0, []
        for t in range(11):
            a = 2 * torch.exp(-dt[:, t, :, None] * m.log_rate.exp()) - 1
            h = a * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
            ys.append((h * C[:, t, None]).sum(-1))
        y = torch.stack(ys, 1) + m.skip * u
        close(m(x)[0], m.out(y * z * torch.sigmoid(z)), "mamba")


def test_rwkv7_reaches_minus_one_and_no_further():
    """diag(w) - c (a ⊙ κ) κᵀ: c = 1 + min w keeps eigenvalues in [-1, 1] and reaches -1, c = 2 leaves it."""
    g = torch.Generator().manual_seed(0)
    c = build("rwkv7", 8, num_heads=1, negative_eigenvalues=True).strength
    least = c - 1
    w = least + (1 - least) * torch.rand(200, 6, generator=g, dtype=torch.float64)
    a, kappa = (torch.randn(200, 6, generator=g, dtype=torch.float64) for _ in range(2))
    w[:50], a = least, a.sigmoid()
    a[:50], kappa = 1, kappa / kappa.norm(dim=-1, keepdim=True)

    def eigenvalues(c):
        found = torch.linalg.eigvals(torch.diag_embed(w) - c * (a * kappa)[..., None] * kappa[:, None])
        assert found.imag.abs().max() < 1e-9  # similar to a symmetric matrix
        return found.real

    assert abs(eigenvalues(c).min() + 1) < 1e-12 and eigenvalues(c).max() <= 1
    assert eigenvalues(2).min() < -1.4 and eigenvalues(1).min() > -0.5


def product(layout, **args):
    """A blank `deltaproduct`, its projection by names: (name, step, head, channel) -> {input: weight}."""
    m = blank("deltaproduct", gated=False, **args)
    H, n, K = m.num_heads, m.num_steps, m.key_width
    V = m.inner[2] // (n * H)
    start = {"q": 0, "k": H * K, "v": H * K * (n + 1), "b": m.sizes[0]}
    size = {"q": K, "k": K, "v": V, "b": 1}
    for (name, step, head, channel), weights in layout.items():
        row = start[name] + (step * H + head) * size[name] + channel
        for source, weight in weights.items():
            m.inp.weight[row, source] = weight
    m.norm.weight[:] = 1
    return m


def test_two_reflections_count_modulo_three():
    """They turn by twice the angle between their keys: 60 degrees apart, one layer counts modulo three.

    Inputs are one-hot: 0 begins by writing at 45 degrees, 1 adds one, 2 adds two, 3 adds none. The signs of
    the two coordinates tell 45, 165 and 285 degrees apart.
    """
    a, b = (LONG, 0.0), (LONG / 2, LONG * 0.75**0.5)
    layout = {("v", 0, h, 0): {0: LONG} for h in range(2)}
    for h in range(2):
        layout[("q", 0, h, h)] = {0: LONG, 1: LONG, 2: LONG, 3: LONG}
        for c in range(2):
            layout[("k", 0, h, c)] = {0: LONG, 1: a[c], 2: b[c]}
            layout[("k", 1, h, c)] = {1: b[c], 2: a[c]}
        layout[("b", 0, h, 0)] = {1: OPEN, 2: OPEN, 3: SHUT}  # σ(0) = 1/2 writes all of v at first
        layout[("b", 1, h, 0)] = {0: SHUT, 1: OPEN, 2: OPEN, 3: SHUT}
    m = product(layout, num_heads=2)
    m.out.weight.zero_()
    m.out.weight[0, 0] = m.out.weight[1, 4] = 1
    digits = torch.randint(3, (1, 200), generator=torch.Generator().manual_seed(5))
    x = torch.nn.functional.one_hot(torch.tensor([3, 1, 2])[digits], 8).double()
    x[:, 0] = torch.eye(8, dtype=torch.float64)[0]
    signs = m(x)[0][0, 1:, :2].sign()
    expected = torch.tensor([[1, 1], [-1, 1], [1, -1]])[digits[0, 1:].cumsum(0) % 3]
    assert torch.equal(signs, expected.double())


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


def test_mamba3_counts_modulo_two():
    """What the first token wrote is turned by half a turn at every one: its sign is the parity."""
    m = build("mamba3", 8, num_heads=2, num_states=4).double().requires_grad_(False)
    for p in m.parameters():
        p.zero_()
    starts = torch.tensor([0, *m.sizes]).cumsum(0)
    m.inp.weight[starts[0], 1] = m.inp.weight[starts[1], 2] = 1  # z is open, u is written by the first
    m.inp.weight[starts[4] : starts[5], 1] = 0.5413248546129181  # dt = softplus of this = 1
    m.inp.weight[starts[7], 0] = OPEN  # ω
    m.biases[..., :2] = 1  # k and q: only the pair that turns
    m.out.weight[0, 0] = 1
    b = bits()
    x = seen(b)
    x[:, 0, 0], x[:, 0, 2] = 0, 1
    y = m(x)[0][0, :, 0]
    assert torch.equal(y.sign(), 1 - 2 * (x[0, :, 0].cumsum(0) % 2))
