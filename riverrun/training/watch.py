"""Sees when training goes wrong."""

from __future__ import annotations

import math
from collections import deque


class Watch:
    """Reads the loss of every step: troubled by what is not finite, or a mean far above its lowest."""

    SPAN = 20  # losses in a mean

    def __init__(self, bound: float | None):
        self.bound = bound
        self.recent: deque[float] = deque(maxlen=self.SPAN)
        self.fresh: list[float] = []
        self.lowest, self.norm, self.mean = math.inf, math.nan, math.nan

    def trouble(self, loss: float, norm: float) -> str | None:
        """What is wrong after a step with this loss and gradient norm, or None."""
        if not math.isfinite(loss) or not math.isfinite(norm):
            return f"the loss is {loss} and the norm of the gradients {norm}"
        self.recent.append(loss)
        self.fresh.append(loss)
        self.norm, mean = norm, sum(self.recent) / len(self.recent)
        if len(self.recent) == self.SPAN:
            self.lowest = min(self.lowest, mean)
            if self.bound is not None and mean > self.lowest + self.bound:
                return f"the loss has risen to {mean:.3f} from {self.lowest:.3f}"
        return None

    def since(self) -> float:
        """The mean loss since the last call."""
        if self.fresh:
            self.mean = sum(self.fresh) / len(self.fresh)
        self.fresh.clear()
        return self.mean
