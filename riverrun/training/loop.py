"""The training loop: from a `TrainConfig` to a folder with a model.

    result = train(TrainConfig(steps=1000, data=DataConfig(files=("emma.txt",))))
    result = train(config, resume=True)        goes on from the newest checkpoint in config.out

A run is a function of its config: the batch and the learning rate of a step depend on the step alone (with a
budget in minutes, the learning rate depends on the clock as well). Killed at any moment and resumed, a run in
steps comes to the same bits as if it had never stopped.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from riverrun.data.packing import Batch, Batches
from riverrun.data.tokens import Tokenizer
from riverrun.models import folder
from riverrun.state import State, detach

from . import checkpoint
from .checkpoint import Training
from .evaluate import Score, evaluate
from .log import Log, curve
from .loss import cross_entropy, unseen
from .optim import clip
from .prepare import prepare
from .report import Numbers, Report, memory
from .schedule import factor
from .settings import TrainConfig
from .watch import Watch


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    model: Path  # the folder to load
    checkpoint: Path
    step: int
    tokens: int
    seconds: float
    loss: float  # nats a token, mean of the last lines of the log
    score: Score | None  # of the held-out file, if there is one
    curve: Path | None  # loss.png
    interrupted: bool  # by Ctrl-C


class Diverged(RuntimeError):
    """The loss is not finite, or far above its lowest."""


def train(config: TrainConfig, resume: bool = False, report: Report | None = None) -> Result:
    """Train a model; see `TrainConfig`. Ctrl-C ends the run after a checkpoint.

    Raises ValueError and FileNotFoundError for settings that cannot work, before anything is computed.
    Diverged, and OSError when something cannot be written, name the last good checkpoint.
    """
    training, batches, tokenizer = prepare(config, resume)
    report = report or Report()
    log = Log(config.out, training.progress.step)
    run = Run(config, training, batches, tokenizer, report, log)
    if tokenizer.kind == "bpe" and tokenizer.size < config.data.size:
        wanted = f"{tokenizer.size} tokens and not data.size = {config.data.size}"
        report.note(f"the tokenizer has {wanted}: the text has no more pairs to join")
    if run.used is not None and run.used >= 1:
        more = f"riverrun train --resume {config.out} {'minutes' if config.steps is None else 'steps'}=..."
        report.note(f"the budget is used up at step {training.progress.step}. Give a larger one: {more}")
    try:
        with report, interruptible() as interrupted:
            run.go(interrupted)
            score = None if interrupted() else run.evaluate()
    finally:
        with suppress(OSError):  # TensorBoard's last lines, on a full disk; log.jsonl has them
            log.close()
    return finish(run, score, interrupted())


def finish(run: Run, score: Score | None, interrupted: bool) -> Result:
    """Write the model that a run came to, and draw its curve."""
    config, training = run.config, run.training
    if interrupted:
        run.report.note(
            f"stopped at step {training.progress.step}. Go on with: riverrun train --resume {config.out}"
        )
    model = Path(config.out) / "model"
    with run.writing("model"):
        folder.save(model, training.model, run.tokenizer)
    with run.writing("loss curve"):
        drawn = curve(config.out)
    progress = training.progress
    return Result(
        model, run.saved, progress.step, progress.tokens, progress.seconds, run.watch.mean, score, drawn,
        interrupted,
    )  # fmt: skip


class Run:
    """One run while it goes."""

    def __init__(
        self,
        config: TrainConfig,
        training: Training,
        batches: Batches,
        tokenizer: Tokenizer,
        report: Report,
        log: Log,
    ):
        self.config, self.training, self.batches, self.tokenizer = config, training, batches, tokenizer
        self.report, self.log = report, log
        self.progress = training.progress
        self.device = training.model.output.device
        self.watch = Watch(config.diverged)
        self.began = 0.0
        self.logged = self.progress.tokens, self.progress.seconds
        self.pending: list[tuple[int, Tensor, Tensor]] = []  # steps whose numbers have not been looked at
        self.saved = Path(config.out)
        self.scored = -1

    @property
    def used(self) -> float | None:
        """The part of the budget that is used; None without one."""
        if self.config.steps is not None:
            return self.progress.step / self.config.steps
        if self.config.minutes is not None:
            return self.progress.seconds / (60 * self.config.minutes)
        return None

    def go(self, interrupted: Callable[[], bool]) -> None:
        """Step until the budget is used up, or Ctrl-C; a checkpoint stands at the end."""
        config, progress = self.config, self.progress
        self.compile()
        self.began = time.perf_counter() - progress.seconds
        lr = 0.0
        while (self.used is None or self.used < 1) and not interrupted():
            lr = config.optim.lr * factor(config.schedule, progress.step, self.used)
            self.step(lr)
            progress.seconds = time.perf_counter() - self.began
            if self.device.type == "cpu" or progress.step % config.log_every == 0:
                self.look()  # on a GPU, looking waits for it
            if progress.step % config.log_every == 0:
                self.tell(lr)
            if config.evaluation.every and progress.step % config.evaluation.every == 0:
                self.evaluate()
            if progress.step % config.save_every == 0:
                self.save()
        self.look()
        if self.watch.fresh:
            self.tell(lr)
        self.save()

    def compile(self) -> None:
        """A step without an update: kernels are compiled before the clock of the run starts."""
        for part in split(self.batches[self.progress.step], self.config.accumulate, self.device):
            self.gradients(part, None)
            break
        self.training.optimizer.zero_grad()

    def gradients(self, part: Batch, state: State) -> tuple[Tensor, State]:
        """Add the gradients of one part of a step; its part of the loss, and the state after it."""
        model = self.training.model
        with torch.autocast(self.device.type, torch.bfloat16, enabled=half(self.config, self.device)):
            x, state = model.hidden(part.tokens, state, part.reset)
            counted = unseen(model.prefix, part.tokens, part.reset)
            loss = cross_entropy(x, model.output, part.targets, counted) / self.config.accumulate
        loss.backward()
        return loss.detach(), detach(state)

    def step(self, lr: float) -> None:
        """One update."""
        config, training = self.config, self.training
        model, optimizer = training.model, training.optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        total, carried = torch.zeros((), device=self.device), []
        parts = split(self.batches[self.progress.step], config.accumulate, self.device)
        for part, state in zip(parts, training.state, strict=True):
            loss, state = self.gradients(part, state)
            carried.append(state if config.data.mode == "stream" else None)
            total += loss
        training.state = tuple(carried)
        norm = clip(model, config.optim.clip)
        optimizer.step()
        optimizer.zero_grad()
        self.progress.step += 1
        self.progress.tokens += config.data.batch * config.data.length
        self.pending.append((self.progress.step, total, norm))

    def look(self) -> None:
        """Read the numbers of the steps since the last look. Raises Diverged."""
        for step, loss, norm in self.pending:
            if trouble := self.watch.trouble(float(loss), float(norm)):
                good = checkpoint.found(self.config.out)
                last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
                raise Diverged(
                    f"step {step}: {trouble}; {last}. Try a smaller optim.lr or a longer schedule.warmup"
                    + (f": riverrun train --resume {self.config.out} optim.lr=..." if good else "")
                )
        self.pending.clear()

    def tell(self, lr: float) -> None:
        """A line of the log."""
        progress, watch = self.progress, self.watch
        tokens, seconds = self.logged
        speed = (progress.tokens - tokens) / max(progress.seconds - seconds, 1e-9)
        self.logged = progress.tokens, progress.seconds
        loss = watch.since()
        bits = loss / math.log(2) * self.batches.corpus.tokens_per_byte
        numbers = Numbers(
            progress.step, loss, bits, lr, watch.norm, progress.tokens, progress.seconds, speed, self.used,
            memory(self.device),
        )  # fmt: skip
        self.report.show(numbers)
        with self.writing("line of the log"):
            self.log.write(**{k: v for k, v in asdict(numbers).items() if k != "used"})

    def evaluate(self) -> Score | None:
        """Score the held-out file as the settings say."""
        wanted, progress = self.config.evaluation, self.progress
        if wanted.file is None:
            return None
        if self.scored != progress.step:
            self.score = evaluate(
                self.training.model, self.tokenizer, wanted.file, wanted.limit, wanted.context
            )
            self.scored = progress.step
            bits = self.score.bits_per_byte
            with self.writing("line of the log"):
                self.log.write(progress.step, held_out=bits, tokens=progress.tokens)
            self.report.note(f"step {progress.step} · {bits:.4f} bits/byte on {wanted.file}")
        return self.score

    def save(self) -> None:
        """Write a checkpoint of a run whose numbers are known to be good."""
        self.look()
        with self.writing("checkpoint"):
            self.saved = checkpoint.save(self.config, self.training, self.tokenizer)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """An OSError inside says what was not written, which checkpoint is the last, and how to go on."""
        try:
            yield
        except OSError as error:
            good, out = checkpoint.found(self.config.out), self.config.out
            last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
            how = f"go on with: riverrun train --resume {out}" if good else "begin again"
            raise OSError(
                error.errno,
                f"no {what} could be written at step {self.progress.step} ({error.strerror}); {last}. Make "
                f"room, then {how}",
            ) from error


def half(config: TrainConfig, device: torch.device) -> bool:
    """Whether products run in bfloat16."""
    return config.precision == "bfloat16" or (config.precision == "auto" and device.type == "cuda")


def split(batch: Batch, parts: int, device: torch.device) -> Iterator[Batch]:
    """A batch in `parts` of equally many sequences, on the device."""
    for rows in torch.arange(len(batch.tokens)).chunk(parts):
        take = slice(int(rows[0]), int(rows[-1]) + 1)
        part = [x if x is None else x[take].to(device, non_blocking=True) for x in batch]
        yield Batch(*part)  # type: ignore[arg-type]


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C or a termination asks to stop after this step, a second one stops at once. Gives whether."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set  # only the main thread receives Ctrl-C
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
