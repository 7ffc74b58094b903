"""What the papers of the outer-product mixers state as equalities."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from riverrun import ops
from riverrun.inference.prompt import reread
from riverrun.mixers import build
from riverrun.models.language import LanguageModel
from riverrun.nn.axes import lrpe, places
from riverrun.nn.feature import taylor
from riverrun.nn.fenwick import fenwick
from riverrun.testing.laws import inputs, instance
from riverrun.testing.tolerance import close

WIDTH = 16


def make(name, **args):
    return instance(lambda: build(name, WIDTH, **args))


# Based


def test_taylor_features_multiply_to_the_polynomial(float64):
    q, k = torch.randn(5, 7), torch.randn(5, 7)
    s = (q * k).sum(-1) / 7**0.5
    close((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2, "φ(q)ᵀφ(k)")
    assert taylor(q).shape[-1] == 1 + 7 + 7 * 8 // 2


@pytest.mark.parametrize("impl", ["sequential", "chunk", "cpu"])
def test_based_is_attention_with_the_polynomial_for_the_exponential(impl):
    """The parallel form, all pairs at once, against the recurrence and its chunks."""
    mixer, x = make("based", num_heads=2, feature_width=3), inputs(67)
    q, k, v = (p.unflatten(-1, (2, -1)) for p in mixer.inp(x).split(mixer.sizes, -1))
    s = torch.einsum("bthk,bshk->bhts", q, k) / 3**0.5
    weight = (1 + s + s**2 / 2).tril()
    y = torch.einsum("bhts,bshv->bthv", weight / weight.sum(-1, keepdim=True), v)
    with ops.forced(outer=impl):
        close(mixer(x)[0], mixer.out(y.flatten(2)), impl)


def test_a_window_as_long_as_the_text_is_attention():
    attention, x = make("attention", num_heads=2), inputs(67)
    for window in (67, 100):
        near = make("sliding_window", num_heads=2, window=window)
        near.load_state_dict(attention.state_dict())
        close(near(x)[0], attention(x)[0], f"window {window}")
    near.window = 20
    assert not torch.allclose(near(x)[0], attention(x)[0])


def test_the_recipe_is_the_hybrid():
    config = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "based.py"))["config"]().model
    model = LanguageModel(replace(config, vocabulary=50, width=16))
    kinds = [type(block.mixer).__name__ for block in model.blocks]
    assert kinds == ["Based", "SlidingWindow"] * 2
    assert model(torch.zeros(1, 3, dtype=torch.long))[0].shape == (1, 3, 50)


# JRT-RNN

PREFIX = 9


def jrt():
    return make("jrt", num_heads=2, feature_width=3, prefix=PREFIX)


def test_jrt_leaks_nothing_from_beyond_the_prefix():
    mixer, x = jrt(), inputs(30).requires_grad_()
    for t in range(30):
        (grad,) = torch.autograd.grad(mixer(x)[0][:, t].sum(), x)
        seen = grad.abs().amax((0, 2)) > 0
        assert seen.tolist() == [s <= t or s < PREFIX for s in range(30)], f"y[{t}]"


def test_jrt_goes_on_recurrently_from_its_prefix():
    """The prefix in one call, then one token at a time, is all of it at once."""
    mixer, x = jrt(), inputs(30)
    whole, last = mixer(x)
    y, state = mixer(x[:, :PREFIX])
    ys = [y]
    for t in range(PREFIX, 30):
        y, state = mixer(x[:, t : t + 1], state)
        ys.append(y)
    close(torch.cat(ys, 1), whole, "prefix, then token by token")
    close(state[0], last[0], "state")


def test_jrt_remembers_a_prefix_that_came_in_parts():
    """What came late was not seen earlier, but everything after the prefix is as if it had been."""
    mixer, x = jrt(), inputs(30)
    whole, last = mixer(x)
    first, state = mixer(x[:, :4])
    second, end = mixer(x[:, 4:], state)
    close(second[:, PREFIX - 4 :], whole[:, PREFIX:], "after the prefix")
    close(end[0], last[0], "state")
    assert not torch.allclose(first, whole[:, :4])


def test_jrt_without_a_prefix_is_causal_linear_attention():
    mixer, x = make("jrt", num_heads=2, feature_width=3), inputs(30)
    based = make("based", num_heads=2, feature_width=3)
    with torch.no_grad():
        based.inp.weight.copy_(mixer.inp.weight[: sum(based.sizes)])
        based.out.weight.copy_(mixer.out.weight)
    close(mixer(x)[0], based(x)[0], "prefix = 0")


def test_jrt_reads_a_short_document_whole_and_not_its_neighbour():
    mixer, x = jrt(), inputs(12)
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[:, 5] = True
    packed, _ = mixer(x, None, reset)
    close(packed, torch.cat([mixer(x[:, :5])[0], mixer(x[:, 5:])[0]], 1), "two short documents")


def test_a_prompt_that_is_read_twice():
    assert reread("A is 1. B is 2.", "A is") == "A is A is 1. B is 2.\nA is 1. B is 2. A is"
    assert reread("A is 1.", "A is", times=3).count("A is 1.") == 3
    assert reread("A is 1.", "A is", times=1) == "A is 1. A is"
    with pytest.raises(ValueError, match="at least once"):
        reread("A is 1.", "A is", times=0)


# LightNet


def test_lightnet_is_a_running_softmax():
    """Σ_s softmax_s(k_s) v_s over s ≤ t, all pairs, by the recurrence's ratio of running sums."""
    mixer, x = make("lightnet", num_heads=2, rank=4, base=None), inputs(67)
    q, k, v = (p.unflatten(-1, (2, -1)) for p in mixer.inp(x).split(mixer.sizes, -1))
    weight = (k.exp()[:, None] / k.exp().cumsum(1)[:, :, None]) * torch.ones(67, 67).tril()[..., None, None]
    y = torch.einsum("bthk,btshk,bshv->bthv", torch.nn.functional.silu(q), weight, v) / 8**0.5
    y = mixer.out(mixer.norm(y.flatten(2), mixer.gate(x)))
    for impl in ("sequential", "chunk", "cpu"):
        with ops.forced(outer=impl):
            close(mixer(x)[0], y, impl)


