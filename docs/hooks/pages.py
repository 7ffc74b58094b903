"""The parts of the pages that are printed from the code, so that they cannot go stale: a marker in a source,
`<!-- print: NAME -->`, is replaced when the site is built.

    mixers      a table of every row of MIXERS, then each with its equations, state and golden numbers
    laws        every law's sentence, and which mixers do not keep it
    recurrences the equations of every recurrence that an op stands on, from its module's docstring
    ops         every op with its arguments' axes and its implementations
    settings    every setting of a training run with its default
    cli         what `riverrun --help` and each command's --help print
    results     the tables of benchmarks/results
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from functools import reduce
from importlib import import_module
from pathlib import Path

import torch
from typer.main import get_command
from typer.testing import CliRunner

from riverrun import ops as op_module
from riverrun import state as states
from riverrun.cli import app
from riverrun.config import keys
from riverrun.mixers import MIXERS, Row, build, mixer_class
from riverrun.ops import OPS
from riverrun.testing.laws import LAWS
from riverrun.training.settings import TrainConfig

ROOT = Path(__file__).parents[2]
WIDTH = 256  # the model width at which states are measured
LINE = 88  # characters of code that fit a line of the page
SIZE = {"constant": "constant", "window": "at most a window", "grows": "grows with T", "none": "none"}


def paper(arxiv: str) -> str:
    return f"[arXiv:{arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else "older than arXiv"


@torch.no_grad()
def state_bytes(name: str, row: Row) -> str:
    """What one sequence costs to remember, in float32 with the mixer's own defaults: measured."""
    if row.state == "none":
        return "0"
    lengths = (1,) if row.state == "constant" else (64, 1024)
    mixer, sizes = build(name, WIDTH), []
    with op_module.forced(**dict.fromkeys(OPS, "sequential")):  # which compiles nothing
        for T in lengths:
            sizes.append(f"{states.nbytes(mixer(torch.zeros(1, T, WIDTH))[1]):,}")
    return sizes[0] if len(set(sizes)) == 1 else f"{sizes[0]} after 64 steps, {sizes[1]} after 1,024"


def golden(row: Row) -> str:
    if row.golden.endswith(".safetensors"):
        return f"an independent implementation's, in `tests/golden/{row.golden}`"
    return row.golden or "none"


def signature(cls: type) -> str:
    """The constructor's call, on one line if it fits the page, else one argument a line."""
    parameters = inspect.signature(cls).parameters.values()
    given = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    line = f"{cls.__name__}({', '.join(given)})"
    return line if len(line) <= LINE else f"{cls.__name__}(\n    " + ",\n    ".join(given) + ",\n)"


def mixers() -> Iterator[str]:
    measured = {name: state_bytes(name, row) for name, row in MIXERS.items()}
    yield f"| name | stands on | state | bytes at width {WIDTH} | paper |\n|---|---|---|---|---|"
    for name, row in MIXERS.items():
        op = f"[`{row.op}`](ops.md#{row.op})" if row.op else "PyTorch"
        yield f"| [`{name}`](#{name}) | {op} | {SIZE[row.state]} | {measured[name]} | {paper(row.arxiv)} |"
    for name, row in MIXERS.items():
        cls = mixer_class(name)
        yield f"\n## {name} {{ #{name} }}\n"
        yield inspect.getdoc(import_module(f"riverrun.mixers.{name}")) or ""
        yield f"\n{inspect.getdoc(cls)}\n"
        yield f"```py\nfrom riverrun.mixers.{name} import {cls.__name__}\n\n{signature(cls)}\n```\n"
        yield f"- Good at {row.good}; bad at {row.bad}."
        yield f"- State of one sequence at width {WIDTH} in float32: {measured[name]} bytes"
        yield f"- Golden numbers: {golden(row)}"
        if row.slow:
            yield f"- More than three times as slow as its op alone: {row.slow}"
        for law, why in row.breaks.items():
            yield f"- Does not keep the law [{law}](laws.md#{law}): {why}"


def laws() -> Iterator[str]:
    for name, law in LAWS.items():
        yield f"\n## {name} {{ #{name} }}\n\n{inspect.getdoc(law)}\n"
        for mixer, row in MIXERS.items():
            if name in row.breaks:
                yield f"- [`{mixer}`](mixers.md#{mixer}) does not keep it: {row.breaks[name]}"


def source(op: op_module.Op) -> str:
    """The file in riverrun/recurrences that an op stands on; the cells share one."""
    step = op.recurrence.step
    return getattr(step, "func", step).__module__.rpartition(".")[2]  # a partial has its function's


def about(file: str) -> str:
    return inspect.getdoc(import_module(f"riverrun.recurrences.{file}")) or ""


def recurrences() -> Iterator[str]:
    for file in dict.fromkeys(map(source, OPS.values())):
        yield f"\n## {file} {{ #{file} }}\n\n{about(file)}\n"


def ops() -> Iterator[str]:
    for name, op in OPS.items():
        r, file = op.recurrence, source(op)
        first = " ".join(about(file).split("\n\n")[0].split())
        yield f"\n## {name} {{ #{name} }}\n\n{first} [Its equation](recurrences.md#{file}).\n"
        yield f"```py\ny, state = ops.{name}({', '.join(r.args)}, state=None, reset=None)\n```\n"
        yield "| | axes | |\n|---|---|---|"
        for arg, axes in r.args.items():
            maybe = "may be left out" if axes.endswith("?") else ""
            yield f"| `{arg}` | {axes.rstrip(' ?').replace('|', 'or')} | {maybe} |"
        state = ", ".join(f"({axes})" for axes in (r.state if isinstance(r.state, tuple) else (r.state,)))
        yield f"| returned `y` | {r.y} | dtype of `{r.like}` |\n| `state` | {state} | float32 or wider |"
        yield f"\nImplementations, the preferred one first: {', '.join(f'`{i}`' for i in op.impls)}.\n"


def settings() -> Iterator[str]:
    config = TrainConfig()
    yield "| key | default |\n|---|---|"
    for key in keys(config):
        value = reduce(getattr, key.split("."), config)
        yield f"| `{key}` | `{'none' if value is None else value}` |"


def cli() -> Iterator[str]:
    runner = CliRunner(env={"COLUMNS": "96", "NO_COLOR": "1", "TERM": "dumb"})
    for command in ("", *get_command(app).list_commands(None)):
        yield f"\n## riverrun {command}\n\n```text"
        yield runner.invoke(app, [*command.split(), "--help"], prog_name="riverrun").output.strip("\n")
        yield "```"


def results() -> Iterator[str]:
    """They name each other as files; here they are headings of one page."""
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        text = re.sub(r"^#", "##", file.read_text(encoding="utf-8"), flags=re.M)
        text = text.replace("\n", f" {{ #{file.stem} }}\n", 1)
        yield re.sub(r"\]\((\w+)\.md\)", r"](#\1)", text) + "\n"


PRINTERS: tuple[Callable[[], Iterator[str]], ...] = (mixers, laws, recurrences, ops, settings, cli, results)
PRINT = {printer.__name__: printer for printer in PRINTERS}


def on_page_markdown(markdown: str, **_: object) -> str:
    """MkDocs calls this with every page's source."""
    return re.sub(r"<!-- print: (\w+) -->", lambda marker: "\n".join(PRINT[marker[1]]()), markdown)


def on_page_content(html: str, **_: object) -> str:
    """MkDocs calls this with every page's HTML. Bare arXiv numbers become links."""
    link = r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>'
    return re.sub(r'(?<!\d">)\barXiv:(\d{4}\.\d{4,5})', link, html)
