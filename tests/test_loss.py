"""What a step of training stands on: loss, optimizer, schedule, and the watch over both."""

import math

import pytest
import torch
import torch.nn.functional as F

from riverrun.mixers import MIXERS
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.testing.tolerance import close
from riverrun.training import loss as losses
from riverrun.training.optim import OptimConfig, adamw, clip, decaying, moments, restore
from riverrun.training.schedule import ScheduleConfig, factor
from riverrun.training.watch import Watch


def model(pattern="gated_deltanet", vocabulary=257, **sizes):
    torch.manual_seed(0)
    mixers = {pattern: MIXERS[pattern].small}
    sizes = {"width": 16, "depth": 2, **sizes}
    return LanguageModel(LanguageConfig(vocabulary, pattern=pattern, mixers=mixers, **sizes))


@pytest.mark.parametrize("block", [1 << 22, 1000])
def test_cross_entropy_is_that_of_pytorch(block, monkeypatch):
    monkeypatch.setattr(losses, "BLOCK", block)
    torch.manual_seed(0)
    x = torch.randn(2, 25, 8, dtype=torch.float64, requires_grad=True)
    E = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(300, (2, 25))
    expected = F.cross_entropy((x @ E.T).flatten(0, 1), targets.flatten())
    found = losses.cross_entropy(x, E, targets)
    close(found, expected, "loss")
    close(losses.cross_entropy_sum(x, E, targets) / 50, expected, "sum")
    for a, b in zip(torch.autograd.grad(3 * found, [x, E]), torch.autograd.grad(3 * expected, [x, E])):
        close(a, b, "gradient")


def test_only_what_is_counted_counts():
    torch.manual_seed(0)
    x = torch.randn(2, 25, 8, dtype=torch.float64, requires_grad=True)
    E = torch.randn(300, 8, dtype=torch.float64, requires_grad=True)
    targets, counted = torch.randint(300, (2, 25)), torch.rand(2, 25) < 0.3
    expected = F.cross_entropy((x @ E.T).flatten(0, 1), targets.masked_fill(~counted, -100).flatten())
    found = losses.cross_entropy(x, E, targets, counted)
    close(found, expected, "loss")
    for a, b in zip(torch.autograd.grad(found, [x, E]), torch.autograd.grad(expected, [x, E])):
        close(a, b, "gradient")
    with pytest.raises(ValueError, match="none of 50 tokens is counted"):
        losses.cross_entropy(x, E, targets, counted & False)


def test_what_a_prefix_has_shown_is_not_counted():
    tokens, reset = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.bool)
    reset[1, 3] = True
    assert losses.unseen(0, tokens, reset) is None
    assert losses.unseen(3, tokens, reset).int().tolist() == [[0, 0, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 1, 1]]


def test_cross_entropy_in_bfloat16_keeps_float32_sums():
    torch.manual_seed(0)
    x, E, targets = (
        torch.randn(2, 50, 8),
        torch.randn(300, 8, requires_grad=True),
        torch.randint(300, (2, 50)),
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = losses.cross_entropy(x, E, targets)
    found.backward()
    assert found.dtype == torch.float32 and E.grad.dtype == torch.float32
    # logits of size 3 are rounded by 2^-9 of themselves, and 100 of them are averaged
    assert abs(found.item() - losses.cross_entropy(x, E, targets).item()) < 0.01
    assert found == losses.cross_entropy(x.bfloat16(), E, targets), "products in bfloat16, as autocast says"


def test_sums_over_a_text_are_float64():
    """A thousand equal losses: their sum has more digits than a float32."""
    x, E, targets = torch.zeros(1, 1000, 4), torch.zeros(300, 4), torch.zeros(1, 1000, dtype=torch.long)
    one = losses.cross_entropy_sum(x[:, :1], E, targets[:, :1]).item()
    assert math.isclose(losses.cross_entropy_sum(x, E, targets).item(), 1000 * one, rel_tol=1e-12)


def test_decay_is_by_role():
    decays = decaying(model("mamba", tied=False))
    assert decays["blocks.0.mixer.inp.weight"] and decays["blocks.1.mlp.out.weight"] and decays["head.weight"]
    inner = ("blocks.0.mixer.scan.log_rate", "blocks.0.mixer.scan.dt.bias")
    for name in ("embedding.weight", "norm.weight", *inner):
        assert not decays[name], name
    special = model()
    special.blocks[0].mlp.out.weight.decays = False
    assert not decaying(special)["blocks.0.mlp.out.weight"]


def test_adamw_decays_matrices_only():
    one = model()
    before = {name: p.detach().clone() for name, p in one.named_parameters()}
    optimizer = adamw(one, OptimConfig(lr=0.1, weight_decay=0.5, eps=1e-7))
    assert all((g["betas"], g["eps"]) == ((0.9, 0.95), 1e-7) for g in optimizer.param_groups)
    for p in one.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in one.named_parameters():
        assert torch.allclose(p, before[name] * (0.95 if decaying(one)[name] else 1)), name


def test_memories_of_another_model_are_refused():
    one, wide = model(), model(width=32)
    for m in (one, wide):
        m(torch.ones(1, 3, dtype=torch.long))[0].sum().backward()
    optimizers = [adamw(m, OptimConfig()) for m in (one, wide)]
    optimizers[1].step()
    with pytest.raises(ValueError, match="does not belong to this model"):
        restore(optimizers[0], one, moments(optimizers[1], wide))


def test_clipping_bounds_the_norm_of_all_gradients():
    one = model()
    for p in one.parameters():
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in one.parameters())
    assert math.isclose(float(clip(one, 0)), count**0.5, rel_tol=1e-5)
    clip(one, 1.0)
    assert math.isclose(float(clip(one, 0)), 1.0, rel_tol=1e-4)


def test_schedules():
    stable = ScheduleConfig("stable", warmup=10, decay=0.2)
    assert [factor(stable, s, None) for s in (0, 4, 9, 10**6)] == [0.1, 0.5, 1.0, 1.0]
    assert [factor(stable, 100, used) for used in (0.1, 0.8, 0.85, 1.0)] == [
        1.0,
        1.0,
        pytest.approx(0.5),
        0.0,
    ]
    assert factor(stable, 0, 0.01) == 0.1, "a budget does not cut the warm-up short"
    cosine = ScheduleConfig("cosine", warmup=0, floor=0.1)
    assert [factor(cosine, 0, used) for used in (0, 0.5, 1, 2)] == pytest.approx([1, 0.55, 0.1, 0.1])
    assert factor(ScheduleConfig("constant", warmup=0), 5, 0.99) == 1


def test_the_watch_forgives_a_spike_and_not_a_rise():
    early = Watch(bound=1.0)
    assert all(early.trouble(loss, 1.0) is None for loss in [1.0] + [4.0] * 19), "no mean to compare with yet"
    watch = Watch(bound=1.0)
    assert all(watch.trouble(2.0, 1.0) is None for _ in range(30))
    assert watch.trouble(9.0, 1.0) is None
    assert all(watch.trouble(2.0, 1.0) is None for _ in range(30))
    assert any(watch.trouble(3.5, 1.0) for _ in range(20))
    assert Watch(None).trouble(float("nan"), 1.0) and Watch(None).trouble(1.0, float("inf"))
