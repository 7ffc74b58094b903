"""The demo: Gated DeltaNet with attention in a window on five novels by Jane Austen; the sixth is held out.

riverrun train recipes/novel.py
"""

from pathlib import Path

from riverrun.models.language import LanguageConfig
from riverrun.training.optim import OptimConfig
from riverrun.training.schedule import ScheduleConfig
from riverrun.training.settings import DataConfig, EvaluationConfig, TrainConfig

AUSTEN = Path(__file__).resolve().parent.parent / "examples" / "data" / "austen"
LEARNT = ("sense_and_sensibility", "pride_and_prejudice", "mansfield_park", "emma", "northanger_abbey")


def config() -> TrainConfig:
    """Five minutes on two cores: two million parameters, many steps of small batches."""
    return TrainConfig(
        out="runs/novel",
        minutes=5,
        model=LanguageConfig(
            vocabulary=0, width=192, depth=4, pattern="3 gated_deltanet + 1 sliding_window",
            mixers={"gated_deltanet": {"num_heads": 3}, "sliding_window": {"num_heads": 3, "window": 128}},
        ),
        data=DataConfig(
            files=tuple(str(AUSTEN / f"{name}.txt") for name in LEARNT),
            tokenizer="bpe", size=1024, batch=4, length=512,
        ),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(kind="cosine", warmup=50),
        evaluation=EvaluationConfig(file=str(AUSTEN / "persuasion.txt"), limit=100_000),
    )  # fmt: skip
