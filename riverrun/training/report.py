"""What a person sees while a model is trained: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

PLAIN_EVERY = 5.0  # seconds between plain lines


@dataclass(frozen=True)
class Numbers:
    """A run at one step."""

    step: int
    loss: float  # nats a token, mean since the last line
    bits_per_byte: float
    lr: float
    norm: float  # of the gradients, before clipping
    tokens: int  # since the run began
    seconds: float  # since the run began
    tokens_per_second: float  # since the last line
    used: float | None  # part of the budget, 0..1
    memory: int  # bytes, the most so far

    @property
    def left(self) -> float | None:
        """Seconds until the budget is used up."""
        return self.seconds * (1 - self.used) / self.used if self.used else None

    def line(self) -> str:
        left = f" · {clock(self.left)} left" if self.left is not None else ""
        return (
            f"step {self.step} · loss {self.loss:.3f} · {self.bits_per_byte:.3f} bits/byte · "
            f"{self.tokens_per_second:,.0f} tokens/s{left} · {self.memory / 2**20:,.0f} MiB"
        )


class Report:
    """Shows `Numbers` and notes. Used as a context: the bar is there while the block runs."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False)
        self.last = -PLAIN_EVERY
        self.bar = Progress(
            SpinnerColumn(), BarColumn(bar_width=30), TextColumn("{task.description}"), console=self.console
        )
        self.task = self.bar.add_task("compiling for the first step", total=None)

    def __enter__(self) -> Report:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.console.is_terminal:
            self.bar.stop()

    def show(self, numbers: Numbers) -> None:
        """The run's newest numbers."""
        if self.console.is_terminal:
            total = 1.0 if numbers.used is not None else None
            self.bar.update(self.task, total=total, completed=numbers.used or 0, description=numbers.line())
        elif time.monotonic() - self.last >= PLAIN_EVERY:
            self.last = time.monotonic()
            self.note(numbers.line())

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, soft_wrap=True, markup=False)


class Silent(Report):
    """Shows nothing."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))


def clock(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def memory(device: torch.device) -> int:
    """The most bytes that this process has held at once: on the GPU if it trains there."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
