"""Training: settings that cannot work, runs that learn, and what stops them."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from riverrun.config import override
from riverrun.data.packing import Corpus
from riverrun.models import folder
from riverrun.models.language import LanguageModel
from riverrun.testing.tolerance import close
from riverrun.training import loop, prepare
from riverrun.training.log import rows
from riverrun.training.loop import Diverged, train
from riverrun.training.report import Silent
from riverrun.training.settings import TrainConfig

TEXT = "".join(f"It was line {n * 7919 % 1000} of a book that nobody had read. " for n in range(60))


def settings(tmp_path, *more):
    (tmp_path / "book.txt").write_text(TEXT)
    return override(
        TrainConfig(),
        [
            *(
                f"out={tmp_path / 'run'}",
                f"data.files={tmp_path / 'book.txt'}",
                "data.batch=4",
                "data.length=32",
            ),
            *("model.width=16", "model.depth=2", "model.mixers.gated_deltanet.num_heads=2", "optim.lr=0.01"),
            *("steps=40", "schedule.warmup=5", "threads=1", *more),
        ],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["minutes=1"], "give one of them"),
        (["steps=none", "schedule.kind=cosine"], "needs an end"),
        (["steps=0"], "must be positive"),
        (["accumulate=3"], "does not divide"),
        (["optim.betas=0.9"], "two numbers"),
        (["optim.betas=0.9,1"], "two numbers"),
        (["optim.lr=0"], "must be positive"),
        (["schedule.floor=2"], r"must lie in 0\.\.1"),
        (["schedule.decay=2"], r"must lie in 0\.\.1"),
        (["model.vocabulary=99"], "the tokenizer has 257"),
        (["model.pattern=attention", "data.mode=stream", "model.mixers={}"], "sliding_window"),
        (["model.pattern=attention", "model.mixers={}", "evaluation.file={book}"], "give a context"),
        (["data.files="], "data.files is empty"),
        (["model.mixers.gated_deltanet.num_heads=two"], "num_heads is 'two'; it must be int"),
        (["model.pattern=gated_delta"], "did you mean 'gated_deltanet'"),
        (["data.separator="], r"data\.separator is empty"),
        (["data.separator=\\n\\n"], r"'\\\\n\\\\n' stands in none of 1 files"),
        (["evaluation.limit=0"], r"evaluation\.limit = 0 must be at least 1"),
        (["evaluation.every=-1"], r"evaluation\.every = -1 must be at least 1"),
        (["evaluation.context=0"], r"evaluation\.context = 0 must be at least 1"),
        (["out="], "name one for the run"),
        (["out={book}"], r"book\.txt is no folder"),
        (["evaluation.file={latin}", "data.tokenizer=bpe", "data.size=260"], r"latin\.txt: byte 3 \(0xe9\)"),
        (["data.files={latin}", "data.tokenizer=bpe", "data.size=260"], r"latin\.txt: byte 3 \(0xe9\)"),
        (
            ["model.pattern=jrt", "model.mixers={}", "model.mixers.jrt.prefix=30", "data.mode=stream"],
            "data.mode=windows",
        ),
        (
            ["model.pattern=jrt", "model.mixers={}", "model.mixers.jrt.prefix=30", "data.length=29"],
            "at least as many",
        ),
        (["data.length=5000"], "fewer than the 5001 of one window"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, change, message):
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin1") * 99)
    for name in ("book", "latin"):
        change = [c.replace(f"{{{name}}}", str(tmp_path / f"{name}.txt")) for c in change]
    with pytest.raises(ValueError, match=message):
        train(settings(tmp_path, *change), report=Silent())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "change", ["pattern=gated_delta", "depth=0", "mixers.gated_deltanet.num_heads=3", "mixers.mamba.expand=2"]
)
def test_a_model_that_cannot_be_is_refused_before_a_tokenizer_is_learnt(tmp_path, change, monkeypatch):
    monkeypatch.setattr(prepare, "make_tokenizer", None)
    with pytest.raises(ValueError, match=r"did you mean|depth is 0|does not divide|not in the pattern"):
        train(settings(tmp_path, f"model.{change}"), report=Silent())


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("mode", ["windows", "stream"])
def test_a_run_learns_and_leaves_what_it_promises(tmp_path, mode, tokenizer):
    held = tmp_path / "held.txt"
    held.write_text(TEXT[:700])
    change = [f"data.mode={mode}", f"data.tokenizer={tokenizer}", "data.size=300", "evaluation.every=20"]
    result = train(settings(tmp_path, *change, f"evaluation.file={held}"), report=Silent())
    log = rows(tmp_path / "run")
    trained = [r["bits_per_byte"] for r in log if "bits_per_byte" in r]
    assert len(trained) == 4 and trained[-1] < 0.75 * trained[0]
    held_out = [r["held_out"] for r in log if "held_out" in r]
    assert len(held_out) == 2 and held_out[1] == result.score.bits_per_byte < held_out[0] < 8
    _, learnt = folder.load(result.model)
    shares = len(Corpus.read([tmp_path / "book.txt"], learnt).tokens) / len(TEXT) / math.log(2)
    assert all(math.isclose(r["bits_per_byte"], r["loss"] * shares) for r in log if "loss" in r)
    assert result.curve.stat().st_size > 10_000
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    assert result.step == 40 and result.tokens == 40 * 128 and (result.model / "config.json").is_file()


@pytest.mark.parametrize("mode, none", [("windows", [True] * 4), ("stream", [True, True, False, False])])
def test_a_stream_goes_on_from_the_state_of_the_step_before(tmp_path, monkeypatch, mode, none):
    begun, gradients = [], loop.Run.gradients
    monkeypatch.setattr(
        loop.Run, "gradients", lambda run, part, state: begun.append(state) or gradients(run, part, state)
    )
    train(settings(tmp_path, "steps=3", f"data.mode={mode}"), report=Silent())
    assert [state is None for state in begun] == none, "a trial before the clock starts, then three steps"


def test_a_seed_gives_the_same_run_twice_and_parts_the_same_gradients(tmp_path):
    weights = []
    for out, change in (("a", []), ("b", []), ("c", ["accumulate=4"]), ("d", ["seed=1"])):
        config = settings(tmp_path, "steps=3", f"out={tmp_path / out}", *change)
        one, _ = folder.load(train(config, report=Silent()).model)
        weights.append(torch.cat([p.flatten() for p in one.parameters()]))
    a, b, c, d = weights
    assert torch.equal(a, b) and not torch.equal(a, d)
    # float32 sums in another order: a relative 1e-7 of the gradient, amplified by Adam where that is small
    close(c, a, "in four parts", bound=1e-3)


def test_a_tokenizer_smaller_than_asked_is_told(tmp_path):
    report, notes = Silent(), []
    report.note = notes.append
    for size in (258, 5000):
        change = [f"out={tmp_path / str(size)}", "data.tokenizer=bpe", f"data.size={size}", "data.length=4"]
        train(settings(tmp_path, "steps=1", *change), report=report)
    (told,) = [note for note in notes if "tokenizer" in note]
    assert "and not data.size = 5000: the text has no more" in told


def test_every_step_is_in_the_log_by_the_end(tmp_path):
    train(settings(tmp_path, "steps=5", "log_every=2"), report=Silent())
    assert [r["step"] for r in rows(tmp_path / "run")] == [2, 4, 5]


@pytest.mark.parametrize("precision, half", [("auto", False), ("float32", False), ("bfloat16", True)])
def test_precision_clipping_and_threads_are_as_set(tmp_path, monkeypatch, precision, half):
    products, bounds, threads = [], [], torch.get_num_threads()
    cross_entropy, clip = loop.cross_entropy, loop.clip

    def loss(*given):
        products.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return cross_entropy(*given)

    monkeypatch.setattr(loop, "cross_entropy", loss)
    monkeypatch.setattr(loop, "clip", lambda model, bound: bounds.append(bound) or clip(model, bound))
    try:
        train(
            settings(tmp_path, "steps=1", f"precision={precision}", "optim.clip=0.3", "threads=2"),
            report=Silent(),
        )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert set(products) == {half and torch.bfloat16} and bounds == [0.3]


def test_a_run_beside_the_main_thread(tmp_path):
    """Only the main thread may listen to Ctrl-C."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train, settings(tmp_path, "steps=1"), report=Silent()).result().step == 1


