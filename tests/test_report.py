"""What a run shows and what it leaves to look at: lines, a bar, a log, a curve."""

import io

import torch
from rich.console import Console
from torch.utils import tensorboard

from riverrun.training.log import CURVE, Log, curve, rows
from riverrun.training.report import Numbers, Report, clock, memory


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


def test_tensorboard_drops_what_came_after_the_checkpoint(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(tensorboard, "SummaryWriter", lambda folder, purge_step: given.append(purge_step))
    Log(tmp_path)
    Log(tmp_path, step=2)
    assert given == [None, 3]
