"""A language model of two layers that builds in no time, and a text for it."""

import torch

from riverrun.mixers import MIXERS
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.models.pattern import layers


def build(pattern="gated_deltanet + mamba", **sizes) -> LanguageModel:
    torch.manual_seed(0)
    names = set(layers(pattern, 8))
    given = {"vocabulary": 50, "width": 16, "depth": 2, **sizes}
    return LanguageModel(LanguageConfig(pattern=pattern, mixers={n: MIXERS[n].small for n in names}, **given))


def text(T, B=2):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(T))
