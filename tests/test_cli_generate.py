"""`riverrun generate`: seeds, batches, states on disk, Ctrl-C, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from command_line import made, refused

from riverrun import state as states
from riverrun.commands import generate
from riverrun.inference.decoding import Generation, Limits


@pytest.fixture
def model(tmp_path):
    return made(tmp_path / "model")


def test_generate_writes_the_same_text_again_for_the_same_seed(riverrun, model):
    first = riverrun("generate", model, "-p", "a", "max_tokens=20", "seed=3")[1]
    assert riverrun("generate", model, "-p", "a", "max_tokens=20", "seed=3")[1] == first
    assert riverrun("generate", model, "-p", "a", "max_tokens=20", "seed=4")[1] != first


def test_samples_and_several_prompts_are_a_batch(riverrun, model, tmp_path):
    (tmp_path / "prompt.txt").write_text("a longer prompt")
    _, both, _ = riverrun(
        "generate", model, "-p", "a", "-f", tmp_path / "prompt.txt", "samples=2", "max_tokens=9"
    )
    alone = [
        riverrun("generate", model, "-p", prompt, "max_tokens=9", f"seed={seed}")[1]
        for seed in (0, 1)
        for prompt in ("a", "a longer prompt")
    ]
    assert both == "".join(alone)


def test_generate_goes_on_from_its_state_file(riverrun, model, tmp_path):
    file = tmp_path / "run.state"
    whole = riverrun("generate", model, "-p", "a", "max_tokens=30", "seed=3")[1]
    first = riverrun("generate", model, "-p", "a", "max_tokens=12", "seed=3", "--state", file)
    second = riverrun("generate", model, "max_tokens=18", "--state", file)
    assert first[1][:-1] + second[1] == whole
    assert str(file) in first[2]
    assert "18 tokens" in second[2] and "after 31 tokens" in second[2], "now, and since the prompt"
    assert "state of 64 bytes" in second[2], "16 numbers of 4 bytes"


def test_a_state_goes_on_with_another_seed_if_one_is_given(riverrun, model, tmp_path):
    riverrun("generate", model, "-p", "a", "max_tokens=2", "--state", tmp_path / "run.state")
    texts = [
        riverrun("generate", model, f"start={tmp_path / 'run.state'}", "max_tokens=20", *seed)[1]
        for seed in ([], ["seed=0"], ["seed=5"])
    ]
    assert texts[0] == texts[1] != texts[2]


def test_without_a_prompt_a_text_begins_as_after_an_empty_one(riverrun, model):
    assert (
        riverrun("generate", model, "max_tokens=9")[1]
        == riverrun("generate", model, "-p", "", "max_tokens=9")[1]
    )


def test_a_text_ends_before_a_stop_string(riverrun, model):
    text = riverrun("generate", model, "-p", "a", "max_tokens=30")[1]
    code, cut, said = riverrun("generate", model, "-p", "a", "max_tokens=30", "--stop", text[9:12])
    assert (code, cut) == (0, text[: text.index(text[9:12])] + "\n") and "ended by stop" in said


def test_on_a_terminal_the_prompt_stands_before_its_text(riverrun, model, monkeypatch):
    more = "-p", "b", "max_tokens=5"
    one, two = riverrun("generate", model, *more)[1], riverrun("generate", model, "-p", "a", *more)[1]
    monkeypatch.setattr(generate.sys.stdout, "isatty", lambda: True, raising=False)
    assert riverrun("generate", model, *more)[1] == "b" + one
    first, second, _ = two.split("\n")
    assert riverrun("generate", model, "-p", "a", *more)[1] == f"a{first}\nb{second}\n"


def test_ctrl_c_is_noted_once_and_is_python_s_again():
    def mine(number, frame): ...

    before = signal.signal(signal.SIGINT, mine)
    with generate.interruption() as caught:
        signal.raise_signal(signal.SIGINT)
        assert caught == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.signal(signal.SIGINT, before) is mine


def test_settings_reach_the_run(model, monkeypatch):
    limits = []

    def seen(*given):
        limits.append(given[3])
        raise ValueError

    monkeypatch.setattr(generate, "Generation", seen)
    given = "max_tokens=3", "piece=5", "graph=false"
    with pytest.raises(ValueError):
        generate.run(Path(model), list(given), ["a"], ["z"], None, "cpu")
    assert limits == [Limits(3, ("z",), 5, False)]


def test_no_state_is_promised_that_cannot_be_kept(riverrun, model, tmp_path, monkeypatch):
    monkeypatch.setattr(generate.os, "access", lambda path, mode: not (path == tmp_path and mode == os.W_OK))
    refused(
        riverrun("generate", model, "-p", "a", "--state", tmp_path / "run.state"), "may not be written to"
    )


def test_generate_begins_with_a_file_that_is_only_read(riverrun, model, tmp_path):
    start, kept = tmp_path / "begin.state", tmp_path / "end.state"
    riverrun("generate", model, "-p", "a", "max_tokens=2", "--state", start)
    before = start.read_bytes()
    text = riverrun("generate", model, "max_tokens=9", f"start={start}")[1]
    assert riverrun("generate", model, "max_tokens=9", f"start={start}", "--state", kept)[1] == text
    assert start.read_bytes() == before and kept.read_bytes() != before
    refused(riverrun("generate", model, f"start={start}", "--state", kept), "leave out start=")
    refused(riverrun("generate", model, "-p", "a", f"start={tmp_path / 'no.state'}"), "no state file")


def test_no_token_is_not_ctrl_c(riverrun, model):
    said = riverrun("generate", model, "-p", "a", "max_tokens=0")[2]
    assert "ended by length" in said


def test_ctrl_c_ends_the_text_and_saves_the_state(riverrun, model, tmp_path, monkeypatch):
    file, step, steps = tmp_path / "run.state", Generation._draw, []

    def interrupted(self, rows, running):
        steps.append(1)
        if len(steps) == 12:
            signal.raise_signal(signal.SIGINT)
        return step(self, rows, running)

    monkeypatch.setattr(Generation, "_draw", interrupted)
    code, text, said = riverrun("generate", model, "-p", "a", "max_tokens=1000", "seed=3", "--state", file)
    assert code == 130 and len(steps) == 12 and "Ctrl-C" in said
    rest = riverrun("generate", model, "max_tokens=18", "--state", file)[1]
    assert text[:-1] + rest == riverrun("generate", model, "-p", "a", "max_tokens=30", "seed=3")[1]


def test_bad_settings_and_prompts_of_generate_are_refused(riverrun, model, tmp_path):
    refused(riverrun("generate", model, "temprature=1"), "did you mean 'temperature'?")
    refused(riverrun("generate", model, "top_p=high"), "'high' is not float")
    refused(riverrun("generate", model, "top_p=2"), "top_p = 2")
    refused(
        riverrun("generate", model, "--stop", "a", "--stop", ""), "a stop string is empty, ''", "leave it out"
    )
    refused(riverrun("generate", model, "-p", "<|user|>"), "<|user|>", "special=")
    refused(riverrun("generate", model, "-p", "<|user|>", "special=read"), "unknown special token")
    refused(riverrun("generate", model, "-f", tmp_path / "no.txt"), "no prompt file", "no.txt")
    refused(riverrun("generate", model, "-f", tmp_path), "no prompt file")
    refused(riverrun("generate", model, "5"), "'5' is not of the form key=value", "temperature")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin1"))
    refused(riverrun("generate", model, "-f", tmp_path / "latin.txt"), "not UTF-8", "iconv")
    refused(riverrun("generate", model, "--state", tmp_path / "no.state"), "no state file", "--prompt")
    for state in (tmp_path / "no" / "run.state", tmp_path):  # or the state would be lost
        refused(riverrun("generate", model, "-p", "a", "--state", state), "folder that exists")


def test_states_of_others_are_refused(riverrun, model, tmp_path):
    file, other = tmp_path / "run.state", made(tmp_path / "other", seed=1)
    riverrun("generate", model, "-p", "a", "-p", "b", "max_tokens=2", "--state", file)
    refused(riverrun("generate", other, "--state", file), "another model")
    refused(riverrun("generate", model, "-p", "a", "--state", file), "1 prompts", "2 sequences")
    refused(riverrun("generate", model, "--state", file, "samples=2"), "samples=2", "1 when a state")
    file.write_bytes(file.read_bytes()[:-9])
    refused(riverrun("generate", model, "--state", file), "truncated or damaged")
    states.save((torch.zeros(1),), file)
    refused(riverrun("generate", model, "--state", file), "not written by generation")


def test_damaged_models_are_refused(riverrun, model, tmp_path):
    refused(riverrun("generate", tmp_path / "no"), "no model in")
    path = tmp_path / "model" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    refused(riverrun("generate", model), "damaged")
    path.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    refused(riverrun("generate", model), "damaged")
    path.write_bytes(whole)
    config = tmp_path / "model" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "model": {**values["model"], "vocabulary": 300}}))
    refused(riverrun("generate", model), "300", "257")
    config.write_text(json.dumps({**values, "model": {**values["model"], "widht": 3}}))
    refused(riverrun("generate", model), "unknown field 'widht'", "did you mean 'width'?")
    config.write_text("{")
    refused(riverrun("generate", model), "not readable JSON")
