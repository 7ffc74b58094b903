"""Text from a language model, piece by piece: prompts are read, tokens drawn, and nothing grows but the text.

    run = Generation(model, tokenizer, ["It was a truth", "Anne"], Limits(300), Sampling(top_p=0.95))
    for texts in run: ...          [" univer", ""], ["sally", " had"], ...    what each sequence has to add
    run.sequences                  what snapshot.py saves, and a later run goes on from without the prompts

New prompts of unequal length are read together: the shorter ones are padded on the left, and `reset` is set
where they begin. Saved sequences must not be reset: they are read side by side as far as the shortest goes,
then the rest; and those whose states differ in shape (caches that grow) run one after the other. Either way
each sequence gets what it would have had alone, up to the rounding of matrix products. What is drawn depends
on the sequence's seed and its number of draws only, and the state has always read everything but the last
token, so a run of n tokens that is gone on with for m more is a run of n + m.

On a GPU a step is recorded for each batch size and replayed (graph.py), where that can be: the same kernels,
the same bits, but for a cache that grows, which a kernel of its own reads. `Limits(graph=False)` runs every
step by itself, `graph=True` says why where one cannot be recorded. On a CPU a step of a small model runs on
one thread, whatever PyTorch is set to: waking others would take longer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from riverrun.config import typed
from riverrun.data.tokens import Tokenizer
from riverrun.models.language import LanguageModel
from riverrun.state import State

from .graph import Replay, refusal
from .sampling import Sampling, choose
from .stopping import Outlet
from .streams import OVER, Stream, assign, begin, complete, go_on, join, settle, together

ALONE = 1 << 22  # products of a step's largest map that one thread does before another is awake


@dataclass(frozen=True)
class Limits:
    """When generation ends, how many tokens of a prompt are read at once, and how a step is run."""

    max_tokens: int = 200
    stop: tuple[str, ...] = ()  # the text ends before the first of these
    piece: int = 1024  # bounds the memory that reading a long prompt takes
    graph: bool | None = None  # steps are recorded and replayed (graph.py); None: where that can be

    def __post_init__(self) -> None:
        if "" in typed(tuple[str, ...], self.stop, "stop"):
            raise ValueError(
                "a stop string is empty, '': every text would end before its first letter; give the text to "
                "stop at, or leave it out (in a shell, a variable that is not set is empty)"
            )
        if self.max_tokens < 0 or self.piece < 1:
            raise ValueError(
                f"max_tokens = {self.max_tokens}, piece = {self.piece}; they must be at least 0 and 1"
            )


LIMITS, SAMPLING = Limits(), Sampling()


def step_threads(model: nn.Module, rows: int) -> int:
    """How many of PyTorch's threads suit a step of `rows` sequences: one for a small model on a CPU."""
    largest = max(p.numel() for p in model.parameters())
    alone = next(model.parameters()).device.type == "cpu" and rows * largest < ALONE
    return 1 if alone else torch.get_num_threads()


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Inside, PyTorch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Running(Protocol):
    """Steps of one batch: called with tokens (B, 1) it gives logits (B, 1, V), and keeps the state."""

    @property
    def state(self) -> State: ...

    def __call__(self, tokens: Tensor, /) -> Tensor: ...


Engine = Callable[[State], Running]  # what runs the steps from a state on


class Plain:
    """The model's own call, step by step."""

    def __init__(self, model: LanguageModel, state: State):
        self.model, self.state = model, state

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        logits, self.state = self.model(tokens, self.state)
        return logits


