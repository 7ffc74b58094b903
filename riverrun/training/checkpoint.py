"""Checkpoints of a run: all that is needed to go on to the same bits.

    runs/model/checkpoints/step-00000200/
        config.json, model.safetensors, tokenizer.json      a model like any other
        training.safetensors      the optimizer's memory, the carried state, the random state
        training.json             the step, the clock, the run's settings

A checkpoint appears whole or not at all (`riverrun.disk.replacing`), and older ones go only after it
stands.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from riverrun import disk
from riverrun import state as states
from riverrun.config import from_dict, to_dict
from riverrun.data.tokens import Tokenizer
from riverrun.models.folder import read_json, read_tensors, write, write_tensors
from riverrun.models.language import LanguageModel
from riverrun.state import State

from . import optim
from .settings import TrainConfig

FOLDER, TENSORS, VALUES = "checkpoints", "training.safetensors", "training.json"


@dataclass
class Progress:
    """How far a run has come."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # spent in it, over all resumptions
    corpus: int = 0  # checksum of the tokens it reads


@dataclass
class Training:
    """What changes while a model is trained."""

    model: LanguageModel
    optimizer: torch.optim.Optimizer
    state: State  # one carried state for each part of a step's sequences, or None
    progress: Progress


def save(config: TrainConfig, training: Training, tokenizer: Tokenizer) -> Path:
    """Write a checkpoint, then drop the oldest. Raises OSError when the disk is full; the others are then as
    before."""
    folder = Path(config.out) / FOLDER
    path = folder / f"step-{training.progress.step:08d}"
    carried, skeleton = states.flatten(training.state)
    tensors = {f"optimizer/{k}": v for k, v in optim.moments(training.optimizer, training.model).items()}
    tensors |= {f"state/{k}": v for k, v in carried.items()} | random_state()
    with disk.replacing(path) as fresh:
        write(fresh, training.model, tokenizer)
        values = {
            "progress": asdict(training.progress),
            "config": to_dict(config),
            "skeleton": skeleton,
            "sha256": write_tensors(fresh / TENSORS, tensors),
        }
        disk.write(fresh / VALUES, json.dumps(values, indent=2).encode())
    for old in found(config.out)[: -config.keep]:
        shutil.rmtree(old)
    for broken in folder.glob(".step-*"):  # left by a run that was killed while it wrote
        shutil.rmtree(broken)
    return path


def restore(path: Path, training: Training) -> None:
    """Put everything that `save` wrote back. Raises ValueError for a damaged checkpoint or another
    model's."""
    values = record(path)
    tensors = read_tensors(path / TENSORS, values["sha256"])
    weights = read_tensors(path / "model.safetensors", read_json(path / "config.json").get("sha256"))
    training.model.load_state_dict(weights)
    groups: dict[str, dict[str, Tensor]] = {"optimizer": {}, "state": {}, "random": {}}
    for name, x in tensors.items():
        group, _, key = name.partition("/")
        groups[group][key] = x
    optim.restore(training.optimizer, training.model, groups["optimizer"])
    device = training.model.output.device
    training.state = states.to(states.unflatten(groups["state"], values["skeleton"]), device)
    training.progress = Progress(**values["progress"])
    torch.set_rng_state(groups["random"]["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(groups["random"]["cuda"])


def settings(path: Path) -> TrainConfig:
    """The settings with which a checkpoint's run was started."""
    return from_dict(TrainConfig, record(path)["config"], f"{path / VALUES}: config")


def record(path: Path) -> dict[str, Any]:
    """What a checkpoint keeps as JSON. Raises ValueError when some of it is not there."""
    values = read_json(path / VALUES) if (path / VALUES).is_file() else {}
    if missing := {"progress", "config", "skeleton", "sha256"} - values.keys():
        raise ValueError(
            f"{path} is damaged: its {VALUES} lacks {sorted(missing)}; remove it to go on from an older one"
        )
    return values


def found(out: str | Path) -> list[Path]:
    """A run's checkpoints, oldest first."""
    return sorted((Path(out) / FOLDER).glob("step-*"))


def latest(out: str | Path) -> Path:
    """A run's newest checkpoint. Raises FileNotFoundError when there is none."""
    if not (paths := found(out)):
        run = next((str(parent) for parent in Path(out).parents if found(parent)), None)
        hint = f"give the run's folder, {run}" if run else "there is no run to go on with"
        raise FileNotFoundError(f"no checkpoint in {Path(out) / FOLDER}: {hint}")
    return paths[-1]


def random_state() -> dict[str, Tensor]:
    """PyTorch's generators."""
    values: dict[str, Any] = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        values["random/cuda"] = torch.cuda.get_rng_state()
    return values
