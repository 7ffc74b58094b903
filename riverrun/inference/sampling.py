"""Choosing the next token: logits to a distribution, and a draw that depends on a seed and a count only.

    l_v / r if l_v > 0 else l_v · r    for every v among the last `penalty_window` tokens: the penalty r
    p = softmax(l / temperature), then, in this order, those tokens are taken out that are not
        among the top_k likeliest; among the fewest whose probabilities reach top_p; of p ≥ min_p · max p

Axes: B sequences, V tokens of the vocabulary. Source: top-p Holtzman et al. 2020 (arXiv:1904.09751) sec. 3.1,
min-p Nguyen et al. 2024 (arXiv:2407.01082) sec. 3, penalty Keskar et al. 2019 (arXiv:1909.05858) sec. 4.1.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. The defaults draw from the model's own distribution."""

    temperature: float = 1.0  # 0 takes the likeliest token
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # 1 is none
    penalty_window: int = 64  # tokens that the penalty looks back on: bounded, as all memory here

    def __post_init__(self) -> None:
        accepted = {
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_k": (self.top_k >= 0, "at least 0 (0 keeps every token)"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0 (1 is no penalty)"),
            "penalty_window": (self.penalty_window >= 1, "at least 1"),
        }
        for name, (holds, rule) in accepted.items():
            if not holds:
                raise ValueError(f"sampling: {name} = {getattr(self, name)}; it must be {rule}")


def choose(
    logits: Tensor, how: Sampling, recent: list[Iterable[int]], counts: list[tuple[int, int]]
) -> list[int]:
    """A token for each row of logits (B, V); `counts` are its sequence's seed and number of draws so far."""
    if how.temperature == 0:  # a draw from one token's distribution, for less
        return penalised(logits, how, recent).argmax(-1).tolist()
    return draw(distribution(logits, how, recent), [uniform(seed, count) for seed, count in counts])


def penalised(logits: Tensor, how: Sampling, recent: list[Iterable[int]]) -> Tensor:
    """Logits (B, V) in float64, after the penalty on tokens that the sequences held last.

    Raises FloatingPointError when a logit is NaN or +inf.
    """
    logits = logits.double()
    if not all(top < torch.inf for top in logits.amax(-1).tolist()):
        raise FloatingPointError("the model gave logits that are NaN or infinite; its weights are damaged")
    if how.repetition_penalty != 1:
        for row, tokens in zip(logits, recent, strict=True):
            seen = torch.tensor(sorted(set(tokens)), dtype=torch.long, device=logits.device)
            old, r = row[seen], how.repetition_penalty
            row[seen] = torch.where(old > 0, old / r, old * r)
    return logits


def distribution(logits: Tensor, how: Sampling, recent: list[Iterable[int]]) -> Tensor:
    """(B, V) probabilities in float64 of the logits (B, V), whose sequences last held the tokens `recent`."""
    logits = penalised(logits, how, recent)
    if how.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    if how.temperature != 1:
        logits = logits / how.temperature
    if 0 < how.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(how.top_k).values[:, -1:], -torch.inf)
    p = logits.softmax(-1)
    if how.top_p < 1:
        falling, order = p.sort(descending=True, stable=True)
        kept = falling.cumsum(-1) - falling < how.top_p  # the likeliest always stays
        p = torch.zeros_like(p).scatter_(-1, order, falling * kept)
    if how.min_p > 0:
        p = p * (p >= how.min_p * p.amax(-1, keepdim=True))
    return p


class Philox(threading.local):
    """A counter-based generator for each thread, and its state at a beginning."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.state: Any = self.bits.state


PHILOX = Philox()


def uniform(seed: int, count: int) -> float:
    """Draw number `count` of `seed`, in [0, 1): counter-based, so that no generator's state must be kept."""
    bits, state = PHILOX.bits, PHILOX.state
    state["state"]["key"][0], state["state"]["counter"][1] = seed, count
    bits.state = state  # to make a generator takes ten times as long
    return (bits.random_raw() >> 11) * 2.0**-53


def draw(p: Tensor, numbers: list[float]) -> list[int]:
    """A token for each row of p (B, V), unnormalised: the first whose cumulative share exceeds its number."""
    cumulative = p.cumsum(-1)
    target = torch.tensor(numbers, dtype=p.dtype, device=p.device)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)
    return [min(row[0], p.shape[-1] - 1) for row in found.tolist()]
