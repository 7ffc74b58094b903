"""State tuning: a model's weights stay as they are, and the state that it begins with is learnt for a task.

    state = beginning(model)                          zeros: where the model begins without it
    tune(state, model, batches)                       or a loop of your own over state.parameters()
    logits, _ = model(tokens, state(batch))
    save("task.state", state, model, tokenizer)       for `riverrun generate my-model start=task.state`

A task costs what one state costs: kilobytes, for a small model. What a reset clears it clears to zeros, so
each document that shall begin with the tuned state needs a row of its own. (`--state task.state` would
keep the state at the end of the text in that file.)

Source: Xiao et al. 2025 (arXiv:2504.05097), its standard form. The forms that put kernel features in
place of keys and values run another recurrence than the one whose weights were trained, and are not here.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from riverrun.data.tokens import Tokenizer
from riverrun.models.language import LanguageModel
from riverrun.state import State, leaves, tree_map
from riverrun.training.loss import cross_entropy, unseen

from . import snapshot
from .streams import Stream


class InitialState(nn.Module):
    """A state of one sequence whose floating numbers are parameters, zeros at first. Call it for a batch.

    `like` is any state of one sequence of the mixer or model it is for.
    """

    def __init__(self, like: State):
        super().__init__()
        self.like = like
        self.numbers = nn.ParameterList(torch.zeros_like(x) for x in leaves(like) if x.is_floating_point())

    def forward(self, batch: int = 1) -> State:
        """The state of `batch` sequences that all begin with it."""
        numbers = iter(self.numbers)

        def begin(x: Tensor) -> Tensor:
            first = next(numbers) if x.is_floating_point() else torch.zeros_like(x)
            return first.repeat(batch, *[1] * (x.dim() - 1))

        return tree_map(begin, self.like)


@torch.no_grad()
def beginning(model: LanguageModel) -> InitialState:
    """The initial state of a model, to be tuned. Raises ValueError where zeros are not its beginning."""
    device = model.output.device
    state = InitialState(tree_map(lambda x: x.to(device), model.like))
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with_zeros, with_nothing = model(token, state(1))[0], model(token)[0]
    # a state of zeros adds zeros to sums, which changes no bit but may change how they are taken
    if not torch.allclose(with_zeros, with_nothing, rtol=1e-4, atol=1e-5):
        raise ValueError(
            f"the model has {sorted(set(model.layers))}, and one of these does not begin with zeros: caches, "
            "windows and memories that learn at test time do not; take mixers with a constant state"
        )
    return state


def tune(
    state: InitialState, model: LanguageModel, batches: Iterable[Tensor], lr: float = 0.1
) -> list[float]:
    """Lower the model's loss on `batches` of tokens (B, T + 1), one step each, by `state` alone; the losses.

    Adam without weight decay. No weight of the model changes, or is given a gradient.
    """
    optimizer, losses = torch.optim.Adam(state.parameters(), lr=lr), []
    for tokens in batches:
        x, _ = model.hidden(tokens[:, :-1], state(len(tokens)))
        counted = unseen(model.prefix, tokens[:, :-1], None)
        loss = cross_entropy(x, model.output.detach(), tokens[:, 1:], counted)
        grads = torch.autograd.grad(loss, list(state.parameters()))
        for p, grad in zip(state.parameters(), grads, strict=True):
            p.grad = grad
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def save(path: str | Path, state: InitialState, model: LanguageModel, tokenizer: Tokenizer) -> None:
    """Write the tuned state as a sequence that has read nothing and goes on at a document's first token."""
    snapshot.save(path, [Stream(pending=[tokenizer.end], state=state(1))], model)


def load(path: str | Path, model: LanguageModel) -> InitialState:
    """Read what `save` wrote. Raises ValueError for a damaged file and for another model's."""
    (stream,) = snapshot.load(path, model)
    model.check_state(stream.state, 1)
    state = InitialState(stream.state)
    with torch.no_grad():
        for p, x in zip(
            state.numbers, (x for x in leaves(stream.state) if x.is_floating_point()), strict=True
        ):
            p.copy_(x)
    return state
