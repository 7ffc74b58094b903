"""`riverrun mixers`: the table of mixers, with what each costs at a width."""

from __future__ import annotations

import sys

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from riverrun import ops
from riverrun import state as states
from riverrun.mixers import MIXERS, build, row

STEPS = 1000  # after which a state that depends on the number of steps is measured


def run(names: list[str], width: int) -> None:
    """Print one line a mixer; nothing is compiled for it."""
    title = f"mixers at width {width}, with their default arguments"
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for title in ("mixer", "class", "arXiv", "op", "state"):
        table.add_column(title, no_wrap=True)
    for title in ("parameters", "state bytes"):
        table.add_column(title, justify="right", no_wrap=True)
    for name in names or MIXERS:
        about = row(name)
        kind = about.state if about.causal else f"{about.state}, not causal"
        parameters, size = costs(name, width)
        table.add_row(
            name, about.cls, about.arxiv or "-", about.op or "-", kind, f"{parameters:,}", f"{size:,}"
        )
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    console.print(
        f"[dim]State bytes: one sequence, float32; where they depend on the length, after {STEPS:,} steps.[/]"
    )


@torch.no_grad()
def costs(name: str, width: int) -> tuple[int, int]:
    """The number of parameters of a mixer, and the bytes of one sequence's state."""
    try:
        mixer = build(name, width)
    except ValueError as error:
        raise ValueError(
            f"'{name}' at width {width}: {error}. Name the mixers to print, or another width"
        ) from error
    steps = 1 if row(name).state == "constant" else STEPS
    with ops.forced(**dict.fromkeys(ops.OPS, "sequential")):
        _, state = mixer(torch.zeros(1, steps, width))
    return sum(p.numel() for p in mixer.parameters()), states.nbytes(state)
