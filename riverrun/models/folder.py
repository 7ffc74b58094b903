"""A model on disk: a folder with config.json, model.safetensors and tokenizer.json, none of it ever executed.

    save("my-model", model, tokenizer)
    model, tokenizer = load("my-model")

A folder appears whole or not at all (`riverrun.disk.replacing`).
config.json holds the SHA-256 of the weights, so that a damaged file is refused and not trusted.
"""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from riverrun import __version__, disk
from riverrun.config import from_dict, to_dict
from riverrun.data import tokens
from riverrun.data.tokens import Tokenizer

from .device import available
from .language import LanguageConfig, LanguageModel

CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"


def save(folder: str | Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write a model and its tokenizer; what was there stays until all is written."""
    with disk.replacing(folder) as fresh:
        write(fresh, model, tokenizer)


def load(folder: str | Path, device: str | torch.device = "cpu") -> tuple[LanguageModel, Tokenizer]:
    """Read what `save` wrote. FileNotFoundError and ValueError say what is damaged or does not fit."""
    folder, device = Path(folder), available(device)
    if not (folder / CONFIG).is_file():
        inside = sorted(str(p.parent) for p in folder.glob(f"**/{CONFIG}"))
        hint = f"; there is one in {inside[-1]}" if inside else ""
        raise FileNotFoundError(f"no model in '{folder}': it has no {CONFIG}{hint}")
    values = read_json(folder / CONFIG)
    by = values.get("riverrun", __version__)
    version = "" if by == __version__ else f" (of riverrun {by}, this is {__version__})"
    config = from_dict(LanguageConfig, values.get("model", {}), f"{folder / CONFIG}{version}: model")
    weights = read_tensors(folder / WEIGHTS, values.get("sha256"))
    tokenizer = tokens.load(folder / TOKENIZER)
    fits(config, tokenizer)
    try:
        model = LanguageModel(config).to(device)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}{version}: {error}") from error
    kinds = {x.dtype for x in weights.values() if x.is_floating_point()}
    if len(kinds) == 1:
        model.to(kinds.pop())
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{folder / WEIGHTS} does not hold the model of {CONFIG}: {error}") from error
    return model, tokenizer


def fits(config: LanguageConfig, tokenizer: Tokenizer) -> None:
    """Raise ValueError unless a model's vocabulary is the tokenizer's."""
    if config.vocabulary != tokenizer.size:
        raise ValueError(
            f"the model has a vocabulary of {config.vocabulary}, the tokenizer ({tokenizer.kind}) of "
            f"{tokenizer.size}: "
            "they do not belong together"
        )


def write(folder: Path, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """The three files, into a folder that exists."""
    fits(model.config, tokenizer)
    digest = write_tensors(folder / WEIGHTS, model.state_dict())
    values = {"riverrun": __version__, "model": to_dict(model.config), "sha256": digest}
    disk.write(folder / TOKENIZER, json.dumps(tokenizer.to_json()).encode())
    disk.write(folder / CONFIG, json.dumps(values, indent=2).encode())


def write_tensors(path: Path, values: dict[str, Tensor]) -> str:
    """Write tensors as safetensors; the SHA-256 of the file."""
    data = safetensors.torch.save({name: x.detach().contiguous().cpu() for name, x in values.items()})
    disk.write(path, data)
    return sha256(data).hexdigest()


def read_tensors(path: Path, digest: str | None) -> dict[str, Tensor]:
    """Read safetensors. Raises ValueError unless the file is whole and has this SHA-256."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if digest is None:
        raise ValueError(f"the {CONFIG} beside {path} lacks the field 'sha256' of the weights")
    data = path.read_bytes()
    if sha256(data).hexdigest() != digest:
        raise ValueError(
            f"{path} is damaged: its {len(data)} bytes are not those that were written (SHA-256 differs); "
            "copy it again, or take another checkpoint"
        )
    return safetensors.torch.load(data)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises ValueError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds {type(values).__name__}; it must hold an object")
    return values
