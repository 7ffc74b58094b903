"""Language models: the contract of `model(tokens, state, reset)`, and their sizes."""

import pytest
import torch
from small_models import build, text

from riverrun import state as states
from riverrun.mixers import MIXERS
from riverrun.models.counts import count
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.models.pattern import layers
from riverrun.testing.tolerance import close

LANGUAGE = [name for name, row in MIXERS.items() if row.causal and row.state != "none"]


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_mixer_makes_a_model_that_stops_and_goes_on(name):
    model, tokens = build(name).double(), text(23)
    with torch.no_grad():
        whole, _ = model(tokens)
        first, state = model(tokens[:, :9])
        then, state = model(tokens[:, 9:22], state)
        last, _ = model(tokens[:, 22:], state)
    close(torch.cat([first, then, last], 1), whole, "in three calls")


def test_reset_begins_a_document():
    model, tokens = build().double(), text(20)
    _, before = model(text(5))
    reset = torch.zeros(2, 20, dtype=torch.bool)
    reset[:, 8] = True
    packed, _ = model(tokens, before, reset)
    close(packed[:, 8:], model(tokens[:, 8:])[0], "after the reset")
    close(packed[:, :8], model(tokens[:, :8], before)[0], "before the reset")


def test_gradients_reach_every_parameter_and_the_state():
    model = build()
    _, state = model(text(7))
    state = states.tree_map(lambda x: x.detach().requires_grad_(), state)
    logits, _ = model(text(9), state)
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
    assert all(x.grad is not None for x in states.leaves(state))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_give_float32_logits(dtype):
    model = build().to(dtype)
    logits, _ = model(text(9))
    assert logits.dtype == torch.float32 and torch.isfinite(logits).all()


def test_tokens_need_not_be_contiguous():
    model, tokens = build(), text(18)
    close(model(tokens[:, ::2])[0], model(tokens[:, ::2].contiguous())[0], "a view", bound=0)


def test_the_pattern_repeats_to_the_depth():
    assert layers("2 mamba + gated_deltanet", 5) == ["mamba", "mamba", "gated_deltanet", "mamba", "mamba"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("gated_delta_net", "did you mean 'gated_deltanet'"),
        ("0 mamba", "count of at least 1"),
        ("3 mamba gated_deltanet", "terms are joined by"),
        ("", "terms are joined by"),
        ("mamba + hydra", "sees the future"),
    ],
)
def test_a_wrong_pattern_is_refused(pattern, message):
    with pytest.raises(ValueError, match=message):
        layers(pattern, 4)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LanguageConfig(50, mixers={"mamba": {}}), "'mamba', which is not in the pattern"),
        (LanguageConfig(50, mixers={"gated_deltanet": {"heads": 2}}), "did you mean 'num_heads'"),
        (LanguageConfig(50, depth=0), "depth is 0; it must be int, greater than 0; unless given it is 4"),
        (LanguageConfig(0), "vocabulary is 0; it must be int, greater than 0$"),
        (LanguageConfig(50, width=0), "width is 0"),
        (LanguageConfig("50"), "vocabulary is '50'; it must be int"),
        (LanguageConfig(50, inner=-3), "inner is -3; it must be int or none, greater than 0"),
        (LanguageConfig(50, pattern=3), "pattern is 3; it must be str"),
        (LanguageConfig(50, tied=1), "tied is 1; it must be bool"),
        (LanguageConfig(50, mixers={"gated_deltanet": 3}), r"mixers\.gated_deltanet is 3; it must be dict"),
        (LanguageConfig(50, mixers={"gated_deltanet": {"width": 8}}), "have a width, 8; it is the model's"),
        (LanguageConfig(50, mixers={"gated_deltanet": {"name": 8}}), "takes no argument 'name'"),
        (LanguageConfig(50, mixers={"gated_deltanet": {"self": 8}}), "takes no argument 'self'"),
        (LanguageConfig(50, mixers={"gated_deltanet": {"num_heads": -4}}), "num_heads is -4; it must be int"),
    ],
)
def test_a_wrong_config_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(config)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda m: m(text(9).int()), TypeError, "must be torch.int64"),
        (lambda m: m(text(9)[:, :0]), ValueError, "at least 1"),
        (lambda m: m(text(9)[0]), ValueError, r"must be \(B, T\)"),
        (lambda m: m(text(9) + 50), ValueError, "vocabulary is 0..49"),
        (lambda m: m(text(9) - 50), ValueError, "vocabulary is 0..49"),
        (lambda m: m(torch.full((2, 9), 50)), ValueError, "lie in 50..50"),
        (lambda m: m(text(9), None, torch.zeros(2, 9)), ValueError, r"^reset is torch\.float32"),
        (lambda m: m(text(9), None, torch.zeros(2, 8, dtype=torch.bool)), ValueError, "reset"),
        (lambda m: m(text(9), m(text(9, B=3))[1]), ValueError, "3 sequences, the tokens of 2"),
        (lambda m: m(text(9), build(depth=3)(text(9))[1]), ValueError, "another model's"),
        (lambda m: m(text(9), build(width=32)(text(9))[1]), ValueError, "another model's"),
        (lambda m: m(text(9), build("mamba + gated_deltanet")(text(9))[1]), ValueError, "another model's"),
        (lambda m: m(text(9), m(text(9))[1][0]), ValueError, "another model's"),
        (lambda m: m(text(9), (m(text(9))[1][0], m(text(9))[1][1][:1])), ValueError, "another model's"),
        (lambda m: m(text(9), torch.zeros(2, 4)), ValueError, "Tensor"),
    ],
)
def test_what_does_not_fit_is_refused(call, kind, message):
    with pytest.raises(kind, match=message):
        call(build())


