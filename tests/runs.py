"""What tests of training runs share: a small run, something that happens in it, and what it leaves."""

from pathlib import Path

from riverrun.config import override
from riverrun.training.report import Silent
from riverrun.training.settings import TrainConfig

TEXT = "".join(f"It was line {n * 7919 % 1000} of a book that nobody had read. " for n in range(60))


def settings(folder_, out, *more):
    (folder_ / "a.txt").write_text(TEXT)
    (folder_ / "b.txt").write_text(TEXT[::-1])
    return override(
        TrainConfig(),
        [
            *(
                f"out={folder_ / out}",
                f"data.files={folder_}",
                "data.mode=stream",
                "data.batch=4",
                "data.length=16",
            ),
            *("model.width=16", "model.depth=2", "model.pattern=gated_deltanet + mamba"),
            *("model.mixers.gated_deltanet.num_heads=2", "model.mixers.mamba.num_states=4"),
            *(
                "steps=11",
                "accumulate=2",
                "schedule.warmup=3",
                "save_every=3",
                "log_every=1",
                "threads=1",
                *more,
            ),
        ],
    )


class Doing(Silent):
    """Does something at one step."""

    def __init__(self, step, what):
        super().__init__()
        self.step, self.what = step, what

    def show(self, numbers):
        if numbers.step == self.step:
            self.what()


def files(out, step):
    path = Path(out) / "checkpoints" / f"step-{step:08d}"
    return {name: (path / name).read_bytes() for name in ("model.safetensors", "training.safetensors")}
