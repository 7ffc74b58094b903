"""Mixers that see both ways: what their papers say of them, and the layers they stand on."""

import math

import pytest
import torch
from equations_both import around, hydra, silu, vssd
from torch.utils.flop_counter import FlopCounterMode

from riverrun import ops
from riverrun.mixers import MIXERS, Row, build
from riverrun.models.pattern import layers
from riverrun.nn import LocalConv, WeightedAverage, apart, both_resets, both_ways, each_document, pooled
from riverrun.testing.laws import LAWS, instance
from riverrun.testing.tolerance import close

WIDTH, STEPS = 16, 23
PICTURES = ("vssd", "efficientvim", "vig")


def small(name, **args):
    return instance(lambda: build(name, WIDTH, **{**MIXERS[name].small, **args}))


def random(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def marks(*starts, T=STEPS):
    """(2, T) with documents of the first row beginning at `starts`, of the second at 0 and 7."""
    reset = torch.zeros(2, T, dtype=torch.bool)
    reset[0, list(starts)], reset[1, 7] = True, True
    return reset


def without_neighbours(mixer):
    """The mixer with a convolution that hands every token on as it is."""
    with torch.no_grad():
        mixer.conv.weight.zero_()[:, mixer.conv.window[0] // 2, mixer.conv.window[1] // 2] = 1
    return mixer


# the layers


@pytest.mark.parametrize("columns", [None, 4, 5, STEPS, 40])
@pytest.mark.parametrize("window", [(3, 3), (1, 7), (5, 1)])
def test_neighbours_are_those_of_the_picture(window, columns, float64):
    conv, x = LocalConv(3, window), random(2, STEPS, 3)
    with torch.no_grad():
        y = conv(x, columns)
        close(y[1], around(conv, x[1], columns or STEPS), "the definition")
        close(conv(x, columns, torch.zeros(2, STEPS, dtype=torch.bool)), y, "taps, one document")
        packed = conv(x, columns, marks(2, 11))
        for a, b in ((0, 2), (2, 11), (11, STEPS)):
            close(packed[:1, a:b], conv(x[:1, a:b], columns), f"document {a}..{b}")


def test_a_convolution_without_a_middle_is_refused():
    with pytest.raises(ValueError, match="no middle; accepted are odd"):
        LocalConv(3, (2, 3))


@pytest.mark.parametrize("reset", [None, marks(2, 11)], ids=["whole", "packed"])
def test_a_pool_is_what_all_pairs_of_a_document_give(reset):
    q, k, v = random(2, STEPS, 2, 3), random(2, STEPS, 2, 3, seed=2), random(2, STEPS, 4, 5, seed=3)
    document = torch.zeros(2, STEPS) if reset is None else reset.cumsum(1)
    same = (document[:, :, None] == document[:, None]).double()
    pairs = torch.einsum("bthk,bshk,bts->bhts", *(p.repeat_interleave(2, 2) for p in (q, k)), same)
    close(pooled(q, k, v, reset), torch.einsum("bhts,bshv->bthv", pairs, v), "all pairs")


def test_reading_backwards_begins_where_documents_end():
    x, reset = random(2, STEPS, 1, 1), marks(2, 11)
    ones = torch.ones_like(x)
    _, backward = apart(
        ops.outer(both_ways(ones), both_ways(ones), both_ways(x), reset=both_resets(reset))[0]
    )
    ends = [2, 11, STEPS]
    for a, b in zip([0, 2, 11], ends, strict=True):
        close(backward[0, a:b, 0, 0], x[0, a:b, 0, 0].flip(0).cumsum(0).flip(0), f"document {a}..{b}")


def test_each_document_by_itself():
    x = random(2, STEPS, 3)
    y = each_document(lambda d: d.mean(1, keepdim=True).expand_as(d), x, marks(0, 11))
    close(y[0, 3], x[0, :11].mean(0), "the first document")
    close(y[1, 8], x[1, 7:].mean(0), "the second row's second")


# Hydra


@pytest.mark.parametrize("equation", [hydra, vssd], ids=lambda e: e.__name__)
def test_equals_its_matrix(equation, float64):
    mixer, x = small(equation.__name__), random(2, STEPS, WIDTH)
    with torch.no_grad():
        close(mixer(x)[0][1], equation(mixer, x[1]), equation.__name__)


def test_hydra_without_its_upper_part_is_an_ssd_and_a_diagonal():
    mixer, x = small("hydra"), random(2, STEPS, WIDTH)
    E, GN = mixer.inner[:2]
    back = slice(E + 2 * GN, E + 3 * GN)  # B' among the channels of the convolution
    read = []
    mixer.norm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        mixer.conv.weight[back], mixer.conv.bias[back] = 0, 0  # and so B' = 0
        mixer(x)
        _, u, dt = mixer.inp(x).split(mixer.sizes, -1)
        u, B, C, *_ = silu(mixer.conv(u)).split(mixer.inner, -1)
        dt = torch.log1p(torch.exp(dt[..., : mixer.num_heads] + mixer.dt_bias))
        v = u.unflatten(-1, (mixer.num_heads, -1))
        B, C = (p.unflatten(-1, (mixer.num_groups, -1)) for p in (B, C))
        y, _ = ops.outer(C, B, dt[..., None] * v, -mixer.log_rate.exp() * dt)
        late = torch.cat([torch.zeros_like(y[:, :1]), y[:, :-1]], 1)
        close(read[0], (late + mixer.skip(u)[..., None] * v).flatten(2), "shift(SSD) + D")


# VSSD and EfficientViM


@pytest.mark.parametrize("name", ["vssd", "efficientvim"])
def test_without_neighbours_the_order_of_the_scan_does_not_matter(name):
    mixer, x = without_neighbours(small(name)), random(2, 20, WIDTH)
    by_columns = torch.arange(20).view(4, 5).T.flatten()
    for order in (torch.arange(20).flip(0), by_columns, torch.randperm(20)):
        close(mixer(x[:, order])[0], mixer(x)[0][:, order], "permuted")


def test_efficientvim_without_its_gate_is_vssd_and_a_projection():
    """h' = D W_o W_u h: then the states only pass through, and all is one sum over tokens and one matrix."""
    mixer, x = small("efficientvim"), random(2, STEPS, WIDTH)
    with torch.no_grad():
        mixer.mix.weight[mixer.out.in_features :] = 0  # z = 0, so silu(z) = 0
        B, C, delta = mixer.conv(mixer.inp(x), mixer.columns).chunk(3, -1)
        projection = mixer.skip * mixer.out.weight @ mixer.mix.weight[: mixer.out.in_features]
        summed = pooled(C[:, :, None], (delta.softmax(1) * B)[:, :, None], x[:, :, None])[:, :, 0]
        close(mixer(x)[0], summed @ projection.T, "NC-SSD, then a projection")


def test_efficientvim_compiles_where_no_documents_are_packed():
    """Packed, how many there are is data, which is why its row says compiles=False."""
    torch.compiler.reset()
    mixer, x = small("efficientvim"), random(2, STEPS, WIDTH)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    close(compiled(x)[0], mixer(x)[0], "compiled")


def flops_per_token(name, width, **args):
    """What 64 more tokens cost, each: two for a product and its sum."""
    mixer, counts = build(name, width, columns=8, **args), []
    for T in (64, 128):
        with FlopCounterMode(display=False) as counter, ops.forced(outer="chunk"), torch.no_grad():
            mixer(torch.zeros(1, T, width))
        counts.append(counter.get_total_flops())
    return (counts[1] - counts[0]) / 64


def test_a_token_costs_efficientvim_no_product_of_widths():
    N = 4
    for D in (32, 64, 128):
        states = 3 * N * D + N * D + N * D  # the maps in, the sum h, the read
        assert flops_per_token("efficientvim", D, num_states=N) == 2 * (states + 9 * 3 * N)
        assert flops_per_token("vssd", D, num_states=N) > 2 * (
            2 * D * D * 3
        )  # maps in and out at twice the width


def test_vig_costs_the_same_for_every_token():
    once, mixer = flops_per_token("vig", WIDTH), build("vig", WIDTH, columns=8)
    with FlopCounterMode(display=False) as counter, ops.forced(outer="chunk"), torch.no_grad():
        mixer(torch.zeros(1, 1024, WIDTH))
    assert counter.get_total_flops() == 1024 * once


# ViG


def test_vig_in_one_scan_is_two_gated_linear_attentions():
    mixer, x = small("vig"), random(2, STEPS, WIDTH)
    read = []
    mixer.norm.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    with torch.no_grad():
        mixer(x)
        local = silu(mixer.conv(x, mixer.columns))
        q, k, v, low = mixer.inp(local).split(mixer.sizes, -1)
        gates = torch.log(torch.sigmoid(mixer.decay(low))) / mixer.temperature
        q, k, v, g, g_back = (p.unflatten(-1, (2, -1)) for p in (q, k, v, *gates.chunk(2, -1)))
        forward, _ = ops.outer(q, k, v, g)
        backward, _ = ops.outer(*(p.flip(1) for p in (q, k, v, g_back)))
        close(read[0], (forward + backward.flip(1)) / (2 * math.sqrt(mixer.sizes[0] // 2)), "two scans")


# MambaMixer


def as_mamba(mixer, mamba):
    """Give `mamba` the weights of the token mixer."""
    theirs = mixer.state_dict()
    mamba.load_state_dict({name: theirs[name] for name in mamba.state_dict()})


def test_mambamixers_without_channel_mixers_are_a_stack_of_mambas():
    """α = 1 and β = 0 in every block, and of all earlier outputs only the last."""
    mixers = [
        instance(lambda i=i: build("mambamixer", WIDTH, num_states=4 + i, channel_width=4)) for i in range(3)
    ]
    mambas = [build("mamba", WIDTH, num_states=4 + i).double() for i in range(3)]
    averages = [WeightedAverage(i + 1).double() for i in range(3)]
    outputs, y = [random(2, STEPS, WIDTH)], random(2, STEPS, WIDTH)
    with torch.no_grad():
        for mixer, mamba, average in zip(mixers, mambas, averages, strict=True):
            as_mamba(mixer, mamba)
            outputs.append(mixer(average(outputs))[0])
            y = mamba(y)[0]
        assert (outputs[-1] - y).abs().max() > 1e-3, "channel mixers and averages make no difference"
        outputs, y = outputs[:1], outputs[0]
        for mixer, mamba, average in zip(mixers, mambas, averages, strict=True):
            mixer.average.weight.copy_(torch.tensor([1.0, 0.0]))
            average.weight.zero_()[-1] = 1
            outputs.append(mixer(average(outputs))[0])
            y = mamba(y)[0]
    close(outputs[-1], y, "a stack of Mambas")


def test_mambamixer_mixes_channels_from_both_ends():
    """What a token's channel says reaches channels before and after it, and no other token."""
    mixer, y = small("mambamixer"), random(1, 3, WIDTH).requires_grad_()
    (slope,) = torch.autograd.grad(mixer.channels(y)[0, 1, WIDTH // 2], y)
    assert slope[0, 1].abs().min() > 0 and slope[0, [0, 2]].abs().max() == 0


def test_an_average_of_the_wrong_number_is_refused():
    with pytest.raises(ValueError, match="2 tensors for an average of 3"):
        WeightedAverage(3)([torch.zeros(1), torch.zeros(1)])


# the laws of such mixers can fail


def test_laws_find_a_mixer_that_claims_to_look_ahead_and_does_not():
    with pytest.raises(AssertionError, match=r"does not depend on all of x\[1:\], against causal=False"):
        LAWS["causality"](lambda: build("gla", WIDTH, num_heads=2), Row("GLA", "", op="outer", causal=False))


def test_laws_find_packed_documents_that_see_each_other():
    class Leaking(type(build("hydra", WIDTH, num_heads=4))):
        def forward(self, x, state=None, reset=None):
            return super().forward(x, state)

    with pytest.raises(AssertionError, match="reset at 1"):
        LAWS["reset"](lambda: Leaking(WIDTH, num_heads=4), MIXERS["hydra"])


# all of them


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_another_width(name):
    mixer, other, x = small(name), small(name, columns=7), random(2, 28, WIDTH)
    close(mixer(x, columns=7)[0], other(x)[0], "columns given in the call")
    assert (mixer(x)[0] - other(x)[0]).abs().max() > 1e-3, "columns make no difference"


@pytest.mark.parametrize("name", ["hydra", *PICTURES])
def test_a_state_is_refused(name):
    with pytest.raises(ValueError, match=r"a state was given, \(2, 3\); .* leave state=None"):
        small(name)(random(2, STEPS, WIDTH), torch.zeros(2, 3))


def test_a_language_model_takes_none_of_them():
    with pytest.raises(ValueError, match="sees the future"):
        layers("hydra", 2)
