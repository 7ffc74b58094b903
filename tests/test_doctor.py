"""The doctor catches a wrong kernel, remembers it, and ops refuse it until it passes."""

import json
import math
from dataclasses import replace

import pytest
import torch

from riverrun import doctor, ops
from riverrun.commands.doctor import exit_code, report, to_json
from riverrun.kernels import verdicts
from riverrun.recurrences.fold import fold
from riverrun.testing import inputs


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def plant(monkeypatch, name: str, wrong) -> None:
    """Give op `name` a kernel "cpu" that is the definition, then `wrong(y, state) -> (y, state)`."""
    op = ops.OPS[name]

    def run(*args, state, reset):
        return wrong(*fold(op.recurrence, args, state, reset))

    monkeypatch.setitem(op.kernels, "cpu", ops.Kernel(run, "cpu", lambda name, args: None))


def examine(name: str, dtype=torch.float32) -> doctor.Verdict:
    found = doctor.run("cpu", ops=[name], dtypes=[dtype])
    return next(v for v in found if v.impl == "cpu")


class Scaled(torch.autograd.Function):
    """The identity with a gradient that is one part in ten thousand too large."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 1.0001


def last_step_lost(y, state):
    return torch.cat([y[:, :-1], 0 * y[:, -1:]], 1), state


WRONG = {
    "a forward value": lambda y, s: (y * 1.0001, s),
    "a gradient": lambda y, s: (Scaled.apply(y), s),
    "a state's gradient": lambda y, s: (y, Scaled.apply(s)),
    "a lost step": last_step_lost,
    "NaN": lambda y, s: (y * math.nan, s),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_a_planted_mistake_is_caught(mistake, monkeypatch):
    plant(monkeypatch, "delta", WRONG[mistake])
    found = examine("delta")
    assert found.verdict == "fail" and found.error > found.bound
    assert found.where  # the case and the tensor


def test_a_right_kernel_passes_in_every_dtype(monkeypatch):
    plant(monkeypatch, "delta", lambda y, s: (y, s))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert examine("delta", dtype).verdict == "pass"


def test_what_failed_is_refused_until_it_passes(monkeypatch):
    case = inputs.make("delta", "head").to(torch.float32)
    plant(monkeypatch, "delta", WRONG["a forward value"])
    assert ops.explain("delta", *case.args) == "delta: cpu runs"  # unknown is allowed
    found = examine("delta")
    with pytest.raises(ValueError, match="the doctor found it wrong") as caught:
        ops.delta(*case.args, impl="cpu")
    assert found.line in str(caught.value)
    assert "delta: chunk runs" in ops.explain("delta", *case.args)  # the next one is taken, and said so
    ops.delta(*case.to(torch.float64).args, impl="cpu")  # other dtypes were not examined

    plant(monkeypatch, "delta", lambda y, s: (y, s))
    assert examine("delta").verdict == "pass"
    ops.delta(*case.args, impl="cpu")


def test_a_crash_is_a_finding(monkeypatch):
    def crash(y, s):
        raise RuntimeError("no code for this chip")

    plant(monkeypatch, "softmax", crash)
    found = examine("softmax")
    assert found.verdict == "fail" and "no code for this chip" in found.where


def test_what_breaks_the_device_is_found_and_the_others_are_not_blamed(monkeypatch):
    plant(monkeypatch, "softmax", lambda y, s: (y.no_such_thing, s))
    monkeypatch.setattr(doctor, "gone", lambda device: True)
    found = doctor.run("cpu", ops=["softmax"], dtypes=[torch.float32], remember=False)
    assert {v.impl: v.verdict for v in found} == {"cpu": "fail", "scan": "cannot", "sequential": "cannot"}
    assert all("cpu broke the device" in v.where for v in found if v.impl != "cpu")


def test_a_process_that_ends_early_is_a_finding():
    (found,) = doctor.apart(("softmax", torch.float32), "cuda:99", None)  # which no machine has
    assert found.impl == "gpu" and found.verdict == "fail" and "ended with code 1" in found.where


def test_another_machine_knows_nothing(monkeypatch):
    plant(monkeypatch, "softmax", lambda y, s: (y * 2, s))
    examine("softmax")
    monkeypatch.setattr(verdicts, "machine", lambda device: "another")
    case = inputs.make("softmax", "head").to(torch.float32)
    ops.softmax(*case.args, impl="cpu")


def test_a_damaged_file_says_so():
    verdicts.record("cpu", {})
    verdicts.path().write_text("{")
    verdicts._read.cache_clear()
    with pytest.raises(ValueError, match="delete it"):
        ops.diagonal(torch.ones(1, 2, 3), torch.ones(1, 2, 3))


def test_report_json_and_exit_code(monkeypatch):
    plant(monkeypatch, "softmax", lambda y, s: (y * 2, s))
    found = doctor.run("cpu", ops=["softmax"], dtypes=[torch.float32], remember=False)
    assert not verdicts.path().exists()
    assert exit_code(found) == 1
    assert exit_code([v for v in found if v.impl != "cpu"]) == 0
    assert {v["impl"]: v["verdict"] for v in json.loads(to_json(found))} == {
        "cpu": "fail",
        "scan": "pass",
        "sequential": "pass",
    }
    assert "2 pass, 1 fail, 0 cannot" in report(found, "cpu")


def test_compiled_code_sees_the_refusal(monkeypatch):
    case = inputs.make("softmax", "head", replace(inputs.SMALL, T=3), state=False).to(torch.float32)
    expected, _ = ops.softmax(*case.args, reset=case.reset)
    verdicts.record("cpu", {"softmax scan float32": "softmax scan float32: error 1, bound 0, y"})
    run = torch.compile(lambda *a: ops.softmax(*a, reset=case.reset)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(run(*case.args), expected)


@pytest.mark.parametrize("op", inputs.FORMS)
def test_every_implementation_on_this_machine(op):
    """The rounding of float32 is where a mistake cannot hide; the command examines the other dtypes too."""
    for found in doctor.run("cpu", ops=[op], dtypes=[torch.float32], remember=False):
        assert found.verdict == "pass", found.line


def test_several_processes_find_what_one_finds():
    which = dict(ops=["diagonal", "softmax"], dtypes=[torch.float64], impls=["sequential"], remember=False)
    one, two = (
        [(v.op, v.error, v.bound, v.verdict) for v in doctor.run("cpu", jobs=jobs, **which)]
        for jobs in (None, 2)
    )
    assert one == two and len(one) == 2
    with pytest.raises(ValueError, match="at least 1"):
        doctor.run("cpu", jobs=0)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no op 'dleta'; did you mean 'delta'"):
        doctor.run("cpu", ops=["outer", "dleta"])
    with pytest.raises(ValueError, match=r"no op 'x'; there are .*, outer"):
        doctor.run("cpu", ops=["x"])
    with pytest.raises(ValueError, match="no form"):
        inputs.make("outer", "sideways")
