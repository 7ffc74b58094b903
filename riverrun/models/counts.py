"""What a model costs: parameters, floating-point operations a token, bytes of state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch

from riverrun.mixers import row
from riverrun.state import State, leaves, nbytes

from .language import Block, LanguageModel


@dataclass(frozen=True)
class Counts:
    """Costs of a model for sequences of T tokens."""

    parameters: int
    embedding: int  # those of the parameters that are the embedding, and the output map when it is not tied
    forward_flops: int  # a token, at the end of the sequence
    training_flops: int  # a token: forward, and twice as much backward
    state_bytes: int  # a sequence, after T tokens


@torch.no_grad()
def count(model: LanguageModel, T: int = 1) -> Counts:
    """Count a model's costs; layers whose state depends on T are run on T steps to see it.

    Operations: 2 for every weight of a matrix (the output map included, the embedding's lookup not), 4 for
    every number of a constant state (a multiply-add to write it, one to read it), 2 for every number of a
    cache, which is only read. Norms, gates and activations are left out: they are below a hundredth.
    """
    states = [after(model, i, T) for i in range(len(model.layers))]
    flops = 2 * model.output.numel()
    for block, name, state in zip(model.blocks, model.layers, states, strict=True):
        flops += 2 * sum(p.numel() for p in block.parameters() if p.dim() > 1)
        flops += (4 if row(name).state == "constant" else 2) * sum(x.numel() for x in leaves(state))
    parameters = sum(p.numel() for p in model.parameters())
    embedding = model.embedding.weight.numel() * (1 if model.head is None else 2)
    return Counts(parameters, embedding, flops, 3 * flops, sum(nbytes(s) for s in states))


def after(model: LanguageModel, layer: int, T: int) -> State:
    """The state of one layer after T steps of one sequence."""
    if row(model.layers[layer]).state == "constant":
        return model.like[layer]
    weight = model.embedding.weight
    return cast(Block, model.blocks[layer]).mixer(weight.new_zeros(1, T, weight.shape[1]), None, None)[1]
