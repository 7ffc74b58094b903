"""A disk that is really full, and files that may not grow: what was there stays; the error says what to do.

The disk is a file system of two megabytes in memory, mounted for one process alone. Where no test may mount,
a limit on the size of files, which every system has, still shows a write that fails half-way.
"""

import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from command_line import made
from runs import Doing, files, settings

from riverrun import cli
from riverrun import state as states
from riverrun.training import checkpoint
from riverrun.training.loop import train
from riverrun.training.report import Silent

MOUNT = "mount -t tmpfs -o size=2m none {0}"


def shell() -> list[str] | None:
    """A shell with mounts of its own, None where there can be none."""
    for command in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        run = [*command, "sh", "-c"]
        if shutil.which("unshare") and not subprocess.call([*run, MOUNT.format("/mnt")], stderr=-3):
            return run
    return None


SHELL = shell()


def fill(place: Path, *whole_pages: Path) -> None:
    """Take what is left; the files given can then not grow by a byte, since their last pages are full too."""
    for path in whole_pages:
        with path.open("ab") as file:
            file.write(b"\n" * (-path.stat().st_size % 4096))
    with (place / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))


def refuses(config, report, step, what):
    """The run ends with an error that names its last checkpoint, and goes on from it when there is room."""
    with pytest.raises(OSError, match=rf"no {what} .*written at step {step} \(No space left") as caught:
        train(config, report=report)
    last = checkpoint.latest(config.out)
    assert f"the last good checkpoint is {last}. Make room, then go on with" in str(caught.value)
    assert not list((Path(config.out) / "checkpoints").glob(".*")), "nothing half-written is left"
    (Path(config.out).parent / "filler").unlink()
    return last.name


def runs_on_a_full_disk(disk: Path, elsewhere: Path) -> None:
    whole = settings(elsewhere, "whole")
    train(whole, report=Silent())
    held_out = f"evaluation.file={elsewhere / 'a.txt'}", "evaluation.limit=9"
    config = settings(elsewhere, "", f"out={disk / 'run'}", *held_out)
    ended = Doing(None, None)
    ended.note = lambda text: fill(disk)  # of the held-out text, after the last checkpoint
    for what, report, step, last in (
        ("checkpoint", Doing(7, lambda: fill(disk)), 9, 6),
        ("line of the log", Doing(7, lambda: fill(disk, disk / "run" / "log.jsonl")), 7, 6),
        ("model", ended, 11, 11),
    ):
        assert refuses(config, report, step, what) == f"step-{last:08d}"
        train(config, resume=True, report=Silent())
        assert files(config.out, 11) == files(whole.out, 11)
        shutil.rmtree(config.out)


def command(*arguments) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    print("code", ended.value.code or 0)


def states_on_a_full_disk(disk: Path, elsewhere: Path) -> None:
    model, file = made(elsewhere / "model"), disk / "run.state"
    begin = ("generate", model, "-p", "a", "max_tokens=12", "seed=3", "--state", file)
    fill(disk)
    command(*begin)
    assert [p.name for p in disk.iterdir()] == ["filler"]
    (disk / "filler").unlink()
    command(*begin)
    before = file.read_bytes()
    fill(disk)
    command("generate", model, "max_tokens=18", "--state", file)
    assert file.read_bytes() == before
    (disk / "filler").unlink()
    command("generate", model, "max_tokens=18", "--state", file)


@pytest.mark.skipif(SHELL is None, reason="this system lets no test mount a small disk (unshare --mount)")
@pytest.mark.parametrize("what", ["runs", "states"])
def test_on_a_full_disk(what, tmp_path):
    (tmp_path / "disk").mkdir()
    here = [sys.executable, __file__, what, str(tmp_path / "disk"), str(tmp_path)]
    mounted = f'{MOUNT.format(here[3])} && exec "$@"'
    child = subprocess.run([*SHELL, mounted, "sh", *here], capture_output=True, encoding="utf-8")
    assert child.returncode == 0, child.stderr
    if what == "states":
        texts, errors = child.stdout.splitlines(), child.stderr.splitlines()
        assert [x for x in texts if x.startswith("code")] == ["code 2", "code 0", "code 2", "code 0"]
        failed = [x for x in errors if x.startswith("error")]
        assert len(failed) == 2 and all("No space left" in x and "run.state'" in x for x in failed)
        assert all("what was there is as it was. Make room" in x for x in failed)
        assert texts[0] == texts[2] and texts[4] == texts[6], "the same command writes the same text"


@contextmanager
def largest(size: int):
    """No file may grow beyond this many bytes: writes fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_may_not_grow(tmp_path):
    train(settings(tmp_path, "run", "steps=3"), report=Silent())
    longer, before = settings(tmp_path, "run", "steps=6"), files(tmp_path / "run", 3)
    refused = pytest.raises(
        OSError, match=r"no checkpoint .*step 6 \(File too large\).*step-00000003.*--resume"
    )
    with largest(20_000), refused:  # the log is shorter, the weights are longer
        train(longer, resume=True, report=Silent())
    assert files(tmp_path / "run", 3) == before
    assert train(longer, resume=True, report=Silent()).checkpoint.name == "step-00000006"


def test_a_state_that_may_not_grow(tmp_path):
    for there in ([], ["x.state"]):  # nothing half-written is left, and what was there is as it was
        with (
            largest(64),
            pytest.raises(OSError, match=r"not be written to .*x\.state: File too large") as error,
        ):
            states.save((torch.zeros(1000),), tmp_path / "x.state")
        assert error.value.errno == errno.EFBIG and [p.name for p in tmp_path.iterdir()] == there
        states.save((torch.ones(2),), tmp_path / "x.state")
        assert states.load(tmp_path / "x.state")[0][0].tolist() == [1, 1]


def test_a_state_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (done.append(b.name), replace(a, b)))
    states.save((torch.ones(2),), tmp_path / "x.state")
    assert done == [False, "x.state", True], "the file, its place, the folder that names it"


if __name__ == "__main__":
    {"runs": runs_on_a_full_disk, "states": states_on_a_full_disk}[sys.argv[1]](*map(Path, sys.argv[2:]))
