"""The command line: `riverrun train | generate | eval | mixers | bench | doctor`.

Here stand the names, arguments and help of the commands, and nothing that takes long to import; what a
command does is in `riverrun/commands/NAME.py`, imported when it runs. Bad input ends in one red line and exit
code 2, any other error in one red line and exit code 1; `--debug`, anywhere on the line, shows where from.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from riverrun import __version__

BAD_INPUT, FAILED = 2, 1

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def device_known(device: str | None) -> str | None:
    if device is None or device.partition(":")[0] in ("cpu", "cuda"):
        return device
    raise typer.BadParameter(f"'{device}' is neither cpu nor cuda")


Settings = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="settings to change")]
Model = Annotated[Path, typer.Argument(metavar="FOLDER", help="a model, as `riverrun train` leaves it")]
Names = Annotated[list[str] | None, typer.Argument(metavar="NAME", help="all, unless named")]
Width = Annotated[int, typer.Option(min=1, help="model width")]
Device = Annotated[str, typer.Option(callback=device_known, help="cpu or cuda")]


def command(name: str, **arguments: Any) -> None:
    """Import a command's module and run it; what it returns is the exit code, 0 if nothing."""
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # or idle threads of PyTorch and Numba hold each other up
    raise typer.Exit(import_module(f"riverrun.commands.{name}").run(**arguments) or 0)


def version(asked: bool) -> None:
    if asked:
        print(f"riverrun {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show where an error came from")] = False,
) -> None:
    """Sequence models that carry a fixed-size state."""


@app.command()
def train(
    recipe: Annotated[
        str | None, typer.Argument(metavar="RECIPE", help="a recipe's name, a recipe.py or a config.json")
    ] = None,
    settings: Settings = None,
    resume: Annotated[Path | None, typer.Option(help="a run's folder, to go on where it ended")] = None,
) -> None:
    """Train a model: `riverrun train novel steps=1000 optim.lr=3e-4`, or `--resume runs/novel`."""
    command("train", recipe=recipe, settings=settings or [], resume=resume)


@app.command()
def generate(
    folder: Model,
    settings: Settings = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="text; repeat for a batch")
    ] = None,
    file: Annotated[list[Path] | None, typer.Option("--file", "-f", help="a file that is a prompt")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be repeated")] = None,
    state: Annotated[
        Path | None, typer.Option(help="go on from this file if it is there; keep the state in it")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Write text: `riverrun generate runs/novel -p "Anne" max_tokens=500 top_p=0.9 --state anne.state`."""
    command(
        "generate",
        folder=folder,
        settings=settings or [],
        prompts=[*(prompt or []), *(read(path) for path in file or [])],
        stop=stop or [],
        state=state,
        device=device,
    )


@app.command("eval")
def evaluate(
    folder: Model,
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="text files of any length")],
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many bytes of each")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="drop the state after so many tokens")] = None,
    device: Device = "cpu",
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Measure bits per byte of text files, read through the carried state in constant memory."""
    command("eval", folder=folder, files=files, limit=limit, context=context, device=device, json=json)


@app.command()
def mixers(names: Names = None, width: Width = 256) -> None:
    """List the mixers: paper, recurrence, parameters, bytes of state."""
    command("mixers", names=names or [], width=width)


@app.command()
def bench(
    names: Names = None,
    width: Width = 256,
    length: Annotated[int, typer.Option(min=1, help="steps of the sequence")] = 1000,
    device: Device = "cpu",
) -> None:
    """Time mixers on this machine: forward, backward, decoding."""
    command("bench", names=names or [], width=width, length=length, device=device)


@app.command()
def doctor(
    names: Names = None,
    device: Annotated[str | None, typer.Option(callback=device_known, help="a GPU if there is one")] = None,
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="processes at a time; unless given, one a core for a GPU")
    ] = None,
) -> None:
    """Compare every kernel with its definition on this machine."""
    command("doctor", names=names or [], device=device, as_json=json, jobs=jobs)


def read(path: Path) -> str:
    """A prompt's text. Raises FileNotFoundError, and ValueError for a file that is no UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"no prompt file '{path}'")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"'{path}' is not UTF-8 (byte {error.start}); convert it: iconv -f latin1 -t utf-8 {path}"
        ) from error


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit; see the module's docstring for the codes."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    try:
        app([a for a in arguments if a != "--debug"] or ["--help"])
    except Exception as error:  # Ctrl-C, and a reader that leaves, as `head` does, are typer's
        if debug:
            raise
        expected = isinstance(error, ValueError | OSError)
        line = " ".join(str(error).split()) or type(error).__name__
        hint = "" if expected else f" ({type(error).__name__}; --debug shows where)"
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[red]error: {escape(line)}{hint}[/]")
        sys.exit(BAD_INPUT if expected else FAILED)
