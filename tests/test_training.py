"""Loss, optimizer, schedule, evaluation and what a run shows."""

import io
import math

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from riverrun.config import override
from riverrun.data.tokens import BPETokenizer, ByteTokenizer
from riverrun.mixers import MIXERS
from riverrun.models import folder
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.testing.tolerance import close
from riverrun.training import loop
from riverrun.training import loss as losses
from riverrun.training.evaluate import evaluate
from riverrun.training.log import CURVE, Log, curve, rows
from riverrun.training.loop import Diverged, train
from riverrun.training.optim import OptimConfig, adamw, clip, decaying, moments, restore
from riverrun.training.report import Numbers, Report, Silent, clock, memory
from riverrun.training.schedule import ScheduleConfig, factor
from riverrun.training.settings import TrainConfig
from riverrun.training.watch import Watch

TEXT = "".join(f"It was line {n * 7919 % 1000} of a book that nobody had read. " for n in range(60))


def model(pattern="gated_deltanet", vocabulary=257, **sizes):
    torch.manual_seed(0)
    mixers = {pattern: MIXERS[pattern].small}
    sizes = {"width": 16, "depth": 2, **sizes}
    return LanguageModel(LanguageConfig(vocabulary, pattern=pattern, mixers=mixers, **sizes))


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
        (["data.separator="], r"data\.separator is empty"),
        (["data.separator=\\n\\n"], r"'\\\\n\\\\n' stands in none of 1 files"),
        (["evaluation.limit=0"], r"evaluation\.limit = 0 must be at least 1"),
        (["evaluation.every=-1"], r"evaluation\.every = -1 must be at least 1"),
        (["evaluation.context=0"], r"evaluation\.context = 0 must be at least 1"),
        (["out="], "name one for the run"),
        (["out={book}"], r"book\.txt is no folder"),
        (["evaluation.file={latin}", "data.tokenizer=bpe", "data.size=260"], r"latin\.txt: byte 3 \(0xe9\)"),
        (["data.files={latin}", "data.tokenizer=bpe", "data.size=260"], r"latin\.txt: byte 3 \(0xe9\)"),
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


def test_bfloat16_products(tmp_path):
    result = train(settings(tmp_path, "precision=bfloat16"), report=Silent())
    assert result.loss < 4.5


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


def test_the_watch_forgives_a_spike_and_not_a_rise():
    early = Watch(bound=1.0)
    assert all(early.trouble(loss, 1.0) is None for loss in [1.0] + [4.0] * 19), "no mean to compare with yet"
    watch = Watch(bound=1.0)
    assert all(watch.trouble(2.0, 1.0) is None for _ in range(30))
    assert watch.trouble(9.0, 1.0) is None
    assert all(watch.trouble(2.0, 1.0) is None for _ in range(30))
    assert any(watch.trouble(3.5, 1.0) for _ in range(20))
    assert Watch(None).trouble(float("nan"), 1.0) and Watch(None).trouble(1.0, float("inf"))


def text_file(tmp_path, data):
    (tmp_path / "text.txt").write_bytes(data)
    return tmp_path / "text.txt"


def test_bits_per_byte_are_those_of_one_pass_over_the_whole_text(tmp_path):
    one, data = model().double(), TEXT[:500].encode()
    path = text_file(tmp_path, data)
    ids = torch.tensor([[256, *data]])
    nats = F.cross_entropy(one(ids[:, :-1])[0][0], ids[0, 1:], reduction="sum").item()
    for chunk in (7, 100, 2048):
        score = evaluate(one, ByteTokenizer(), path, chunk=chunk)
        assert math.isclose(score.nats, nats, rel_tol=1e-9) and (score.tokens, score.nbytes) == (500, 500)
        assert math.isclose(score.bits_per_byte, nats / math.log(2) / 500, rel_tol=1e-9)
    told = []
    limited = evaluate(one, ByteTokenizer(), path, limit=100, chunk=40, progress=lambda *x: told.append(x))
    assert limited.nbytes == 100 and [n for n, _ in told] == [40, 80, 100]
    assert told[-1][1] == limited.bits_per_byte


def test_a_limit_inside_a_character_ends_before_it(tmp_path):
    bpe = BPETokenizer.train(TEXT, 270)
    path = text_file(tmp_path, "ab漢字".encode())
    for limit, nbytes in ((2, 2), (3, 2), (4, 2), (5, 5), (7, 5), (8, 8), (100, 8)):
        assert evaluate(model(vocabulary=bpe.size), bpe, path, limit=limit).nbytes == nbytes


def test_growing_states_are_evaluated_with_a_context(tmp_path):
    one, path = model("attention").double(), text_file(tmp_path, TEXT[:100].encode())
    with pytest.raises(ValueError, match=r"attention grows with every token.*context=2048"):
        evaluate(one, ByteTokenizer(), path)
    score = evaluate(one, ByteTokenizer(), path, context=40)
    assert math.isclose(evaluate(one, ByteTokenizer(), path, context=40, chunk=20).nats, score.nats)
    halves = [TEXT[:40], TEXT[39:80], TEXT[79:100]]
    nats = 0.0
    for i, half in enumerate(halves):
        ids = torch.tensor([([256] if i == 0 else []) + list(half.encode())])
        nats += F.cross_entropy(one(ids[:, :-1])[0][0], ids[0, 1:], reduction="sum").item()
    assert math.isclose(score.nats, nats, rel_tol=1e-9)


def test_files_that_cannot_be_scored_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        evaluate(model(), ByteTokenizer(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="is empty"):
        evaluate(model(), ByteTokenizer(), text_file(tmp_path, b""))
    assert evaluate(model(), ByteTokenizer(), text_file(tmp_path, b"x")).tokens == 1


def numbers(step, used):
    return Numbers(step, 1.5, 2.164, 1e-3, 0.3, 12_345_678, 600.0, 20_500.0, used, 300 * 2**20)


def test_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with Report(Console(file=out, force_terminal=False, width=200)) as report:
        report.show(numbers(10, 0.25))
        report.show(numbers(11, 0.26))  # too soon after the one before
        report.note("step 11 · [kept]")
    lines = out.getvalue().splitlines()
    assert lines == [
        "step 10 · loss 1.500 · 2.164 bits/byte · 20,500 tokens/s · 30:00 left · 300 MiB", "step 11 · [kept]",
    ]  # fmt: skip
    assert (clock(59.6), clock(123), clock(3723)) == ("1:00", "2:03", "1:02:03")
    assert 2**25 < memory(torch.device("cpu")) < 2**40, "PyTorch alone takes more than 32 MiB"


def test_a_bar_on_a_terminal():
    out = io.StringIO()
    with Report(Console(file=out, force_terminal=True, width=120)) as report:
        report.show(numbers(10, None))
        report.show(numbers(11, 0.5))
    shown = out.getvalue()
    assert "━" in shown and "2.164 bits/byte" in shown and "10:00 left" in shown


def test_a_resumed_log_drops_what_came_after_the_checkpoint(tmp_path):
    log = Log(tmp_path)
    for step in (1, 2, 3):
        log.write(step, tokens=step, bits_per_byte=4.0 / step)
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "tok')  # killed while writing
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]
    Log(tmp_path, step=2).close()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2]
    plain = curve(tmp_path).read_bytes()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "tokens": 2, "held_out": 3.0}\n')
    assert curve(tmp_path).name == CURVE and curve(tmp_path).read_bytes() != plain
    assert curve(tmp_path / "nothing") is None
