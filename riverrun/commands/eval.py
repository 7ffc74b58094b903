"""`riverrun eval`: bits per byte of text files, each read once through the carried state."""

from __future__ import annotations

import json as encoder
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from riverrun.models import folder as folders
from riverrun.training.evaluate import Score, check, evaluate, legible, readable


def run(
    folder: Path, files: list[Path], limit: int | None, context: int | None, device: str, json: bool
) -> None:
    """Print one line a file, or one JSON object for all of them."""
    for file in files:
        readable(file)
    model, tokenizer = folders.load(folder, device)
    check(model, context)
    for file in files:
        legible(file, tokenizer, limit)
    scores = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[bits]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for file in files:
            size = min(file.stat().st_size, limit or file.stat().st_size)
            task = progress.add_task(str(file), total=size, bits="")

            def told(done: int, bits: float, task=task) -> None:
                progress.update(task, completed=done, bits=f"{bits:.3f} bits per byte")

            scores[str(file)] = evaluate(model, tokenizer, file, limit, context, progress=told)
    if json:
        print(encoder.dumps({file: record(score) for file, score in scores.items()}, indent=1))
    else:
        Console().print(table(scores))


def record(score: Score) -> dict[str, float]:
    return {
        "bits_per_byte": score.bits_per_byte,
        "bytes": score.nbytes,
        "tokens": score.tokens,
        "tokens_per_second": score.tokens / score.seconds,
    }


def table(scores: dict[str, Score]) -> Table:
    made = Table()
    for title in ("file", "bits per byte", "bytes", "tokens", "tokens / s"):
        made.add_column(title, justify="left" if title == "file" else "right")
    for file, s in scores.items():
        made.add_row(
            file, f"{s.bits_per_byte:.4f}", f"{s.nbytes:,}", f"{s.tokens:,}", f"{s.tokens / s.seconds:,.0f}"
        )
    return made