class Generation:
    """A run over some sequences: iterating yields, step by step, a list with each sequence's new text.

    prompts   one a sequence, text or token ids; with `resume` they follow what was read, None adds nothing
    seeds     one for all sequences, or one for each; None keeps those of `resume`, and is 0 without it
    resume    sequences to go on with, from an earlier run or from `snapshot.load`; they are not changed
    engine    how steps are run, such as `compiled.Compiled(model)`; None calls the model. What it makes is
              made for one batch size, so that sequences which have ended go on being run, unread

    Raises ValueError for text that looks like a special token (`Tokenizer.prompt` says what can be done), and
    when prompts, seeds and resumed sequences differ in number. Wherever the loop is left, `sequences` are
    ready to go on.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Sequence[str | list[int]] | None = None,
        limits: Limits = LIMITS,
        sampling: Sampling = SAMPLING,
        seeds: int | Sequence[int] | None = None,
        resume: Sequence[Stream] | None = None,
        engine: Engine | None = None,
    ):
        self.model, self.tokenizer, self.limits, self.sampling = model, tokenizer, limits, sampling
        self.device, self.engine = next(model.parameters()).device, engine
        tokens = (
            None if prompts is None else [tokenizer.prompt(p) if isinstance(p, str) else p for p in prompts]
        )
        self.sequences = begin(tokens or [], tokenizer.end) if resume is None else go_on(resume, tokens)
        if seeds is not None or resume is None:
            assign(seeds or 0, self.sequences)
        why_not = refusal(model)
        if limits.graph and why_not:
            raise ValueError(
                f"graph = True, but {why_not}; leave it out to run such a model's steps one by one"
            )
        self.recorded = engine is None and limits.graph is not False and why_not is None
        if self.recorded:
            self.engine = partial(Replay, model)

    def __iter__(self) -> Iterator[list[str]]:
        for s in self.sequences:
            s.recent = s.recent[-self.sampling.penalty_window :]
            s.finished = s.finished if s.finished in OVER else ""
        new = all(s.state is None for s in self.sequences)
        for _ in self._read_new() if new else self._read_on():
            yield [""] * len(self.sequences)
        for rows in together([s for s in self.sequences if not s.finished]):
            yield from self._write(rows)

    @torch.no_grad()
    def _read(self, tokens: list[list[int]], state: State, reset: list[list[bool]] | None = None) -> State:
        mask = None if reset is None else torch.tensor(reset, device=self.device)
        return self.model.hidden(torch.tensor(tokens, device=self.device), state, mask)[1]

    def _read_new(self) -> Iterator[None]:
        """Read prompts from their beginnings, padded on the left, up to their last tokens."""
        rows, steps = self.sequences, max(len(s.pending) for s in self.sequences) - 1
        pads = [steps + 1 - len(s.pending) for s in rows]
        state: State = None
        for i in range(0, steps, self.limits.piece):
            places = range(i, min(i + self.limits.piece, steps))
            tokens = [
                [s.pending[t - pad] if t >= pad else 0 for t in places]
                for s, pad in zip(rows, pads, strict=True)
            ]
            state = self._read(
                tokens, state, [[t == pad for t in places] for pad in pads] if any(pads) else None
            )
            yield
        settle(rows, state)
        for s, pad in zip(rows, pads, strict=True):
            s.read, s.pending = steps - pad, s.pending[-1:]
            if not s.read:
                s.state = None  # it has been padded only: it has not begun

    def _read_on(self) -> Iterator[None]:
        """Read what follows saved sequences, up to the last tokens."""
        while waiting := [s for s in self.sequences if len(s.pending) > 1]:
            for rows in together(waiting):
                size = min(self.limits.piece, *(len(s.pending) - 1 for s in rows))
                settle(rows, self._read([s.pending[:size] for s in rows], join(rows)))
                for s in rows:
                    s.read, s.pending = s.read + size, s.pending[size:]
                yield

    @torch.no_grad()
    def _draw(self, rows: list[Stream], running: Running) -> list[int]:
        """A token drawn for each sequence, after the tokens before these have been read."""
        logits = running(torch.tensor([s.pending for s in rows], device=self.device))
        counts = [(s.seed, s.draws) for s in rows]
        return choose(logits[:, -1], self.sampling, [s.recent for s in rows], counts)

    def _write(self, rows: list[Stream]) -> Iterator[list[str]]:
        """Draw tokens for sequences that run together, until each is finished."""
        index = {id(s): i for i, s in enumerate(self.sequences)}
        start = self.engine or partial(Plain, self.model)
        threads = step_threads(self.model, len(rows))
        with on_threads(threads):
            running, live = start(join(rows)), set(range(len(rows)))
        try:
            for left in reversed(range(self.limits.max_tokens)):
                with on_threads(threads):
                    tokens, texts = self._draw(rows, running), [""] * len(self.sequences)
                for i in live:
                    texts[index[id(rows[i])]] = self._take(rows[i], tokens[i], last=left == 0)
                if ended := {i for i in live if rows[i].finished}:
                    settle(rows, running.state, ended)
                    live -= ended
                    if live and self.engine is None:
                        settle(rows, running.state, live)
                        rows = [rows[i] for i in sorted(live)]
                        running, live = start(join(rows)), set(range(len(rows)))
                        threads = step_threads(self.model, len(rows))
                yield texts
                if not live:
                    return
        finally:
            settle(rows, running.state, live)

    def _take(self, s: Stream, token: int, last: bool) -> str:
        """Note a drawn token; the text that goes out with it."""
        s.read, s.draws, s.pending = s.read + 1, s.draws + 1, [token]
        s.recent = [*s.recent, token][-self.sampling.penalty_window :]
        if token == self.tokenizer.end:
            text = s.outlet.drain()
            s.finished, s.partial, s.outlet = "end", b"", Outlet()
            return text
        text, s.partial = complete(s.partial, self.tokenizer.bytes_of(token))
        text, stopped = s.outlet.put(text, self.limits.stop)
        if stopped:
            s.finished, s.partial = "stop", b""
        elif last:
            s.finished, text = "length", text + s.outlet.drain()
        return text
