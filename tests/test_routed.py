"""Mixers whose tokens meet few of many memories: what their papers promise of them."""

import pytest
import torch
from equations_routed import mom, sse

from riverrun import ops
from riverrun.mixers import build
from riverrun.mixers.mom import MoM
from riverrun.mixers.sse import SSE
from riverrun.nn.route import Router, balance, balances
from riverrun.state import detach, leaves, tree_map
from riverrun.testing.laws import gradients, inputs, instance, resets
from riverrun.testing.tolerance import close, close_all, close_states

WIDTH = 16
RULES = ["linear", "gla", "gated_delta"]
MARKS = resets(33, (0, 0), (0, 12), (0, 13), (1, 30))


def mixture(**args):
    return instance(lambda: MoM(WIDTH, **{"num_heads": 2, "num_memories": 3, "rank": 4, **args}))


def expansion(**args):
    return instance(lambda: SSE(WIDTH, **{"num_heads": 2, "num_partitions": 3, "decay_rank": 4, **args}))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shared", [False, True])
def test_every_rule_follows_its_equation(rule, shared, float64):
    mixer, x = mixture(rule=rule, shared=shared), inputs(23)
    with torch.no_grad():
        close(mixer(x)[0][1], mom(mixer, x[1]), rule)


@pytest.mark.parametrize("writers, readers", [(1, 1), (1, 3), (2, 1)])
def test_partitions_are_written_and_read_by_their_own_numbers(writers, readers, float64):
    mixer, x = expansion(writers=writers, readers=readers), inputs(23)
    with torch.no_grad():
        close(mixer(x)[0][1], sse(mixer, x[1]), "sse")


INNER = {
    "linear": ("linear_attention", {}),
    "gla": ("gla", {"rank": 4}),
    "gated_delta": ("gated_deltanet", {}),
}


def cut(inner, one, rule):
    """The parameters of the mixer `inner` as those of a mixture of one memory."""
    H, W = one.num_heads, dict(inner.named_parameters())
    size = H * one.key_width
    rows = W.pop("inp.weight")
    sizes = {
        "linear": [size, size, WIDTH],
        "gla": [size, size, WIDTH, WIDTH, 4],
        "gated_delta": [size, size, WIDTH, WIDTH, H, H],
    }[rule]
    q, k, v, *rest = rows.split(sizes)
    z = rest[:1]
    W |= {"inp.weight": torch.cat([q, *z]), "write.weight": torch.cat([k, v, *rest[1:]]).T[None]}
    return W | {"router.weight": one.router.weight}


@pytest.mark.parametrize("rule", RULES)
def test_one_memory_is_the_mixer_of_its_rule(rule, float64):
    name, args = INNER[rule]
    inner = instance(lambda: build(name, WIDTH, num_heads=2, **args))
    one = mixture(rule=rule, num_memories=1, chosen=1, shared=False)
    one.load_state_dict(cut(inner, one, rule))
    x = inputs(33).requires_grad_()
    (theirs, S), (ours, end) = inner(x, None, MARKS), one(x, None, MARKS)
    close(ours, theirs, rule)
    close_all((e[:, 0] for e in leaves(end)), leaves(S), "state")
    close_all(gradients([ours], [x]), gradients([theirs], [x]), "gradient")


def both(make, **args):
    packed, masked = make(**args), make(masked=True, **args)
    masked.load_state_dict(packed.state_dict())
    return packed, masked


FORMS = [(mixture, dict(rule=rule, window=1)) for rule in RULES]
FORMS += [(expansion, dict(writers=w, readers=r)) for w, r in ((1, 1), (1, 2), (2, 1))]


