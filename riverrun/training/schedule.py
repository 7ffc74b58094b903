"""The learning rate's factor in [0, 1] over a run: warm-up, then cosine, stable-then-decay, or constant.

    warm-up   (step + 1) / warmup
    cosine    floor + (1 - floor) (1 + cos π f) / 2, where f is the part of the budget that is used
    stable    1, and in the last `decay` of the budget floor + (1 - floor) (1 - sqrt(how much of it is over))

"stable" needs no known end: a run without a budget stays at 1, and one resumed with a budget decays at the
end of that.
Sources: Loshchilov & Hutter 2017 (arXiv:1608.03983); Hägele et al. 2024 (arXiv:2405.18392) for the decay.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate moves."""

    kind: Literal["cosine", "stable", "constant"] = "stable"
    warmup: int = 100  # steps
    decay: float = 0.2  # "stable": the last part of the budget, in which the rate falls
    floor: float = 0.0  # the factor at the end

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1 or not 0 <= self.decay <= 1 or self.warmup < 0:
            raise ValueError(
                f"schedule: floor = {self.floor} and decay = {self.decay} must lie in 0..1, "
                f"warmup = {self.warmup} must not be negative"
            )


def factor(config: ScheduleConfig, step: int, used: float | None) -> float:
    """The factor at a step when `used` (0..1) of the budget is over; None without a budget."""
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    if used is None or config.kind == "constant":
        return rise
    used = min(used, 1.0)
    if config.kind == "cosine":
        shape = (1 + math.cos(math.pi * used)) / 2
    elif used <= 1 - config.decay:
        shape = 1.0
    else:
        shape = 1 - math.sqrt((used - 1 + config.decay) / config.decay)
    return min(rise, config.floor + (1 - config.floor) * shape)
