"""Compiled steps: what the model gives, for every mixer that can decode, and refusals that say what to do."""

import pytest
import torch

from riverrun import cli
from riverrun.data.tokens import ByteTokenizer
from riverrun.inference import compiled
from riverrun.inference.compiled import Compiled
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.sampling import Sampling
from riverrun.mixers import MIXERS
from riverrun.models import folder
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.state import tree_map

TOKENIZER = ByteTokenizer()
STEPS = [
    n for n, row in MIXERS.items() if row.causal and row.compiles and row.state in ("constant", "window")
]
PROMPTS = ["It is", "", "A truth"]


def model(pattern="mamba + gated_deltanet", dtype=torch.float64):
    torch.manual_seed(0)
    small = {name: MIXERS[name].small for name in pattern.split(" + ")}
    config = LanguageConfig(TOKENIZER.size, 16, pattern.count("+") + 1, pattern, small, tied=False)
    made = LanguageModel(config).to(dtype).eval()
    with torch.no_grad():
        made.embedding.weight.normal_()
        made.head.weight.normal_(std=0.5)
    return made


def traced(made, state):
    """In place of `compiled.build`: the same graph, run by PyTorch."""
    return compiled.trace(made, state)[0]


def read(made, batch=2, steps=5):
    with torch.no_grad():
        return made(torch.randint(TOKENIZER.size, (batch, steps)))[1]


def agreeing(made, engine, tolerance):
    """Compare logits of three steps from one state, the model's and the engine's, and of one that follows."""
    state = read(made)
    running = engine(state)
    for _ in range(3):
        tokens = torch.randint(TOKENIZER.size, (2, 1))
        with torch.no_grad():
            logits, state = made(tokens, state)
        torch.testing.assert_close(running(tokens), logits, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        found, expected = made(tokens, running.state)[0], made(tokens, state)[0]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def texts(made, engine=None, stop=()):
    sampling = Sampling(temperature=0.9, top_p=0.95, repetition_penalty=1.2)
    run = Generation(made, TOKENIZER, PROMPTS, Limits(40, stop), sampling, [1, 2, 3], engine=engine)
    return ["".join(parts) for parts in zip(*run, strict=True)], run.sequences


@pytest.mark.parametrize("name", STEPS)
def test_the_step_of_every_mixer_can_be_traced(monkeypatch, name):
    monkeypatch.setattr(compiled, "build", traced)
    # float64 sums in another order; growth over three steps stays far below this, a wrong term far above
    agreeing(made := model(name), Compiled(made), 1e-9)


@pytest.mark.parametrize(
    ("pattern", "dtype", "tolerance"),
    [("gated_deltanet", torch.float64, 1e-10), ("mamba", torch.float32, 2e-5)],
)
def test_a_compiled_step_gives_what_the_model_gives(pattern, dtype, tolerance):
    # logits of size 1 to 10 after some hundred sums: errors of 1e-16 and 6e-8 times some tens, rounded up
    made = model(pattern, dtype)
    engine = Compiled(made)
    agreeing(made, engine, tolerance)
    assert engine.seconds > 0


@pytest.mark.parametrize("pattern", ["mamba + gated_deltanet", "mlstm + sliding_window"])
def test_a_run_draws_what_the_model_draws(monkeypatch, pattern):
    monkeypatch.setattr(compiled, "build", traced)
    made = model(pattern)
    assert texts(made, Compiled(made))[0] == texts(made)[0]


def test_sequences_that_have_ended_change_nothing_for_the_others(monkeypatch):
    monkeypatch.setattr(compiled, "build", traced)
    made = model()
    stop = (texts(made)[0][1][6:8],)
    plain, sequences = texts(made, stop=stop)
    found, others = texts(made, Compiled(made), stop)
    assert found == plain and {s.finished for s in others} == {"stop", "length"}
    for a, b in zip(sequences, others, strict=True):
        assert (a.read, a.draws, a.pending, a.finished) == (b.read, b.draws, b.pending, b.finished)
        tree_map(lambda x, y: torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9), a.state, b.state)


def test_code_is_kept_for_a_batch_size_and_made_anew_for_changed_weights(monkeypatch):
    builds = []
    monkeypatch.setattr(compiled, "build", lambda *given: builds.append(1) or traced(*given))
    made = model("mingru")
    engine = Compiled(made)
    for batch in (1, 2, 1, 2):
        engine(read(made, batch))
    assert len(builds) == 2
    with torch.no_grad():
        made.head.weight.mul_(2)
    agreeing(made, engine, 1e-9)
    assert len(builds) == 3 and len(engine.codes) == 1
    made.load_state_dict(model("mingru").state_dict())
    agreeing(made, engine, 1e-9)
    assert len(builds) == 4


def test_older_states_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(compiled, "build", traced)
    made = model()
    running = Compiled(made)(read(made))
    before = running.state
    kept = tree_map(torch.clone, before)
    running(torch.tensor([[1], [2]]))
    tree_map(lambda x, y: torch.testing.assert_close(x, y, rtol=0, atol=0), before, kept)


def test_what_cannot_be_compiled_is_refused():
    with pytest.raises(ValueError, match="attention grows with every token"):
        Compiled(model("mingru + attention"))
    made = model("mingru")
    with pytest.raises(ValueError, match="for a CPU"):
        Compiled(made.to("meta"))
    made = model("mingru")
    with torch.autocast("cpu"), pytest.raises(ValueError, match="autocast"):
        Compiled(made)(None)
    for name in ("mom", "ttt"):  # data decide what is run; gradients are taken in the step
        with pytest.raises(ValueError, match="cannot be traced"):
            Compiled(made := model(name))(read(made))
    made = model("mingru")
    with pytest.raises(ValueError, match="another model"):
        Compiled(made)(read(model("mingru + mingru")))
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(RuntimeError, match="needs a C\\+\\+ compiler"):
        Compiled(made)


def test_the_command_line_writes_the_same_text(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(compiled, "build", traced)
    folder.save(tmp_path / "model", model("mingru"), TOKENIZER)
    said = []
    for setting in ("compile=false", "compile=true"):
        with pytest.raises(SystemExit):
            cli.main(["generate", str(tmp_path / "model"), "-p", "a", "max_tokens=20", "seed=3", setting])
        said.append(capfd.readouterr())
    assert said[0].out == said[1].out and len(said[0].out) > 1
    assert "compiled in" not in said[0].err and "compiled in" in said[1].err
