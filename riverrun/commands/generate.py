"""`riverrun generate`: text to the terminal as it is drawn, and a state on disk to go on from."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.rule import Rule

from riverrun import state as states
from riverrun.config import override
from riverrun.data.tokens import Tokenizer
from riverrun.inference import snapshot
from riverrun.inference.compiled import Compiled
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.sampling import Sampling
from riverrun.models import folder as folders
from riverrun.models.language import LanguageModel

INTERRUPTED = 130  # the exit code of a process that Ctrl-C ended: 128 + SIGINT


@dataclass(frozen=True)
class Settings(Sampling):
    """What `key=value` changes: how tokens are drawn, and the following."""

    max_tokens: int = 200
    piece: int = 1024  # tokens of a prompt that are read at once
    graph: bool | None = None  # record a step on a GPU and replay it; none: where that can be
    seed: int | None = None  # none: that of the state file, or 0
    samples: int = 1  # texts for each prompt, with seeds that count up from `seed`
    special: Literal["refuse", "read", "text"] = "refuse"  # what "<|...|>" in a prompt is
    start: str | None = None  # a state file to begin with, which is only read; `--state` is where to keep one
    compile: bool = False  # make machine code of a step first: some seconds, then several times the speed


def run(
    folder: Path, settings: list[str], prompts: list[str], stop: list[str], state: Path | None, device: str
) -> int:
    """Write text to standard output, and what is to be said about it to standard error."""
    chosen = override(Settings(), settings)
    limits = Limits(chosen.max_tokens, tuple(stop), chosen.piece, chosen.graph)
    source = begun_from(chosen, state, prompts)
    resumed = source is not None
    model, tokenizer = folders.load(folder, device)
    engine = Compiled(model) if chosen.compile else None
    generation = Generation(
        model,
        tokenizer,
        tokenized(tokenizer, prompts, chosen, resumed),
        limits,
        chosen,
        None if resumed and chosen.seed is None else seeds(chosen, max(1, len(prompts))),
        None if source is None else snapshot.load(source, model),
        engine,
    )
    notes = Console(stderr=True, highlight=False)
    before, begun = sum(s.draws for s in generation.sequences), time.perf_counter()
    interrupted = show(generation, prompts * chosen.samples, notes)
    seconds = time.perf_counter() - begun
    drawn = sum(s.draws for s in generation.sequences) - before
    kept = ""
    if state is not None:
        keep(state, generation, model)
        kept = f", saved; `--state {state}` goes on from it"
    notes.print(f"[dim]{summary(generation, drawn, seconds, interrupted)}{kept}[/]", soft_wrap=True)
    return INTERRUPTED if interrupted else 0


def begun_from(chosen: Settings, state: Path | None, prompts: list[str]) -> Path | None:
    """The state file to go on from, None without one. Raises unless the new state can be kept in `state`."""
    if state is not None and (state.is_dir() or not state.parent.is_dir()):
        raise FileNotFoundError(
            f"--state '{state}' names no file in a folder that exists: the state could not be kept there"
        )
    if state is not None and not os.access(state.parent, os.W_OK):
        raise PermissionError(f"--state '{state}': its folder may not be written to; name a file elsewhere")
    if chosen.start is not None and state is not None and state.is_file():
        raise ValueError(
            f"start={chosen.start} and --state {state} are both there to begin with; leave out start= to go "
            "on from --state, or name a new file for --state"
        )
    source = Path(chosen.start) if chosen.start is not None else state
    found = source is not None and source.is_file()
    if source is not None and not found and (chosen.start is not None or not prompts):
        hint = "" if chosen.start is not None else "; give a --prompt to begin one there"
        raise FileNotFoundError(f"no state file '{source}' to go on from{hint}")
    if chosen.samples < 1 or (found and chosen.samples > 1):
        raise ValueError(
            f"samples={chosen.samples}; it must be at least 1, and 1 when a state is gone on with"
        )
    return source if found else None


def keep(state: Path, generation: Generation, model: LanguageModel) -> None:
    """Write the state. Raises OSError, which says how to come by it again, when it cannot be written."""
    try:
        snapshot.save(state, generation.sequences, model)
    except OSError as error:
        raise OSError(
            f"{error.strerror or error}: no state was kept in '{state}', and what was there is as it was. "
            "Make room, or name another file: the same command then writes the same text"
        ) from error


def tokenized(
    tokenizer: Tokenizer, prompts: list[str], chosen: Settings, resumed: bool
) -> list[list[int]] | None:
    """Every prompt as tokens, once for each sample; None where a saved state goes on without any."""
    if resumed and not prompts:
        return None
    return [tokenizer.prompt(p, chosen.special) for p in prompts or [""]] * chosen.samples


def seeds(chosen: Settings, prompts: int) -> list[int]:
    """A seed for each sequence, the same for the same sample of each prompt."""
    return [(chosen.seed or 0) + i for i in range(chosen.samples) for _ in range(prompts)]


def show(generation: Generation, prompts: list[str], notes: Console) -> bool:
    """Print the run; True if Ctrl-C ended it. A single sequence is printed as it comes, more at the end."""
    single = len(generation.sequences) == 1
    echo = prompts if sys.stdout.isatty() else []
    texts = list(echo) or [""] * len(generation.sequences)
    if single:
        print(texts[0], end="", flush=True)
    with interruption() as interrupted:
        for new in generation:
            if single:
                print(new[0], end="", flush=True)
            else:
                texts = [text + more for text, more in zip(texts, new, strict=True)]
            if interrupted:
                break
    if single:
        print()
    else:
        for number, text in enumerate(texts, 1):
            notes.print(Rule(str(number), style="dim"))
            print(text, flush=True)
    return bool(interrupted)


@contextmanager
def interruption() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to, so that the step under way is finished; a second one is not held back."""
    caught: list[int] = []

    def note(number: int, frame: object) -> None:
        caught.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield caught
    finally:
        signal.signal(signal.SIGINT, before)


def summary(generation: Generation, drawn: int, seconds: float, interrupted: bool) -> str:
    """What was done and how fast, in one line."""
    sequences = generation.sequences
    ends = ", ".join(sorted({s.finished or ("Ctrl-C" if interrupted else "length") for s in sequences}))
    size = sum(states.nbytes(s.state) for s in sequences)
    compiling = generation.engine.seconds if isinstance(generation.engine, Compiled) else 0.0
    compiled = f"a step was compiled in {compiling:.1f} s; " if compiling else ""
    seconds -= compiling
    return (
        f"{compiled}{drawn:,} tokens in {seconds:.1f} s ({drawn / seconds:,.0f} a second), ended by {ends}; "
        f"state of {size:,} bytes after {sum(s.read for s in sequences):,} tokens"
    )
