"""Test-time memories: every rule's parallel form against its definition, and cases that have other names."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from riverrun import ops
from riverrun.mixers import MIXERS, build
from riverrun.recurrences.memory import BOUNDED, LOSSES, RETENTIONS, SHAPES, Rule
from riverrun.recurrences.retention import orthogonal
from riverrun.state import leaves, tree_map
from riverrun.testing.laws import WIDTH, laws_for
from riverrun.testing.tolerance import close, close_all, close_states

B, T, H, K, E = 2, 23, 2, 4, 5
RULES = {
    "-".join(map(str, choices)): Rule(*choices)
    for choices in [
        *((m, "l2", "decay", z, c) for m, z, c in itertools.product(SHAPES, (False, True), (1, 4))),
        *(("mlp", loss, "decay", False, 4) for loss in LOSSES),
        *(("mlp", "l2", retain, z, c) for retain in ("lq", "softmax") for z, c in ((False, 1), (True, 4))),
        *(("swiglu", "dot", retain, False, 4) for retain in ("norm", "muon")),
    ]
}  # fmt: skip


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arguments(rule, T=T, V=K, norm=True, bias=True, seed=0):
    """Float64 arguments of a rule by name, heads of equal width so that the memory may be residual."""
    sizes = dict(K=K, E=E, V=V, I=K + bias, J=E + bias)
    q, k = (F.normalize(draw(B, T, H, K, seed=seed + i), dim=-1) for i in (1, 2))
    a = dict(q=q, k=k, v=draw(B, T, H, V, seed=seed + 3), lr=0.3 * draw(B, T, H, seed=seed + 4).sigmoid())
    for i, (name, axes) in enumerate(rule.shapes.items()):
        a[name] = draw(H, *(sizes[axis] for axis in axes.split()), seed=10 + i) / 2
    a["g"] = None if rule.by_chunk else F.logsigmoid(draw(B, T, H, seed=seed + 5) + 2)
    a["m"] = F.logsigmoid(draw(B, T, H, seed=seed + 6)) if rule.momentum else None
    a["bound"] = draw(B, T, H, seed=seed + 7).exp() if rule.loss in BOUNDED else None
    a["norm"] = torch.stack([1 + draw(H, V, seed=8) / 4, draw(H, V, seed=9) / 4]) if norm else None
    return {name: x for name, x in a.items() if x is not None}


def run(rule, args, impl=None, state=None, reset=None):
    return ops.test_time(rule)(**args, state=state, reset=reset, impl=impl)


def with_gradients(rule, args, impl, state, reset):
    args = {name: x.clone().requires_grad_() for name, x in args.items()}
    state = tree_map(lambda x: x.clone().requires_grad_(), state)
    y, end = run(rule, args, impl, state, reset)
    loss = sum(x.square().sum() for x in (y, *leaves(end)) if x.requires_grad)
    wanted = [*args.values(), *leaves(state)]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return y, end, [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_rounds_mean_the_definition(rule):
    """Rows that stand at different places of their chunks, and resets that cut chunks short."""
    staggered = torch.zeros(B, 7, dtype=torch.bool)
    staggered[1, 5] = True
    _, state = run(rule, arguments(rule, 7, seed=20), "sequential", reset=staggered)
    reset = torch.zeros(B, T, dtype=torch.bool)
    for mark in ((0, 3), (0, 4), (1, 0), (1, 17)):
        reset[mark] = True
    args = arguments(rule)
    for before, flags in ((None, None), (state, None), (state, reset)):
        y0, end0, slopes0 = with_gradients(rule, args, "sequential", before, flags)
        y, end, slopes = with_gradients(rule, args, "chunk", before, flags)
        close(y, y0, "output")
        close_states(end, end0, "state")
        close_all(slopes, slopes0, "gradient")


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_definition_passes_gradcheck(rule):
    args = {name: x[:1, :3] if name in ("q", "k", "v", "lr", "g", "m", "bound") else x
            for name, x in arguments(rule).items()}  # fmt: skip
    names = list(args)

    def f(*given):
        return run(rule, dict(zip(names, given, strict=True)), "sequential")[0]

    assert torch.autograd.gradcheck(f, [x.clone().requires_grad_() for x in args.values()])


@pytest.mark.parametrize("impl", ["sequential", "chunk"])
def test_linear_memory_is_linear_attention(impl):
    a = arguments(Rule(loss="dot"), bias=False, norm=False)
    a["W1"] = torch.zeros_like(a["W1"])
    for g in (None, a["g"]):
        y, (_, (S,), _, _) = run(Rule(loss="dot"), {**a, "g": g}, impl)
        y0, S0 = ops.outer(a["q"], a["k"], a["lr"][..., None] * a["v"], g)
        close(y, y0, "output")
        close(S, S0, "memory")


@pytest.mark.parametrize("impl", ["sequential", "chunk"])
def test_linear_memory_is_deltanet_and_gated_deltanet(impl):
    """Gated DeltaNet corrects what is left after the decay: e^g (e^{-g} v - what the key read before)."""
    a = arguments(Rule(), bias=False, norm=False)
    a["W1"] = torch.zeros_like(a["W1"])
    g, beta = a.pop("g"), a["lr"]
    y, (_, (S,), _, _) = run(Rule(), a, impl)
    y0, S0 = ops.delta(a["q"], a["k"], a["v"], beta)
    close(y, y0, "DeltaNet, output")
    close(S, S0, "DeltaNet, memory")
    gated = {**a, "g": g, "lr": beta * g.exp(), "v": a["v"] * (-g).exp()[..., None]}
    y, (_, (S,), _, _) = run(Rule(), gated, impl)
    y0, S0 = ops.delta(a["q"], a["k"], a["v"], beta, g)
    close(y, y0, "Gated DeltaNet, output")
    close(S, S0, "Gated DeltaNet, memory")


@pytest.mark.parametrize("impl", ["sequential", "chunk"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_titans_written_out(impl, chunk):
    """Behrouz et al. 2025 (arXiv:2501.00663) eq. 12-14 for a matrix, with chunks by hand."""
    rule = Rule(momentum=True, chunk=chunk)
    a = arguments(rule, bias=False, norm=False)
    y, _ = run(rule, a, impl)
    for b, h in itertools.product(range(B), range(H)):
        M, S = a["W1"][h], torch.zeros(K, K, dtype=torch.float64)
        for t in range(T):
            if t % chunk == 0:
                start = M
            k, v = a["k"][b, t, h], a["v"][b, t, h]
            S = a["m"][b, t, h].exp() * S - a["lr"][b, t, h] * torch.outer(k, k @ start - v)
            M = a["g"][b, t, h].exp() * M + S
            close(y[b, t, h], a["q"][b, t, h] @ M, f"token {t}")


@pytest.mark.parametrize("retain", ["norm", "muon"])
def test_order_inside_a_chunk_does_not_matter(retain):
    """Zhang et al. 2025 (arXiv:2505.23884): a large chunk is a set; its tokens read what came before it."""
    rule, order = Rule("swiglu", "dot", retain, chunk=8), torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])
    a = arguments(rule, T=16)
    y, (W, *_) = run(rule, a)
    mixed = {
        n: torch.cat([x[:, order], x[:, 8:]], 1) if x.dim() > 2 and x.shape[1] == 16 else x
        for n, x in a.items()
    }
    z, (V, *_) = run(rule, mixed)
    close(z[:, :8], y[:, order], "the chunk")
    close(z[:, 8:], y[:, 8:], "what follows")
    close_states(V, W, "memory")
    other = {**a, "v": a["v"].clone()}
    other["v"][:, :8] += 1
    z, _ = run(rule, other)
    assert torch.equal(z[:, :8], y[:, :8]) and not torch.allclose(z[:, 8:], y[:, 8:])


def test_weights_keep_their_lengths_and_muon_is_orthogonal():
    rule = Rule("swiglu", "dot", "muon", chunk=4)
    a = arguments(rule)
    _, (W, *_) = run(rule, a)
    for name, w in zip(rule.shapes, W, strict=True):
        close(w.norm(dim=-2), a[name].norm(dim=-2).expand(B, H, -1), name)
    for shape in ((6, 4), (4, 6), (5, 5)):
        values = torch.linalg.svdvals(orthogonal(draw(3, *shape)))
        assert (values - 1).abs().max() < 0.35, "five steps of this polynomial leave each in 1 ± 0.35"


def test_softmax_retention_is_its_equation():
    """Behrouz et al. 2025 (arXiv:2504.13173) sec. 5: W ← softmax(α log W - η ∇), log W taken literally."""
    rule = Rule(retain="softmax")
    a = arguments(rule, bias=False, norm=False)
    y, _ = run(rule, a)
    W = a["W1"][0].softmax(0)
    for t in range(T):
        k, v, eta = a["k"][0, t, 0], a["v"][0, t, 0], a["lr"][0, t, 0]
        W = (a["g"][0, t, 0].exp() * W.log() - eta * torch.outer(k, k @ W - v)).softmax(0)
        close(y[0, t, 0], a["q"][0, t, 0] @ W, f"token {t}")


def test_huber_bounds_an_outlier():
    """A value a thousand times too large moves a bounded memory by at most η δ |k|, another by far more."""
    moved = {}
    for loss in ("l2", "huber", "l2l1"):
        a = arguments(Rule(loss=loss), T=1, norm=False)
        a["v"] = 1e3 * a["v"]
        if loss != "l2":
            a["bound"] = torch.ones_like(a["bound"])
        _, (_, (A,), _, _) = run(Rule(loss=loss), {**a, "g": None})
        moved[loss] = (A - a["W1"]).norm(dim=(-2, -1)).max()
    assert moved["huber"] < 0.3 * 2**0.5 and moved["l2"] > 10
    assert moved["huber"] < moved["l2l1"] < 0.3 * 2**0.5 * K**0.5, "by η δ at most in every channel"


def test_yaad_written_out():
    """Gradient of |e|²/2 where |e| ≤ δ, else δ sign(e) in every channel: eq. 26, for a matrix."""
    rule = Rule(loss="l2l1")
    a = arguments(rule, norm=False, bias=False)
    y, _ = run(rule, a)
    W, far = a["W1"][0], []
    for t in range(T):
        k, e = a["k"][0, t, 0], a["k"][0, t, 0] @ W - a["v"][0, t, 0]
        far.append(bool(e.norm() > a["bound"][0, t, 0]))
        slope = a["bound"][0, t, 0] * e.sign() if far[-1] else e
        W = a["g"][0, t, 0].exp() * W - a["lr"][0, t, 0] * torch.outer(k, slope)
        # |e| is smooth within a thousandth of zero
        close(y[0, t, 0], a["q"][0, t, 0] @ W, f"token {t}", bound=1e-3)
    assert any(far) and not all(far)


@pytest.mark.parametrize("no_slopes", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("impl", ["sequential", "chunk"])
def test_learning_at_test_time_needs_no_outer_gradient(no_slopes, impl):
    rule = Rule("mlp", momentum=True, chunk=4)
    expected, _ = run(rule, arguments(rule))
    with no_slopes():
        close(run(rule, arguments(rule), impl)[0], expected, "output")


VARIANTS = [
    ("ttt", dict(memory="mlp", expand=2)),
    ("miras", dict(variant="yaad")),
    ("miras", dict(variant="memora")),
    ("miras", dict(variant="yaad", memory="linear", loss="l2", momentum=True, residual=False)),
    ("titans", dict(variant="mag")),
    ("titans", dict(variant="mal", memory="linear", chunk=1)),
    ("lact", dict(muon=False)),
]


@pytest.mark.parametrize(
    "name, args, law",
    [
        pytest.param(name, args, law, id="-".join([name, *map(str, args.values()), title]))
        for name, args in VARIANTS
        for title, law in laws_for(MIXERS[name])
    ],
)
def test_law_of_a_variant(name, args, law):
    law(lambda: build(name, WIDTH, **{**MIXERS[name].small, **args}), MIXERS[name])


@pytest.mark.parametrize("name", ["ttt", "miras", "titans", "lact"])
def test_training_compiles(name):
    """Whole: rounds are counted from data only where documents are packed, and mac cuts its time so."""
    torch.compiler.reset()
    args = {"variant": "mag"} if name == "titans" else {}
    mixer = build(name, WIDTH, **{**MIXERS[name].small, **args})
    x = draw(2, 10, WIDTH).float()
    y = torch.compile(mixer, fullgraph=True, backend="aot_eager")(x)[0]
    torch.testing.assert_close(y, mixer(x)[0])


@pytest.mark.parametrize(
    "name, match", [("titans", "'mac', 'mag', 'mal'"), ("miras", "'memora', 'moneta', 'yaad'")]
)
def test_a_variant_that_does_not_exist(name, match):
    with pytest.raises(ValueError, match=f"no variant 'mam'.*{match}"):
        build(name, WIDTH, variant="mam")


def test_a_rule_that_does_not_exist():
    for wrong, match in (
        (dict(memory="cnn"), "memory = 'cnn'.*'mlp'"), (dict(loss="l1"), "loss = 'l1'"),
        (dict(retain="all"), "retain = 'all'"), (dict(chunk=0), "chunk = 0"),
        (dict(retain="muon", momentum=True), "takes no momentum"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=match):
            Rule(**wrong)
    a = arguments(Rule())
    with pytest.raises(ValueError, match="6 rows for inputs of 4"):
        run(Rule(), {**a, "W1": torch.cat([a["W1"], a["W1"][:, :1]], 1)})
    assert set(RETENTIONS) == {rule.retain for rule in RULES.values()}
