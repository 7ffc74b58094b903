"""The page on writing a mixer runs as it stands."""

import re
from pathlib import Path

import pytest

from riverrun.mixers import Row, build
from riverrun.testing.laws import WIDTH, check

PAGE = Path(__file__).parents[1] / "docs" / "own_mixer.md"


def test_own_mixer(capsys):
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(), re.S)
    code = "\n".join(body for kind, body in blocks if kind == "python")
    names: dict = {"__name__": "own_mixer"}
    exec(compile(code, str(PAGE), "exec"), names)
    shown = " ".join(next(body for kind, body in blocks if kind == "text").split())
    printed = " ".join(capsys.readouterr().out.split())
    digits = re.compile(r"[\d.]+e[-+]\d+")  # the error's size depends on the random numbers of this PyTorch
    assert digits.sub("#", printed) == digits.sub("#", shown)
    for name, law in names["laws_for"](names["ROW"]):
        names["test_law"](name, law)


def test_a_claim_that_is_too_modest_is_found():
    row = Row("MinGRU", arxiv="", op="diagonal", breaks={"shape": "it does not"})
    with pytest.raises(AssertionError, match="law 'shape' holds, but the row says: it does not"):
        check(lambda: build("mingru", WIDTH), row)
