"""Runs that are killed, interrupted, or out of disk, and go on to the same bits."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import TEXT, Doing, files, settings

from riverrun import disk
from riverrun.config import override
from riverrun.models import folder
from riverrun.training import checkpoint, log, prepare
from riverrun.training.loop import Diverged, train
from riverrun.training.report import Silent


@pytest.fixture
def whole(tmp_path):
    """A run that nothing disturbs."""
    config = settings(tmp_path, "whole")
    train(config, report=Silent())
    return files(config.out, 11)


# `python -c CHILD FOLDER MOMENT`: a run that kills itself without warning at that moment
CHILD = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import runs as t
from riverrun.training.loop import train
from riverrun import disk

kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "between checkpoints":
    report = t.Doing(8, kill)
else:
    report, write, written = t.Silent(), disk.write, []
    def half(path, data):
        written.append(path)
        if len(written) == 8:  # five files a checkpoint: this is the third of the second one
            write(path, data[:20])
            kill()
        write(path, data)
    disk.write = half
train(t.settings(Path(sys.argv[1]), "killed"), report=report)
"""


@pytest.mark.parametrize(("moment", "last"), [("between checkpoints", 6), ("while writing", 3)])
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, moment, last):
    died = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), moment], capture_output=True, text=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    config = settings(tmp_path, "killed")
    assert checkpoint.latest(config.out).name == f"step-{last:08d}"
    result = train(config, resume=True, report=Silent())
    assert (result.step, result.tokens) == (11, 11 * 64)
    assert files(config.out, 11) == whole
    left = sorted(p.name for p in (tmp_path / "killed" / "checkpoints").iterdir())
    assert left == ["step-00000009", "step-00000011"]  # the half-written one is gone


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_run_goes_on_to_the_same_bits(whole, tmp_path, number, capsys):
    config = settings(tmp_path, "stopped")
    notes = []
    report = Doing(5, lambda: os.kill(os.getpid(), number))
    report.note = notes.append
    before = signal.getsignal(number)
    result = train(config, report=report)
    assert result.interrupted and result.step == 5 and result.checkpoint.name == "step-00000005"
    assert notes == [f"stopped at step 5. Go on with: riverrun train --resume {config.out}"]
    assert signal.getsignal(number) is before
    assert not train(config, resume=True, report=Silent()).interrupted
    assert files(config.out, 11) == whole


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, "stopped"), report=Doing(5, twice))
    assert checkpoint.latest(tmp_path / "stopped").name == "step-00000003"


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path, monkeypatch):
    config = settings(tmp_path, "full")
    write = disk.write

    def full(path, data):
        if ".step-00000009" in str(path) and path.name == "training.safetensors":
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, data)

    monkeypatch.setattr(disk, "write", full)
    with pytest.raises(
        OSError, match=r"no checkpoint .* at step 9 .No space left.*step-00000006.*Make room.*--resume"
    ) as error:
        train(config, report=Silent())
    assert error.value.errno == errno.ENOSPC
    kept = sorted(p.name for p in (tmp_path / "full" / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006"]
    monkeypatch.undo()
    assert train(config, resume=True, report=Silent()).step == 11


def test_ctrl_c_does_not_wait_for_the_held_out_text(tmp_path):
    config = settings(tmp_path, "stopped", f"evaluation.file={tmp_path / 'a.txt'}")
    result = train(config, report=Doing(2, lambda: signal.raise_signal(signal.SIGINT)))
    assert result.interrupted and result.score is None


def test_random_numbers_go_on(tmp_path):
    config = settings(tmp_path, "run")
    training, _, tokenizer = prepare.prepare(config, resume=False)
    torch.rand(3)
    checkpoint.save(config, training, tokenizer)
    following = torch.rand(1)
    prepare.prepare(config, resume=True)
    assert torch.equal(torch.rand(1), following)


def test_the_clock_goes_on(run):
    config, path = run
    values = json.loads((path / "training.json").read_text())
    values["progress"]["seconds"] = 1e6
    (path / "training.json").write_text(json.dumps(values))
    assert train(override(config, ["steps=4"]), resume=True, report=Silent()).seconds > 1e6
    row = log.rows(config.out)[-1]
    assert row["step"] == 4 and row["seconds"] > 1e6, "of the whole run"
    assert row["tokens_per_second"] > 1, "of the steps since"


def test_a_run_is_prolonged_and_decays_later(tmp_path):
    first = settings(tmp_path, "run", "steps=6")
    train(first, report=Silent())
    longer = override(checkpoint.settings(checkpoint.latest(first.out)), ["steps=9", "schedule.decay=0.3"])
    assert train(longer, resume=True, report=Silent()).step == 9


def test_a_checkpoint_is_a_model(tmp_path):
    config = settings(tmp_path, "run", "steps=3")
    result = train(config, report=Silent())
    one, two = (folder.load(path)[0] for path in (result.checkpoint, result.model))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values()))


