"""What `riverrun doctor` found on this machine. The doctor writes it; ops read it and refuse what failed.

One JSON file, $XDG_CACHE_HOME/riverrun/doctor.json (~/.cache by default): machine -> "op impl dtype" -> the
doctor's line of a failure, or null for a pass. A machine is a device with the versions of what compiled for
it, so after an upgrade there are no verdicts: unknown is allowed, failed is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from llvmlite import binding as llvm

from riverrun import __version__

_ignored = False  # inside `ignored`
_recorded = 0  # how often verdicts were written


def path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "riverrun" / "doctor.json"


@cache
def machine(device: str) -> str:
    """The chip behind `device` ("cpu", "cuda:0") and the versions of what compiles and runs kernels on it."""
    if torch.device(device).type == "cuda":
        chip, compiler = torch.cuda.get_device_name(device), "triton"
    else:
        chip, compiler = llvm.get_host_cpu_name(), "numba"
    try:
        compiled = f"{compiler} {version(compiler)}"
    except PackageNotFoundError:
        compiled = f"no {compiler}"
    return f"{chip} | torch {torch.__version__} | {compiled} | riverrun {__version__}"


def key(op: str, impl: str, dtype: torch.dtype) -> str:
    return f"{op} {impl} {str(dtype).removeprefix('torch.')}"


@cache
def _read(file: str) -> dict[str, dict[str, str | None]]:
    if not Path(file).is_file():
        return {}
    try:
        return json.loads(Path(file).read_text())
    except ValueError as error:
        raise ValueError(
            f"{file}, where the doctor keeps its verdicts, is damaged ({error}); delete it"
        ) from error


def edition() -> tuple[bool, str | None, int]:
    """Equal as long as `failure` gives the same answers."""
    return _ignored, os.environ.get("XDG_CACHE_HOME"), _recorded


# verdicts do not change while a program runs, so a compiled graph may take the answer for a constant
@torch.compiler.assume_constant_result
def failure(op: str, impl: str, dtype: torch.dtype, device: str) -> str | None:
    """Why `impl` must not run `op` in `dtype` on `device`: the doctor's line, or None if it did not fail."""
    return None if _ignored else _failure(op, impl, dtype, device, os.environ.get("XDG_CACHE_HOME"))


@cache  # asked at every call of an op
def _failure(op: str, impl: str, dtype: torch.dtype, device: str, cache_home: str | None) -> str | None:
    line = _read(str(path())).get(machine(device), {}).get(key(op, impl, dtype))
    if line is None:
        return None
    return f"the doctor found it wrong on this machine: '{line}'. `riverrun doctor` tries it again"


def record(device: str, lines: dict[str, str | None]) -> Path:
    """Remember verdicts, `key(...)` -> a failure's line or None, beside those of other ops; the file."""
    global _recorded
    file = path()
    known = dict(_read(str(file)))
    known[machine(device)] = {**known.get(machine(device), {}), **lines}
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.with_suffix(f".{os.getpid()}")
    whole.write_text(json.dumps(known, indent=1))
    whole.replace(file)  # a program that reads it meanwhile sees the old file or the new one
    _read.cache_clear()
    _failure.cache_clear()
    _recorded += 1
    return file


@contextmanager
def ignored() -> Iterator[None]:
    """Inside, nothing is refused for a verdict: how the doctor tries again what failed."""
    global _ignored
    before, _ignored = _ignored, True
    try:
        yield
    finally:
        _ignored = before
