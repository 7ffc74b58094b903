"""`riverrun train`: a run from a recipe, a config.json or settings alone; or one that goes on."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from rich.console import Console

import riverrun
from riverrun.config import from_dict, nearest, override
from riverrun.models.folder import read_json
from riverrun.training import checkpoint
from riverrun.training.loop import train
from riverrun.training.settings import TrainConfig

RECIPES = Path("recipes"), Path(riverrun.__file__).parents[1] / "recipes"  # here, and in the clone
INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended: 128 + SIGINT


def run(recipe: str | None, settings: list[str], resume: Path | None) -> int:
    """Train, and say where everything lies."""
    if recipe is not None and "=" in recipe:  # no recipe was given: it is the first setting
        settings, recipe = [recipe, *settings], None
    if recipe is None and (late := next((s for s in settings if "=" not in s), None)):
        raise ValueError(f"'{late}' is not of the form key=value; a recipe stands before the settings")
    if resume is not None and recipe is not None:
        raise ValueError(
            f"recipe '{recipe}' and --resume {resume}: a resumed run has settings; give one of them"
        )
    if resume is not None:
        config = replace(checkpoint.settings(checkpoint.latest(resume)), out=str(resume))
    else:
        config = TrainConfig() if recipe is None else load(recipe)
    result = train(changed(config, settings), resume=resume is not None)
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"model       {result.model}")
    console.print(f"checkpoint  {result.checkpoint}")
    console.print(f"log         {result.model.parent / 'log.jsonl'}, {result.model.parent / 'tensorboard'}")
    if result.curve is not None:
        console.print(f"loss curve  {result.curve}")
    return INTERRUPTED if result.interrupted else 0


def changed(config: TrainConfig, settings: list[str]) -> TrainConfig:
    """`key=value` settings applied; a budget among them, steps or minutes, replaces that of the config."""
    budget = [s for s in settings if s.partition("=")[0] in ("steps", "minutes")]
    if budget:
        given = override(TrainConfig(), budget)
        config = replace(config, steps=given.steps, minutes=given.minutes)
    return override(config, [s for s in settings if s not in budget])


def load(recipe: str) -> TrainConfig:
    """The settings in a recipe, given by name or by file, or in a JSON file."""
    path = Path(recipe)
    if path.suffix == ".json":
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}")
        return from_dict(TrainConfig, read_json(path), str(path))
    if path.suffix != ".py":
        found = [folder / f"{recipe}.py" for folder in RECIPES if (folder / f"{recipe}.py").is_file()]
        known = sorted({p.stem for folder in RECIPES for p in folder.glob("[!_]*.py")})
        if not found:
            raise ValueError(f"no recipe '{recipe}'; {nearest(recipe, known)}")
        path = found[0]
    return execute(path)


def execute(path: Path) -> TrainConfig:
    """What the function `config` of a recipe returns."""
    spec = spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"no recipe {path}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    make = getattr(module, "config", None)
    made = make() if callable(make) else None
    if not isinstance(made, TrainConfig):
        raise ValueError(f"{path} is no recipe: it must have a function config() that returns a TrainConfig")
    return made
