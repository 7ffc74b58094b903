"""Based on one novel: linear attention for what is far, in turns with exact attention to the last 64 tokens.

riverrun train recipes/based.py

The pattern is that of Arora et al. 2024 (arXiv:2402.18668) without its gated convolutions of three taps.
`window` and `feature_width` are its two dials: more of either is more recall, and more state.
"""

from pathlib import Path

from riverrun.models.language import LanguageConfig
from riverrun.training.optim import OptimConfig
from riverrun.training.schedule import ScheduleConfig
from riverrun.training.settings import DataConfig, EvaluationConfig, TrainConfig

AUSTEN = Path(__file__).resolve().parent.parent / "examples" / "data" / "austen"


def config() -> TrainConfig:
    """Two layers of each."""
    return TrainConfig(
        out="runs/based",
        steps=500,
        model=LanguageConfig(
            vocabulary=0, width=128, depth=4, pattern="based + sliding_window",
            mixers={
                "based": {"num_heads": 4, "feature_width": 16},
                "sliding_window": {"num_heads": 4, "window": 64},
            },
        ),
        data=DataConfig(files=(str(AUSTEN / "emma.txt"),), tokenizer="bpe", size=1024, batch=4, length=512),
        optim=OptimConfig(lr=3e-3),
        schedule=ScheduleConfig(kind="cosine", warmup=50),
        evaluation=EvaluationConfig(file=str(AUSTEN / "persuasion.txt"), limit=10_000),
    )  # fmt: skip
