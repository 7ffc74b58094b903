"""Everything that a training run is told, as one dataclass: `riverrun.config.override` fills it from
key=value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from riverrun.models.language import LanguageConfig

from .optim import OptimConfig
from .schedule import ScheduleConfig


@dataclass(frozen=True)
class DataConfig:
    """What is read, as which tokens, in which order."""

    files: tuple[str, ...] = ()  # files, folders with *.txt, patterns such as "books/*.txt"
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    size: int = 4096  # "bpe": its vocabulary, learnt from the files
    separator: str | None = None  # what divides documents inside a file; each file begins one
    mode: Literal["windows", "stream"] = "windows"  # "stream" carries the state from step to step
    batch: int = 16  # sequences a step
    length: int = 512  # tokens of each a step

    def __post_init__(self) -> None:
        if self.separator == "":
            raise ValueError("data.separator is empty; give the text that stands between documents, or none")


@dataclass(frozen=True)
class EvaluationConfig:
    """How well held-out text is predicted, from time to time."""

    file: str | None = None
    every: int | None = None  # steps; None: at the end only
    limit: int | None = None  # bytes of the file; None: all of it
    context: int | None = None  # tokens after which the state is dropped; a state that grows needs it

    def __post_init__(self) -> None:
        for name in ("every", "limit", "context"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"evaluation.{name} = {value} must be at least 1, or none")


@dataclass(frozen=True)
class TrainConfig:
    """One run. Its folder holds the checkpoints, the log, the loss curve and in the end the model."""

    out: str = "runs/model"
    steps: int | None = None  # the budget: steps, or minutes, or neither (then Ctrl-C ends the run)
    minutes: float | None = None
    seed: int = 0
    accumulate: int = 1  # parts in which a step's sequences are computed, to save memory
    model: LanguageConfig = field(default_factory=lambda: LanguageConfig(vocabulary=0))  # 0: the tokenizer's
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"  # bfloat16 products on a GPU
    device: str | None = None  # None: a GPU if there is one
    threads: int | None = None  # of PyTorch and of the compiled kernels on a CPU
    save_every: int = 200  # steps between checkpoints
    keep: int = 2  # newest checkpoints that stay
    log_every: int = 10  # steps between lines of the log
    diverged: float | None = 1.0  # nats by which the loss may rise over its lowest before the run stops

    def __post_init__(self) -> None:
        if not self.out or Path(self.out).is_file():
            raise ValueError(f"out={self.out} is no folder; name one for the run, such as out=runs/book")
        for name in ("accumulate", "save_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("steps", "minutes", "diverged", "threads"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} = {value} must be positive, or none")
        if self.steps is not None and self.minutes is not None:
            raise ValueError(f"steps = {self.steps} and minutes = {self.minutes}: give one of them")
        if self.schedule.kind == "cosine" and self.steps is None and self.minutes is None:
            raise ValueError("schedule.kind=cosine needs an end: set steps or minutes, or take kind=stable")
        if self.data.batch % self.accumulate:
            raise ValueError(
                f"accumulate = {self.accumulate} does not divide data.batch = {self.data.batch} sequences"
            )
