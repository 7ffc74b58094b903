"""Settings: `key=value` and JSON, read as the types of a dataclass say."""

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from riverrun.config import from_dict, keys, override, to_dict


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["cosine", "stable"] = "cosine"
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclass(frozen=True)
class Settings:
    name: str
    steps: int | None = None
    loud: bool = False
    files: tuple[str, ...] = ()
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_settings_are_read_as_their_types_say():
    config = override(
        Settings("x"),
        ["name=7", "steps=1e3", "loud=yes", "files=a.txt,b.txt", "inner.rate=3", "inner.kind=stable",
         "inner.betas=0.8,0.9", "mixers.mamba.num_states=4", "mixers.mamba.bias=true"],
    )  # fmt: skip
    assert config == Settings(
        "7", 1000, True, ("a.txt", "b.txt"), {"mamba": {"num_states": 4, "bias": True}},
        Inner(3.0, "stable", (0.8, 0.9)),
    )  # fmt: skip
    assert override(config, ["inner.rate=.5"]).inner.rate == 0.5
    assert override(config, ['files=["a,b.txt"]', "inner.betas=[0.1, 1]"]).files == ("a,b.txt",)
    assert {override(config, [f"steps={text}"]).steps for text in ("1_000", "1,000", "1000")} == {1000}
    assert override(config, ["steps=none"]).steps is None and override(config, ["steps= None "]).steps is None
    assert from_dict(Settings, to_dict(config)) == config
    assert "inner.rate" in keys(config)


def test_spaces_belong_to_text_and_to_nothing_else(monkeypatch):
    monkeypatch.setenv("HOME", "/home/anne")
    assert override(Settings("x"), ["name=\n\n"]).name == "\n\n", "what may divide documents"
    assert override(Settings("x"), ["name=~/books"]).name == "/home/anne/books", "which no shell does here"
    assert override(Settings("x"), ["name=a~/b", "files=~/a, ~b"]) == Settings(
        "a~/b", files=("/home/anne/a", "~b")
    )
    spaced = override(
        Settings("x"), [" steps = 3", "inner.kind= stable ", "loud= no", "inner.betas= 0.1, 0.2"]
    )
    assert spaced == Settings("x", 3, inner=Inner(kind="stable", betas=(0.1, 0.2)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("step=3", "no setting 'step'; did you mean 'steps'"),
        ("rate=3", r"did you mean 'inner\.rate'"),
        ("rates.low=3", r"no setting 'rates\.low'; did you mean 'inner\.rate'"),
        ("mixer.mamba.num_states=3", "did you mean 'mixers'"),
        ("inner.rat=3", r"did you mean 'inner\.rate'"),
        ("steps=soon", "'soon' is not int or none"),
        ("steps=1.5", "not int or none"),
        ("inner.kind=linear", "not 'cosine' or 'stable'"),
        ("loud=loudly", "not bool"),
        ("inner=3", "group of settings"),
        ("inner.rate=nan", "'nan' is not float"),
        ("name.x=3", "has nothing inside"),
        ("nme", r"not of the form key=value; did you mean 'name'"),
        ("=3", r"not of the form key=value; there are name, steps"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        override(Settings("x"), [setting])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "lacks the field 'name'"),
        ({"name": "x", "step": 1}, "unknown field 'step'; did you mean 'steps'"),
        ({"name": "x", "inner": {"rates": 1}}, "inner has an unknown field 'rates'"),
        ({"name": 3}, "name is 3; it must be str"),
        ({"name": "x", "loud": 1}, "loud is 1; it must be bool"),
        ({"name": "x", "steps": True}, "steps is True; it must be int or none"),
        ({"name": "x", "inner": {"rate": True}}, "rate is True; it must be float"),
        ({"name": "x", "inner": 3}, "inner is 3; it must be an object with the fields of Inner"),
        ([], "must be an object"),
    ],
)
def test_wrong_json_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Settings, values)
