"""The command line: every command does its work, and bad input ends in one line that says what to do."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import accumulate, chain, cycle, pairwise
from types import SimpleNamespace

import pytest
import torch
from command_line import BOOK, made, refused

from riverrun import __version__, cli
from riverrun.commands import bench, train
from riverrun.commands.train import changed, load
from riverrun.data.tokens import BPETokenizer
from riverrun.mixers import MIXERS, build
from riverrun.training.loop import Result

TINY = [
    "model.width=16",
    "model.depth=1",
    "model.pattern=mingru",
    "data.batch=2",
    "data.length=32",
    "steps=2",
]


@pytest.fixture
def model(tmp_path):
    return made(tmp_path / "model")


def test_help_imports_nothing_heavy_and_names_every_command():
    code = (
        "import sys; from riverrun.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numba', 'numpy', 'matplotlib'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, encoding="utf-8"
    ).stdout
    assert shown.endswith("[]\n")
    assert all(name in shown for name in ("train", "generate", "eval", "mixers", "bench", "doctor"))


def test_nothing_asked_is_help(riverrun):
    code, out, err = riverrun()
    assert (code, err) == (0, "") and "Usage" in out and "generate" in out


def test_version(riverrun):
    assert riverrun("--version") == (0, f"riverrun {__version__}\n", "")


def test_train_then_resume_then_eval_then_generate(riverrun, tmp_path):
    book, out = tmp_path / "book.txt", tmp_path / "run"
    book.write_text(BOOK)
    code, shown, _ = riverrun("train", f"data.files={book}", f"out={out}", *TINY)
    assert code == 0 and str(out / "model") in shown and str(out / "loss.png") in shown
    out = out.rename(tmp_path / "moved")
    code, _, _ = riverrun("train", "--resume", out, "steps=3")
    assert code == 0 and (out / "checkpoints" / "step-00000003").is_dir()
    assert not (tmp_path / "run").exists(), "a run goes on where it lies now"
    code, shown, _ = riverrun("eval", out / "model", book, "--json", "--limit", 500)
    score = json.loads(shown)[str(book)]
    assert code == 0 and score["bytes"] == 500 and 0 < score["bits_per_byte"] < 9
    code, shown, _ = riverrun("eval", out / "model", book)
    assert code == 0 and f"{len(BOOK):,}" in shown
    _, shown, _ = riverrun("eval", out / "model", book, "--limit", 500)
    assert f"{score['bits_per_byte']:.4f}" in shown
    code, shown, said = riverrun("generate", out / "model", "-p", "It", "max_tokens=5")
    assert code == 0 and shown and "5 tokens" in said


def test_recipes_are_found_by_name_and_by_file(tmp_path, monkeypatch):
    recipe = tmp_path / "mine.py"
    recipe.write_text(
        "from riverrun.training.settings import TrainConfig\ndef config(): return TrainConfig(seed=7)\n"
    )
    assert load(str(recipe)).seed == 7
    settings = tmp_path / "mine.json"
    settings.write_text('{"seed": 8}')
    assert load(str(settings)).seed == 8
    timed = replace(load(str(settings)), minutes=5.0)
    for given in (["steps=6"], ["steps=6", "minutes=none"], ["minutes=none", "seed=1", "steps=6"]):
        assert (changed(timed, given).steps, changed(timed, given).minutes) == (6, None)
    monkeypatch.chdir(tmp_path)
    assert load("tiny").out == "runs/tiny", "from the clone, wherever one stands"
    (tmp_path / "recipes").mkdir()
    recipe.rename(tmp_path / "recipes" / "mine.py")
    assert load("mine").seed == 7


def test_settings_recipes_and_runs_that_do_not_exist_are_refused(riverrun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "paper.py").write_text("x = 1\n")
    refused(riverrun("train", "optim.lrr=1"), "no setting 'optim.lrr'", "did you mean 'optim.lr'?")
    refused(riverrun("train", "steps=many"), "'many' is not int")
    refused(riverrun("train", "papr"), "no recipe 'papr'", "did you mean 'paper'?")
    refused(riverrun("train", "steps=1", "paper"), "'paper' is not of the form", "recipe stands before")
    refused(riverrun("train", tmp_path / "no.json"), "no file")
    refused(riverrun("train", tmp_path / "no.py"), "no recipe")
    refused(riverrun("train", "--resume", tmp_path), "no checkpoint")
    refused(riverrun("train", "paper", "--resume", tmp_path), "recipe 'paper' and --resume", "one of them")
    refused(
        riverrun("train", f"data.files={tmp_path / 'no.txt'}", "steps=1", f"out={tmp_path / 'run'}"), "no.txt"
    )
    refused(riverrun("train", "paper"), "paper.py is no recipe", "config()")


def test_an_argument_that_is_a_dictionary_is_shown_how_to_be_given(riverrun):
    refused(riverrun("train", "model.mixers.mamba.beyond.length=9"), "model.mixers.mamba.beyond='{")


def test_odd_files_in_eval(riverrun, model, tmp_path):
    refused(riverrun("eval", model, tmp_path / "no.txt"), "no file")
    empty, one, binary = (tmp_path / name for name in ("empty", "one", "binary"))
    empty.write_bytes(b"")
    refused(riverrun("eval", model, empty), "empty")
    one.write_bytes(b"x")
    binary.write_bytes(bytes(range(256)))
    bpe, latin = tmp_path / "bpe", tmp_path / "latin"
    latin.write_bytes("café".encode("latin1"))
    (tmp_path / "book").write_text(BOOK)
    made(bpe, tokenizer=BPETokenizer.train(BOOK, 270))
    refused(riverrun("eval", bpe, one, latin), f"{latin}: byte 3 (0xe9)", "iconv")
    sizes = {path: path.stat().st_size for path in (one, tmp_path / "book")}
    code, out, _ = riverrun("eval", bpe, *sizes, "--json")
    assert code == 0 and [s["bytes"] for s in json.loads(out).values()] == list(sizes.values())
    code, out, _ = riverrun("eval", model, one, binary, "--json")
    assert code == 0 and [s["bytes"] for s in json.loads(out).values()] == [1, 256]


def test_eval_of_a_state_that_grows_needs_its_context(riverrun, tmp_path):
    grows, text = made(tmp_path / "grows", pattern="attention"), tmp_path / "text"
    text.write_text(BOOK)
    refused(riverrun("eval", grows, text, "--limit", 50), "grows with every token", "context=2048")
    code, out, _ = riverrun("eval", grows, text, "--limit", 50, "--context", 8, "--json")
    (score,) = json.loads(out).values()
    assert code == 0 and score["tokens"] == 50 and score["tokens_per_second"] > 50


def test_unforeseen_errors_are_one_line_unless_debug(riverrun, monkeypatch):
    def fails(name, **arguments):
        raise RuntimeError("two\nlines [bold]")

    monkeypatch.setattr(cli, "command", fails)
    assert riverrun("mixers") == (1, "", "error: two lines [bold] (RuntimeError; --debug shows where)\n")
    with pytest.raises(RuntimeError):
        cli.main(["mixers", "--debug"])


def test_a_run_that_was_interrupted_ends_with_130(riverrun, monkeypatch, tmp_path):
    ended = Result(tmp_path / "model", tmp_path / "c", 5, 80, 1.0, 2.0, None, None, interrupted=True)
    monkeypatch.setattr(train, "train", lambda config, resume: ended)
    code, out, err = riverrun("train", "steps=9")
    assert (code, err) == (130, "") and "loss curve" not in out


def test_a_second_ctrl_c_ends_with_130_and_no_word(riverrun, monkeypatch):
    def stopped(name, **arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "command", stopped)
    assert riverrun("mixers") == (130, "", "")


def test_a_reader_that_leaves_is_no_error():
    code = (
        "from riverrun import cli\n"
        "cli.command = lambda *a, **k: print('a line\\n' * 99999)\n"
        "cli.main(['mixers'])"
    )
    reading, writing = os.pipe()
    os.close(reading)
    left = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (left.returncode, left.stderr) == (1, b"")


def test_idle_threads_sleep_unless_the_user_says_otherwise(monkeypatch):
    monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(run=lambda: 3))
    monkeypatch.setenv("OMP_WAIT_POLICY", "")
    for policy, kept in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY") if policy is None else monkeypatch.setenv(
            "OMP_WAIT_POLICY", policy
        )
        with pytest.raises(cli.typer.Exit) as ended:
            cli.command("any")
        assert cli.os.environ["OMP_WAIT_POLICY"] == kept and ended.value.exit_code == 3


def test_mixers_lists_every_row(riverrun):
    code, out, _ = riverrun("mixers", "--width", 64)
    assert code == 0 and all(f" {name} " in out for name in MIXERS)
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert "not causal" in lines["hydra"] and "not causal" not in lines["mamba"]
    # keys and values of 64 numbers each, 4 bytes, and 12 bytes of places beside them: 1,000 steps of them
    assert abs(int(lines["attention"].split()[-1].replace(",", "")) - 1000 * 2 * 64 * 4) < 100
    parameters = sum(p.numel() for p in build("mingru", 64).parameters())
    assert lines["mingru"].split()[-2:] == [f"{parameters:,}", "256"]
    refused(riverrun("mixers", "gated_delta_net"), "did you mean 'gated_deltanet'?")


def test_mixers_names_the_one_that_does_not_fit(riverrun):
    refused(riverrun("mixers", "--width", 15), "'attention' at width 15", "accepted are")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused(riverrun, model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(BOOK)
    for args in (
        ("generate", model, "--device", "cuda"),
        ("eval", model, text, "--device", "cuda"),
        ("bench", "mingru", "--device", "cuda"),
        ("train", f"data.files={text}", "device=cuda", f"out={tmp_path / 'run'}"),
    ):
        refused(riverrun(*args), "no device 'cuda'", "there are ['cpu']")


def test_bench_counts_the_fastest_call(riverrun, monkeypatch):
    """By a clock on which the first call of each kind takes 9 seconds, and then 3, 1 and 2."""
    now = accumulate(chain([0], cycle([9, 0, 3, 0, 1, 0, 2, 0])))
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    shown = riverrun("bench", "mingru", "--width", 8, "--length", 10)[1]
    (row,) = [line.split("│") for line in shown.splitlines() if "mingru" in line]
    # a second for 10 steps, and for 100 decoded; 8 numbers of 4 bytes
    assert [cell.strip() for cell in row[2:6]] == ["100000.00", "100000.00", "100", "32"]


def test_bench_runs_backward_and_decodes_from_the_state_before(monkeypatch):
    mixer, seen = build("mingru", 8), []
    mixer.register_forward_hook(lambda _, given, made: seen.append((given[1:], made[1])))
    monkeypatch.setattr(bench, "build", lambda name, width: mixer)
    bench.measure("mingru", 8, 10, "cpu")
    for before, now in pairwise(seen[: 1 + bench.DECODED]):
        assert now[0][0] is before[1]
    assert all(p.grad is not None for p in mixer.parameters())


def test_bench_without_names_takes_what_can_decode(riverrun, monkeypatch):
    timed = []
    monkeypatch.setattr(bench, "measure", lambda name, *rest: timed.append(name) or (1.0, 1.0, 1.0, 1))
    riverrun("bench")
    assert timed == [name for name, row in MIXERS.items() if row.causal] and "hydra" not in timed


def test_bench_times_what_is_named(riverrun):
    code, out, _ = riverrun("bench", "mingru", "--width", 16, "--length", 10)
    assert code == 0 and "mingru" in out and "mamba" not in out and "10 steps at width 16" in out
    (line,) = [
        x for x in riverrun("bench", "hydra", "--width", 16, "--length", 4)[1].splitlines() if "hydra" in x
    ]
    assert line.split("│")[-3].strip() == "-", "what sees both ways does not decode"
    refused(riverrun("bench", "mingruu"), "did you mean 'mingru'?")


def test_doctor_examines_what_is_named(riverrun):
    refused(riverrun("doctor", "dleta"), "no op 'dleta'", "did you mean 'delta'?")
    code, out, err = riverrun("doctor", "--device", "tpu")
    assert (code, out) == (2, "") and "'tpu' is neither cpu nor cuda" in " ".join(err.split())
    assert cli.device_known("cuda:1") == "cuda:1"