def test_lightnet_positions_are_distances():
    """Two codes of one pair, moved together, have one product; moved apart they have another."""
    q, k = (x[:, :1].unflatten(-1, (2, 8)) for x in (inputs(1), inputs(2)))
    place = torch.tensor([[[3, 5]]] * 2)
    products = [
        (lrpe(q, place + move) * lrpe(k, place + move + apart)).sum(-1)
        for move, apart in ((0, 0), (7, 0), (0, 2), (7, 2))
    ]
    close(products[0], (q * k).sum(-1), "no distance")
    close(products[1], products[0], "moved together")
    close(products[3], products[2], "at a distance, moved together")
    assert not torch.allclose(products[2], products[0])


@pytest.mark.parametrize("sizes", [(), (5,), (3, 2)], ids=["sequence", "picture", "video"])
def test_lightnet_reads_all_of_a_grid_in_one_scan(sizes):
    mixer, x = make("lightnet_grid", num_heads=2, rank=4, sizes=sizes), inputs(30)
    place = places(torch.arange(30).expand(2, -1), sizes)
    y, _ = mixer(x)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    close(mixer(x[:, order], place=place[:, order])[0], y[:, order], "tokens permuted with their places")
    assert not torch.allclose(mixer(x[:, order])[0], y[:, order])
    probe = x.clone().requires_grad_()
    for t in (0, 13, 29):
        (grad,) = torch.autograd.grad(mixer(probe)[0][:, t].sum(), probe)
        assert (grad.abs().amax(-1) > 0).all(), f"y[{t}] does not see everything"