@pytest.mark.parametrize("make, args", FORMS, ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize("reset", [None, MARKS], ids=["whole", "documents"])
def test_packed_is_masked(make, args, reset, float64):
    packed, masked = both(make, **args)
    x, found = inputs(33).requires_grad_(), []
    start = detach(packed(inputs(9))[1])
    for mixer in (packed, masked):
        begin = tree_map(lambda s: s.clone().requires_grad_(), start)
        y, end = mixer(x, begin, reset)
        wanted = [x, *mixer.parameters(), *leaves(begin)]
        found.append((y, end, gradients([y, *leaves(end)], wanted)))
    (y, end, slopes), (z, last, others) = found
    close(y, z, "output")
    close_states(end, last, "after")
    close_all(slopes, others, "gradient")


@pytest.mark.parametrize("make", [mixture, expansion])
def test_packed_is_masked_for_any_resets(make, float64):
    args = {"window": 1} if make is mixture else {}
    packed, masked = both(make, **args)
    for seed in range(8):
        random = torch.Generator().manual_seed(seed)
        reset = torch.rand(2, 33, generator=random) < (0.03, 0.3)[seed % 2]
        x, start = inputs(33, seed), packed(inputs(9))[1]
        with torch.no_grad():
            (y, end), (z, last) = packed(x, start, reset), masked(x, start, reset)
        close(y, z, f"output, seed {seed}")
        close_states(end, last, f"seed {seed}")


@pytest.mark.parametrize("make", [mixture, expansion])
def test_one_token_of_one_sequence_is_as_any_other(make, float64):
    mixer, x = make(), inputs(30)[:1].requires_grad_()
    reset = resets(30, (0, 0), (0, 7), (0, 8), (0, 21))[:1]
    start = detach(mixer(inputs(9)[:1])[1])
    whole, end = mixer(x, start, reset)
    state, ys = start, []
    for t in range(30):
        y, state = mixer(x[:, t : t + 1], state, reset[:, t : t + 1])
        ys.append(y)
    close(torch.cat(ys, 1), whole, "step by step")
    close_states(state, end, "step by step")
    wanted = [x, *mixer.parameters()]
    close_all(gradients([torch.cat(ys, 1)], wanted), gradients([whole], wanted), "gradient")


def routed(mixer, x, never):
    """x moved so far along the router's rows that memory `never` is never chosen."""
    rows = mixer.router.weight.detach()
    away = torch.linalg.lstsq(rows, torch.eye(len(rows))[never]).solution
    return x - 100 * away


@pytest.mark.parametrize("impl", ["sequential", "chunk", "cpu"])
@pytest.mark.parametrize("make", [mixture, expansion])
@pytest.mark.parametrize("masked", [False, True])
def test_memories_that_no_token_meets_keep_every_bit(make, masked, impl, float64):
    args = {"window": 1} if make is mixture else {}
    mixer = make(masked=masked, **args)
    if make is expansion:
        mixer.router.chosen = 1
    with torch.no_grad(), ops.forced(delta=impl, outer=impl):
        _, before = mixer(inputs(20))
        x = routed(mixer, inputs(33), never=1)
        assert not (mixer.router(x)[1] == 1).any()
        _, after = mixer(x, before)
        part = 1 if make is expansion else 0
        assert torch.equal(after[part][:, 1], before[part][:, 1])
        assert (after[part] != before[part]).flatten(2).any(2).sum() > 2, "the others move"


@pytest.mark.parametrize("make, name", [(mixture, "num_memories"), (expansion, "num_partitions")])
def test_work_grows_with_tokens_and_choices_not_with_memories(make, name, float64, monkeypatch):
    steps = []
    for op in ("delta", "outer"):
        real = getattr(ops, op)

        def counted(*args, real=real, **named):
            steps.append(args[0].shape[0] * args[0].shape[1])
            return real(*args, **named)

        monkeypatch.setattr(ops, op, counted)

    def work(M, T, k):
        args = dict(chosen=k, shared=False) if make is mixture else dict(writers=k, readers=k)
        mixer = make(**{name: M}, **args)
        turns = (torch.arange(T)[:, None] * k + torch.arange(k)) % M  # as even as a balanced router is

        def even(router, given, made):
            return made[0], turns.expand(2, T, k)

        mixer.router.register_forward_hook(even)
        steps.clear()
        with torch.no_grad():
            mixer(inputs(T))
        return steps[-1] / 2

    for M in (4, 8, 16):
        for T in (64, 128):
            for k in (1, 2):
                assert work(M, T, k) == k * T


def test_parameters_do_not_grow_with_partitions():
    few, many = (dict(SSE(WIDTH, num_partitions=n).named_parameters()) for n in (2, 32))
    assert {n for n in few if few[n].shape != many[n].shape} == {"router.weight"}
    assert many["router.weight"].shape == (32, WIDTH)


def test_balance():
    even = torch.full((2, 6, 3), 1 / 3)
    turns = (torch.arange(6) % 3).expand(2, 6)[..., None]
    close(balance(even, turns), torch.tensor(1.0), "even", 1e-6)
    one = torch.eye(3)[0].expand(2, 6, 3)
    close(balance(one, torch.zeros_like(turns)), torch.tensor(3.0), "one has all", 1e-6)


def test_balances_of_a_model_are_found_and_even_the_load(float64):
    torch.manual_seed(0)
    model = torch.nn.ModuleList([MoM(WIDTH, 2, 8, chosen=1), SSE(WIDTH, 2, 8)])
    x = inputs(200) + 1.5  # tokens with much in common: one memory gets most of them

    def losses():
        with balances(model) as found:
            for mixer in model:
                mixer(x)
        return found

    def fullest():
        return [
            torch.bincount(m(x)[1].flatten()).max().item() for m in model.modules() if isinstance(m, Router)
        ]

    before, full = losses(), fullest()
    assert len(before) == 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        sum(losses()).backward()
        optimizer.step()
    assert all(b < a for a, b in zip(before, losses(), strict=True))
    assert all(b < 0.7 * a for a, b in zip(full, fullest(), strict=True))
    assert not any(m._forward_hooks for m in model.modules()), "nothing is left behind"


@pytest.mark.parametrize("make, args", [(mixture, dict(window=1)), (expansion, {})], ids=["mom", "sse"])
def test_masked_compiles(make, args, float64):
    torch.compiler.reset()
    mixer, x = make(masked=True, **args), inputs(17)
    start = detach(mixer(inputs(5))[1])
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    close(compiled(x, start, MARKS[:, :17])[0], mixer(x, start, MARKS[:, :17])[0], "compiled")


@pytest.mark.parametrize(
    "cls, args, match",
    [
        (MoM, dict(rule="delta"), "'linear' or 'gla' or"),
        (MoM, dict(chosen=5), r"chosen = 5 of 4 memories; it must be 1\.\.4"),
        (MoM, dict(masked=True), "window = 4 must be 1"),
        (SSE, dict(readers=5), r"readers = 5 of 4 memories; it must be 1\.\.4"),
        (SSE, dict(writers=0), "writers is 0"),
    ],
)
def test_arguments_that_mean_nothing(cls, args, match):
    with pytest.raises(ValueError, match=match):
        cls(WIDTH, **args)