def test_untrained_models_are_near_the_uniform_guess_and_stay_so_with_depth():
    for depth in (1, 12):
        torch.manual_seed(0)
        model = LanguageModel(LanguageConfig(50, width=64, depth=depth))
        with torch.no_grad():
            logits, _ = model(text(64))
            x, _ = model.blocks[-1](torch.randn(2, 64, 64), None, None)
        assert logits.std() < 0.5  # so the loss begins within 0.13 of log(50)
        assert x.std() < 1.5


def test_a_block_is_two_residual_layers():
    block, x = build().double().blocks[0], torch.randn(2, 9, 16, dtype=torch.float64)
    y, _ = block(x, None, None)
    middle = x + block.mixer(block.mixer_norm(x))[0]
    close(y, middle + block.mlp(block.mlp_norm(middle)), "block")


def test_maps_into_the_residual_stream_shrink_with_depth():
    shallow, deep = build(depth=2), build(depth=8)
    for a, b in ((m.blocks[0].mixer.out.weight, m.blocks[0].mlp.out.weight) for m in (shallow, deep)):
        assert a.std() > 0 and b.std() > 0
    for part in ("mixer", "mlp"):
        a, b = (getattr(m.blocks[0], part).out.weight.std() for m in (shallow, deep))
        assert 1.7 < a / b < 2.3, "the root of 8 / 2, within what a few hundred draws spread"


def test_an_untied_model_reads_its_own_output_map():
    model = build(tied=False)
    torch.nn.init.zeros_(model.head.weight)
    assert model.output is model.head.weight and (model(text(9))[0] == 0).all()
    assert build().output is not None and build().head is None


@pytest.mark.parametrize(("name", "each"), [("gated_deltanet", 4), ("attention", 2)])
def test_operations_are_two_a_weight_and_those_of_the_state(name, each):
    """Only matrices count, and the embedding once, as the output map it is tied to."""
    model = build(name)
    _, state = model(text(100, B=1))
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    numbers = sum(x.numel() for x in states.leaves(state) if x.is_floating_point())
    counts = count(model, T=100)
    assert counts.state_bytes == states.nbytes(state)
    assert abs(counts.forward_flops - 2 * weights - each * numbers) < 100  # a cache counts its positions too


def test_counts_are_those_of_the_model():
    model = build("gated_deltanet", tied=False)
    counts = count(model, T=100)
    assert counts.parameters == sum(p.numel() for p in model.parameters())
    assert counts.embedding == 2 * 50 * 16
    _, state = model(text(10, B=1))
    assert counts.state_bytes == states.nbytes(state)
    assert counts.training_flops == 3 * counts.forward_flops
    # a matrix of weights is used once a token; what is not a matrix is less than a fifth of this small model
    assert 1.6 < counts.forward_flops / (counts.parameters - 50 * 16) < 3