@pytest.fixture
def run(tmp_path):
    config = settings(tmp_path, "run", "steps=3")
    return config, train(config, report=Silent()).checkpoint


def test_a_run_is_not_overwritten(run):
    with pytest.raises(FileExistsError, match=r"already holds a run.*--resume.*out="):
        train(run[0], report=Silent())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.width=32", r"trained with model\.width = 16, now it is 32"),
        ("data.length=8", r"trained with data\.length = 16, now it is 8"),
        ("accumulate=1", "trained with accumulate = 2, now it is 1"),
        ("seed=1", "trained with seed = 0, now it is 1"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused(run, change, message):
    with pytest.raises(ValueError, match=message):
        train(override(run[0], [change]), resume=True, report=Silent())


def test_other_text_is_refused(run, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT.replace("book", "tome"))
    with pytest.raises(ValueError, match="not what this run has learnt from"):
        prepare.prepare(run[0], resume=True)


def test_the_text_may_lie_elsewhere(run, tmp_path):
    config, _ = run
    (tmp_path / "moved").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    with pytest.raises(FileNotFoundError):
        prepare.prepare(config, resume=True)
    prepare.prepare(override(config, [f"data.files={tmp_path / 'moved'}"]), resume=True)


def test_a_used_budget_is_told(run):
    report, notes = Silent(), []
    report.note = notes.append
    assert train(run[0], resume=True, report=report).step == 3
    assert notes == [
        f"the budget is used up at step 3. Give a larger one: riverrun train --resume {run[0].out} steps=..."
    ]


def test_what_a_killed_run_left_is_cleared(run):
    left = run[1].with_name(".step-00000099.new")
    left.mkdir()
    train(override(run[0], ["steps=4"]), resume=True, report=Silent())
    assert not left.exists()


def test_a_damaged_checkpoint_is_refused(run):
    config, path = run
    for name in ("training.safetensors", "model.safetensors"):
        data = bytearray((path / name).read_bytes())
        (path / name).write_bytes(data[:-1])
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            prepare.prepare(config, resume=True)
        (path / name).write_bytes(data)
    values = json.loads((path / "training.json").read_text())
    for name in ("progress", "config", "skeleton", "sha256"):
        (path / "training.json").write_text(json.dumps({k: v for k, v in values.items() if k != name}))
        with pytest.raises(ValueError, match=rf"step-00000003 is damaged.*lacks \['{name}'\]; remove"):
            prepare.prepare(config, resume=True)
    (path / "training.json").unlink()
    with pytest.raises(ValueError, match="step-00000003 is damaged"):
        prepare.prepare(config, resume=True)
    values["config"]["stepz"] = 1
    (path / "training.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="unknown field 'stepz'; did you mean 'steps'"):
        prepare.prepare(config, resume=True)


def test_no_run_to_resume(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run to go on with"):
        train(settings(tmp_path, "nothing"), resume=True, report=Silent())


def test_a_place_inside_a_run_is_told_from_its_folder(run):
    config, path = run
    for inside in (path, Path(config.out) / "model"):
        with pytest.raises(FileNotFoundError, match=f"give the run's folder, {config.out}$"):
            checkpoint.latest(inside)


def test_nan_stops_the_run_and_names_the_last_good_checkpoint(tmp_path, monkeypatch):
    config = settings(tmp_path, "nan")

    def poison():
        for group in tracked[0].param_groups:
            group["params"][0].data.fill_(float("nan"))

    tracked, make = [], prepare.adamw
    monkeypatch.setattr(prepare, "adamw", lambda *args: tracked.append(make(*args)) or tracked[0])
    with pytest.raises(Diverged, match=r"step 8: the loss is nan.*step-00000006.*--resume"):
        train(config, report=Doing(7, poison))
    assert checkpoint.latest(config.out).name == "step-00000006"
    assert all(torch.isfinite(x).all() for x in folder.load(checkpoint.latest(config.out))[0].parameters())
