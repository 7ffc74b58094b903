"""Settings: dataclasses filled from `key=value` strings and JSON, typed by their annotations.

    config = override(TrainConfig(), ["steps=1000", "optim.lr=3e-4", "model.mixers.mamba.num_states=8"])

Dots reach into dataclasses and dictionaries. Values are read as the field's annotation says: int, float,
bool, str, Literal, `X | None` (the word none), list and tuple (commas or JSON), dict (JSON, or one key
after a dot). A wrong key or value raises ValueError naming the nearest right key and the accepted type.
"""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from os.path import expanduser
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def override(config: T, settings: Iterable[str]) -> T:
    """A copy of a dataclass with `key=value` settings applied in order."""
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            hint = nearest(setting.strip("= "), keys(config))
            raise ValueError(f"'{setting}' is not of the form key=value; {hint}")
        config = _set(config, key.strip().split("."), value, key.strip())
    return config


def keys(config: Any, prefix: str = "") -> list[str]:
    """Every key that `override` takes, with dots."""
    found: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        inside = dataclasses.is_dataclass(value)
        found += keys(value, f"{prefix}{field.name}.") if inside else [prefix + field.name]
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass, and those inside it, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(cls: type[T], values: dict[str, Any], where: str = "config") -> T:
    """The inverse of `to_dict`. Raises ValueError for unknown and missing fields and wrong types."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}; it must be an object with the fields of {cls.__name__}")
    hints, fields = get_type_hints(cls), {f.name: f for f in dataclasses.fields(cls)}  # type: ignore
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{where} has an unknown field '{name}'; {nearest(name, fields)}")
        given[name] = typed(hints[name], value, f"{where}: {name}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"{where} lacks the field '{name}' ({spell(hints[name])})")
    return cls(**given)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them."""
    known = list(known)
    first = name.partition(".")[0]  # of `mixers.mamba.num_states` the part that is there, in another place
    ends = {k.rpartition(".")[2]: k for k in known}
    near = get_close_matches(name, known, n=1) or [ends[e] for e in get_close_matches(first, ends, n=1)]
    return f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"


def spell(kind: Any) -> str:
    """A type as a reader says it."""
    if kind is Any:
        return "any JSON value"
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(spell(k) for k in get_args(kind))
    if get_origin(kind) is Literal:
        return " or ".join(f"'{v}'" if isinstance(v, str) else str(v) for v in get_args(kind))
    if get_origin(kind) is not None:
        return str(kind).replace("typing.", "")
    return "none" if kind is type(None) else kind.__name__


def _set(config: Any, path: list[str], text: str, key: str) -> Any:
    """`config` with the field at `path` read from `text`."""
    hints = get_type_hints(type(config))
    if path[0] not in hints:
        prefix = key[: len(key) - len(".".join(path))]
        raise ValueError(f"no setting '{key}'; {nearest(key, [prefix + k for k in keys(config)])}")
    kind, value = hints[path[0]], getattr(config, path[0])
    if dataclasses.is_dataclass(value):
        if len(path) == 1:
            inside = ", ".join(f"{key}.{k}" for k in keys(value))
            raise ValueError(f"'{key}' is a group of settings; set one of {inside}")
        new = _set(value, path[1:], text, key)
    elif get_origin(kind) is dict and len(path) > 1:
        new = _set_key(value, kind, path[1:], text, key)
    elif len(path) > 1:
        raise ValueError(f"no setting '{key}'; '{path[0]}' is {spell(kind)} and has nothing inside")
    else:
        new = _read(kind, text, key)
    return dataclasses.replace(config, **{path[0]: new})


def _set_key(values: dict[str, Any], kind: Any, path: list[str], text: str, key: str) -> dict[str, Any]:
    """A copy of a dictionary with one entry, maybe of a dictionary inside it, read from `text`."""
    inner = get_args(kind)[1]
    if len(path) == 1:
        return {**values, path[0]: _read(inner, text, key)}
    if get_origin(inner) is not dict:
        outer = key.removesuffix("." + ".".join(path[1:]))
        raise ValueError(
            f"no setting '{key}': the entries of this dictionary are {spell(inner)}; give the whole entry, "
            f"{outer}='{{\"NAME\": VALUE}}'"
        )
    return {**values, path[0]: _set_key(values.get(path[0], {}), inner, path[1:], text, key)}


def _read(kind: Any, text: str, key: str) -> Any:
    """The value that `text`, typed by hand, means for a field of type `kind`."""
    options = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    if type(None) in options and text.strip().lower() in ("none", "null"):
        return None
    for option in options:
        try:
            return typed(option, _json(option, text), key)
        except ValueError:
            continue
    raise ValueError(f"{key}={text}: '{text}' is not {spell(kind)}")


def _json(kind: Any, text: str) -> Any:
    """`text` as a JSON value, quotes left out where the type makes them needless."""
    if kind is str:  # what a space or a line break means, its reader knows; no shell expands the ~ of key=~/x
        return expanduser(text) if text.startswith("~/") else text
    text = text.strip()
    if get_origin(kind) is Literal:
        return text
    if kind is bool:
        return {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.get(
            text.lower(), text
        )
    if get_origin(kind) in (list, tuple) and not text.startswith("["):
        return [_json(get_args(kind)[0], part.strip()) for part in text.split(",") if part.strip()]
    if kind is int:
        text = text.replace("_", "").replace(",", "")
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return float(text) if kind is float else text


def typed(kind: Any, value: Any, where: str) -> Any:
    """A value, of JSON or of Python, checked against and turned into a field's type: the only place for that.

    Raises ValueError, with `where` it stands, what was given and what is accepted.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return from_dict(kind, value, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        for option in args:
            try:
                return typed(option, value, where)
            except ValueError:
                continue
    elif origin is Literal:
        for option in args:
            if value == option:
                return option
    elif origin in (list, tuple) and isinstance(value, list | tuple):
        if origin is list or args[-1] is Ellipsis or len(value) == len(args):
            return origin(typed(args[0], v, where) for v in value)
    elif origin is dict and isinstance(value, dict):
        return {k: typed(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif kind is type(None) and value is None:
        return None
    elif kind is float:
        if isinstance(value, Real) and not isinstance(value, bool) and value == value:
            return float(value)  # never NaN, with which nothing compares
    elif kind is int and not isinstance(value, bool):
        if isinstance(value, Integral) or (isinstance(value, float) and value.is_integer()):
            return int(value)
    elif isinstance(kind, type) and isinstance(value, kind) and (kind is bool) == isinstance(value, bool):
        return value
    raise ValueError(f"{where} is {value!r}; it must be {spell(kind)}")