def test_places_on_a_grid():
    assert places(torch.arange(8)[None], (3,))[0].tolist() == [[i // 3, i % 3] for i in range(8)]
    assert places(torch.tensor([[17]]), (2, 3))[0].tolist() == [[2, 1, 2]]


def test_lightnet_grid_of_another_size():
    mixer, x = make("lightnet_grid", num_heads=2, rank=4, sizes=(5,), tpe=True), inputs(12)
    other = make("lightnet_grid", num_heads=2, rank=4, sizes=(4,), tpe=True)
    close(mixer(x, sizes=(4,))[0], other(x)[0], "four columns")
    with pytest.raises(ValueError, match="made for 1 beside the first axis"):
        mixer(x, sizes=(4, 2))
    with pytest.raises(ValueError, match="tpe=True"):
        mixer(x, place=torch.zeros(2, 12, 2))


# Log-linear attention


def tree(T, L=8):
    q, k, v = (inputs(T, seed=i).unflatten(-1, (2, 8)) for i in range(3))
    g = -torch.nn.functional.softplus(inputs(T, seed=3)[..., :2])
    weight = torch.nn.functional.softplus(inputs(T, seed=4)[..., None, :L] * torch.ones(2, 1))
    return q, k, v, g, weight, torch.arange(T).expand(2, -1)


def test_one_weight_for_all_levels_is_plain_decayed_attention():
    q, k, v, g, weight, position = tree(67)
    y, _ = fenwick(q, k, v, g, torch.ones_like(weight), position, None)
    close(y, ops.outer(q, k, v, g)[0], "λ = 1")


def test_the_tree_is_the_merging_of_states():
    """The paper's recurrent form: a token's state is a leaf, and equal subtrees merge like the bits of t."""
    q, k, v, g, weight, position = tree(67)
    y, _ = fenwick(q, k, v, g, weight, position, None)
    states = torch.zeros(8, 2, 2, 8, 8, dtype=torch.float64)
    for t in range(67):
        if t:
            lowest = (t & -t).bit_length()  # the level that takes in all below it
            states[lowest] = states[: lowest + 1].sum(0)
            states[:lowest] = 0
        states = states * g[:, t].exp()[..., None, None]
        states[0] = k[:, t, :, :, None] * v[:, t, :, None]
        found = torch.einsum("lbhkv,bhk,bhl->bhv", states, q[:, t], weight[:, t])
        close(y[:, t], found, f"t = {t}")


def test_a_document_longer_than_the_tree_begins_another():
    q, k, v, g, weight, position = tree(40, L=5)  # 16 tokens
    y, _ = fenwick(q, k, v, g, weight, position, None)
    for t in (16, 32):
        again, _ = fenwick(*(x[:, t:] for x in (q, k, v, g, weight)), position[:, : 40 - t], None)
        close(y[:, t : t + 16], again[:, :16], f"from {t}")


# HGRN


def test_hgrn_turns_and_leaks():
    """The recurrence in complex numbers, token by token."""
    mixer, x = make("hgrn", lower_bound=0.2), inputs(23)
    with torch.no_grad():
        p = mixer.inp(x[0])
        c = torch.nn.functional.silu(p[:, : 2 * WIDTH])
        c = torch.complex(c[:, ::2], c[:, 1::2])
        f, z = 0.2 + 0.8 / (1 + torch.exp(-p[:, 2 * WIDTH : 3 * WIDTH])), p[:, 3 * WIDTH :]
        h, ys = torch.zeros(WIDTH, dtype=torch.complex128), []
        for t in range(23):
            h = f[t] * torch.exp(1j * mixer.angle) * h + (1 - f[t]) * c[t]
            ys.append(torch.stack([h.real, h.imag], 1).flatten())
        y = torch.stack(ys)
        y = mixer.norm.weight * y / torch.sqrt((y**2).mean(-1, keepdim=True) + 1e-6)
        close(mixer(x)[0][0], (y * z / (1 + torch.exp(-z))) @ mixer.out.weight.T, "y")


@pytest.mark.parametrize(
    "name, args, match",
    [
        ("hgrn", dict(lower_bound=1.0), "at least 0 and less than 1"),
        ("jrt", dict(prefix=-1), "prefix is -1; it must be int, 0 or greater"),
        ("lightnet_grid", dict(sizes=(0,)), "greater than 0"),
        ("loglinear", dict(num_levels=1), "accepted are 2 to 32"),
        ("xlstm", dict(block=5), "block = 5 does not divide"),
    ],
)
def test_arguments_that_mean_nothing(name, args, match):
    with pytest.raises(ValueError, match=match):
        build(name, WIDTH, **args)
