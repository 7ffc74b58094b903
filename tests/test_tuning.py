"""States that are tuned to a task while no weight moves: Xiao et al. 2025 (arXiv:2504.05097)."""

import pytest
import torch

from riverrun import cli
from riverrun.data.tokens import ByteTokenizer
from riverrun.inference import tuning
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.sampling import Sampling
from riverrun.mixers.s5 import S5
from riverrun.models import folder
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.testing.laws import WIDTH, inputs, instance
from riverrun.testing.tolerance import close
from riverrun.training.loss import cross_entropy

TOKENIZER = ByteTokenizer()
LETTERS = torch.tensor(list(b"abcdefgh"))


def texts(count, letter=None):
    """Documents "aaaaa", "bbbbb" and so on, each with the token that begins it."""
    letters = LETTERS[torch.randint(len(LETTERS), (count, 1))] if letter is None else torch.tensor([[letter]])
    return torch.cat([torch.full((count, 1), TOKENIZER.end), letters.expand(count, 5)], 1)


@pytest.fixture(scope="module", params=["rwkv7", "gated_deltanet", "slstm"])
def model(request):
    """A model that has learnt the family, so it asks the first letter which text this is."""
    torch.manual_seed(0)
    args = {request.param: {"num_heads": 2}}
    model = LanguageModel(LanguageConfig(TOKENIZER.size, 16, 1, request.param, args))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for _ in range(120):
        tokens = texts(16)
        loss = cross_entropy(model.hidden(tokens[:, :-1])[0], model.output, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.zero_grad()
    return model


def loss_of(model, state):
    tokens = texts(2, ord("c"))
    with torch.no_grad():
        return float(cross_entropy(model.hidden(tokens[:, :-1], state)[0], model.output, tokens[:, 1:]))


def test_a_tuned_state_knows_its_task_and_no_weight_moves(model, tmp_path, capfd):
    weights = {name: w.clone() for name, w in model.state_dict().items()}
    state, before = tuning.beginning(model), loss_of(model, None)
    assert loss_of(model, state(2)) == pytest.approx(before, rel=1e-4), "zeros are where it begins"
    losses = tuning.tune(state, model, (texts(8, ord("c")) for _ in range(60)))
    assert len(losses) == 60 and before > 0.3  # the first letter of five is one of eight: log 8 / 5 = 0.42
    assert loss_of(model, state(2)) < 0.2 * before
    assert all(torch.equal(w, weights[name]) for name, w in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

    path = tmp_path / "c.state"
    tuning.save(path, state, model, TOKENIZER)
    assert path.stat().st_size < 10_000
    loaded = tuning.load(path, model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), state.parameters(), strict=True))
    run = Generation(
        model, TOKENIZER, limits=Limits(4), sampling=Sampling(0), resume=tuning.snapshot.load(path, model)
    )
    assert "".join(text for (text,) in run) == "cccc"
    folder.save(tmp_path / "model", model, TOKENIZER)
    with pytest.raises(SystemExit):
        cli.main(["generate", str(tmp_path / "model"), "max_tokens=4", "temperature=0", "--state", str(path)])
    assert capfd.readouterr().out.strip() == "cccc"


def test_another_models_state_and_states_that_are_not_zeros_are_refused(model, tmp_path):
    path = tmp_path / "c.state"
    tuning.save(path, tuning.beginning(model), model, TOKENIZER)
    other = LanguageModel(model.config)
    with pytest.raises(ValueError, match="another model"):
        tuning.load(path, other)
    for name in ("attention", "ttt"):
        with pytest.raises(ValueError, match="does not begin with zeros"):
            tuning.beginning(LanguageModel(LanguageConfig(20, 16, 1, name)))


def test_any_mixers_state_can_be_tuned(float64):
    mixer, x = instance(lambda: S5(WIDTH, 4)), inputs(6)
    state = tuning.InitialState(mixer(x[:1])[1])
    close(mixer(x, state(2))[0], mixer(x)[0], "zeros")
    (grad,) = torch.autograd.grad(mixer(x, state(2))[0].square().sum(), list(state.parameters()))
    assert grad.abs().max() > 0


def test_what_a_prefix_has_shown_is_no_loss():
    torch.manual_seed(0)
    args = {"jrt": {"num_heads": 2, "feature_width": 3, "prefix": 3}}
    model, tokens = LanguageModel(LanguageConfig(TOKENIZER.size, 16, 1, "jrt", args)), texts(2)
    with torch.no_grad():
        model.embedding.weight.mul_(50)  # or all losses are log 257, wherever they are taken
    (loss,) = tuning.tune(tuning.beginning(model), model, [tokens])
    x, _ = model.hidden(tokens[:, :-1])
    # a state of zeros is added, which may change how sums are taken
    assert loss == pytest.approx(cross_entropy(x[:, 2:], model.output, tokens[:, 3:]).item(), rel=1e-4)
