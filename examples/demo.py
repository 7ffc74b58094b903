"""Train on five novels, predict a sixth, write a page, and go on from its saved state in a new process.

python examples/demo.py                 five minutes of training on two cores: `make demo`
python examples/demo.py --short         a few steps of a tiny model, to see that everything works
"""

from __future__ import annotations

import argparse
import bz2
import lzma
import math
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table

from riverrun import state as states
from riverrun.commands.train import changed, load
from riverrun.inference import snapshot
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.sampling import Sampling
from riverrun.models import folder
from riverrun.training.loop import Result, train

NOVELS = Path(__file__).parent / "data" / "austen"
HELD_OUT = NOVELS / "persuasion.txt"
LSTM = 2.36  # bits per character of a plain LSTM of 0.88 million parameters, three minutes on one core
PROMPT, PAGE, MORE, SEED = "Anne ", 1_200, 300, 1
TEMPERATURE, TOP_P = 0.8, 0.95
SHORT = ["steps=6", "model.width=48", "data.batch=2", "data.length=64", "evaluation.limit=2000"]


@dataclass(frozen=True)
class Page:
    """What was written."""

    text: str
    more: str  # by a new process, from the saved state
    uninterrupted: bool  # whether that is what one run would have written
    speed: float  # tokens a second
    nbytes: int  # of the state


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a few steps of a tiny model")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="where everything is kept")
    arguments = parser.parse_args()
    console = Console(highlight=False)
    console.print(Rule("1 · train on five novels by Jane Austen"))
    result = trained(arguments.out, arguments.short)
    score = result.score
    assert score is not None  # the recipe names the held-out novel
    characters = len(HELD_OUT.read_bytes()[: score.nbytes].decode())
    bits = score.nats / math.log(2) / characters
    console.print(Rule(f"2 · predict the first {characters:,} characters of the sixth, Persuasion"))
    console.print(
        f"{bits:.3f} bits per character, each predicted from all before it through the carried state"
    )
    console.print(Rule("3 · write a page, and put the state away"))
    written = write(
        result.model, arguments.out / "page.state", *((60, 20) if arguments.short else (PAGE, MORE))
    )
    console.print(Panel(PROMPT + written.text.rstrip(), padding=(1, 2)))
    console.print(Rule("4 · go on from the state, in a new process, without the text"))
    same = "what one run without a break writes" if written.uninterrupted else "NOT what one run writes"
    console.print(Panel(written.more.strip(), padding=(1, 2), subtitle=same))
    console.print(table(bits, characters, result, written))
    for name, path in places(result, arguments.out).items():
        console.print(f"  {name:<12}{path}", soft_wrap=True)
    if not written.uninterrupted:
        sys.exit("the resumed text differs from that of an uninterrupted run")


def trained(out: Path, short: bool) -> Result:
    """A fresh run of the recipe `novel`; an earlier one in the same place is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    result = train(changed(load("novel"), [f"out={out}", *(SHORT if short else [])]))
    if result.interrupted:
        sys.exit(130)
    return result


def write(model_folder: Path, file: Path, size: int, more: int) -> Page:
    """Write `size` tokens and save; a new process writes `more`; compare with one run of both."""
    model, tokenizer = folder.load(model_folder)
    how = Sampling(temperature=TEMPERATURE, top_p=TOP_P)
    run = Generation(model, tokenizer, [PROMPT], Limits(size), how, SEED)
    begun = time.perf_counter()
    text = "".join(new for (new,) in run)
    speed = run.sequences[0].draws / (time.perf_counter() - begun)
    snapshot.save(file, run.sequences, model)
    command = [sys.executable, "-m", "riverrun", "generate", str(model_folder), "--state", str(file)]
    command += [f"max_tokens={more}", f"temperature={TEMPERATURE}", f"top_p={TOP_P}"]
    resumed = subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout.removesuffix(
        "\n"
    )
    one = "".join(new for (new,) in Generation(model, tokenizer, [PROMPT], Limits(size + more), how, SEED))
    return Page(text, resumed, text + resumed == one, speed, states.nbytes(run.sequences[0].state))


def table(bits: float, characters: int, result: Result, written: Page) -> Table:
    """The numbers, beside those of general compressors and of a small LSTM."""
    novels = b"".join(p.read_bytes() for p in sorted(NOVELS.glob("*.txt")))
    made = Table(show_header=False, title="in numbers")
    made.add_column()
    made.add_column(justify="right")
    made.add_row("bits per character", "")
    made.add_row(
        f"  this model, the first {characters:,} characters of Persuasion", f"[bold green]{bits:.2f}[/]"
    )
    made.add_row("  bz2, all six novels in one file", f"{8 * len(bz2.compress(novels)) / len(novels):.2f}")
    made.add_row("  xz, all six novels in one file", f"{8 * len(lzma.compress(novels)) / len(novels):.2f}")
    made.add_row("  a plain LSTM, 3 minutes of training on one core", f"{LSTM:.2f}", end_section=True)
    made.add_row("tokens a second in training", f"{result.tokens / result.seconds:,.0f}")
    made.add_row("tokens a second in writing", f"{written.speed:,.0f}", end_section=True)
    made.add_row("bytes of the state, however much was read", f"{written.nbytes:,}")
    made.add_row("minutes of training, on threads", f"{result.seconds / 60:.1f}, {torch.get_num_threads()}")
    return made


def places(result: Result, out: Path) -> dict[str, Path | None]:
    """Where everything lies."""
    return {
        "loss curve": result.curve,
        "log": out / "log.jsonl",
        "TensorBoard": out / "tensorboard",
        "checkpoint": result.checkpoint,
        "model": result.model,
        "state": out / "page.state",
    }


if __name__ == "__main__":
    main()