def test_a_budget_in_minutes(tmp_path):
    config = settings(tmp_path, "steps=none", "minutes=0.02")
    result = train(config, report=Silent())
    assert result.seconds >= 1.2 and result.step >= 1


def test_parts_of_a_step_add_up(tmp_path):
    """Loss and norm of the same sequences at once and in parts: equal but for the rounding of float32."""
    logs = []
    for parts in (1, 4):
        place = tmp_path / str(parts)
        place.mkdir()
        change = [f"accumulate={parts}", "steps=2", "log_every=1"]
        train(settings(place, *change), report=Silent())
        logs.append([(r["loss"], r["norm"], r["lr"]) for r in rows(place / "run")])
    assert len(logs[0]) == 2 and logs[0][0][2] < logs[0][1][2], "the rate rises in the warm-up"
    assert torch.allclose(torch.tensor(logs[0]), torch.tensor(logs[1]), rtol=1e-3)


def test_a_loss_that_rises_stops_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "factor", lambda schedule, step, used: 30.0 if step > 25 else 0.1)
    with pytest.raises(Diverged, match=r"has risen to .* from .*step-00000020.*--resume .*optim.lr="):
        train(settings(tmp_path, "save_every=20", "optim.lr=0.02"), report=Silent())


def test_a_loss_is_of_nothing_that_the_model_has_seen(tmp_path, monkeypatch):
    """Each target is changed in turn: what predicts it must not see that, unless it is not counted."""
    seen, hidden, loss = [], LanguageModel.hidden, loop.cross_entropy
    monkeypatch.setattr(loop, "cross_entropy", lambda *given: seen.append(given[2:]) or loss(*given))
    monkeypatch.setattr(
        LanguageModel, "hidden", lambda model, *given: seen.append((model, *given)) or hidden(model, *given)
    )
    jrt = "model.mixers={}", "model.mixers.jrt.num_heads=2", "model.mixers.jrt.prefix=9"
    train(settings(tmp_path, "steps=1", "model.pattern=jrt", *jrt), report=Silent())
    (model, tokens, _, reset), (targets, counted) = seen[-2:]
    assert model.prefix == 9 and 0.5 < counted.float().mean() < 0.8
    with torch.no_grad():
        before = hidden(model, tokens, None, reset)[0]
        for t in range(tokens.shape[1] - 1):
            other = tokens.clone()
            other[:, t + 1] = (tokens[:, t + 1] + 1) % 256
            same = (hidden(model, other, None, reset)[0][:, t] == before[:, t]).all(-1)
            assert same[counted[:, t]].all() and not same[~counted[:, t]].any()
