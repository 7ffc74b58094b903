"""A model that trains in seconds: to see that everything works.

riverrun train recipes/tiny.py
"""

from pathlib import Path

from riverrun.models.language import LanguageConfig
from riverrun.training.optim import OptimConfig
from riverrun.training.schedule import ScheduleConfig
from riverrun.training.settings import DataConfig, EvaluationConfig, TrainConfig

AUSTEN = Path(__file__).resolve().parent.parent / "examples" / "data" / "austen"


def config() -> TrainConfig:
    """Two layers of Gated DeltaNet on one novel."""
    return TrainConfig(
        out="runs/tiny",
        steps=200,
        model=LanguageConfig(vocabulary=0, width=64, depth=2, mixers={"gated_deltanet": {"num_heads": 2}}),
        data=DataConfig(files=(str(AUSTEN / "emma.txt"),), batch=8, length=128),
        optim=OptimConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup=20, decay=0.5),
        evaluation=EvaluationConfig(file=str(AUSTEN / "persuasion.txt"), limit=10_000),
    )
