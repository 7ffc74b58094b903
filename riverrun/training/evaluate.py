"""Bits per byte of a text, read in one pass through the carried state, in constant memory.

    score = evaluate(model, tokenizer, "persuasion.txt", limit=100_000)
    score.bits_per_byte = - Σ log2 p(token | all tokens before) / bytes of the text

The first token is predicted from `end` alone; no token is predicted twice, none is left out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import log
from pathlib import Path

import numpy as np
import torch

from riverrun.data.packing import parts, text
from riverrun.data.tokens import Tokenizer
from riverrun.models.language import LanguageModel
from riverrun.state import State

from .loss import cross_entropy_sum


@dataclass(frozen=True)
class Score:
    """How well a text was predicted."""

    nats: float
    tokens: int
    nbytes: int
    seconds: float

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / self.nbytes


def evaluate(
    model: LanguageModel,
    tokenizer: Tokenizer,
    path: str | Path,
    limit: int | None = None,
    context: int | None = None,
    chunk: int = 2048,
    progress: Callable[[int, float], None] | None = None,
) -> Score:
    """Score the first `limit` bytes of a file of any length, `chunk` tokens at a time.

    `context` drops the state after so many tokens; models whose state grows need it. `progress` is told the
    bytes done and the bits per byte so far. Raises FileNotFoundError, and ValueError for an empty file, for
    one that the tokenizer cannot read and for a growing state without `context`, before anything is computed.
    """
    check(model, context)
    path = legible(readable(Path(path)), tokenizer, limit)
    lengths = np.array([len(tokenizer.bytes_of(i)) for i in range(tokenizer.size)])
    device, begun = model.output.device, time.perf_counter()
    state, last, total, count, nbytes, since = None, tokenizer.end, 0.0, 0, 0, 0
    for ids in cut(tokenizer.encode_stream(whole(path, limit)), min(chunk, context or chunk)):
        if context is not None and since + len(ids) > context:
            state, since = None, 0
        singly = since < model.prefix  # a token alone does not see the next
        nats, state = read(model, np.concatenate([[last], ids]), state, device, singly)
        total, last, nbytes = total + nats, ids[-1], nbytes + int(lengths[ids].sum())
        count, since = count + len(ids), since + len(ids)
        if progress is not None:
            progress(nbytes, total / log(2) / max(nbytes, 1))
    return Score(total, count, nbytes, time.perf_counter() - begun)


@torch.no_grad()
def read(
    model: LanguageModel, ids: np.ndarray, state: State, device: torch.device, singly: bool
) -> tuple[float, State]:
    """Nats of ids[1:], each after those before it, and the state; in one call, or one for each."""
    tokens, xs = torch.from_numpy(ids.astype(np.int64)).to(device)[None], []
    for part in tokens[:, :-1].split(1 if singly else len(ids), 1):
        x, state = model.hidden(part, state)
        xs.append(x)
    return float(cross_entropy_sum(torch.cat(xs, 1), model.output, tokens[:, 1:])), state


def check(model: LanguageModel, context: int | None) -> None:
    """Raise ValueError for a model that cannot read on for ever."""
    if model.grows and context is None:
        raise ValueError(
            f"the state of {', '.join(model.grows)} grows with every token, so a whole text is not read in "
            "constant memory: give a context, the number of tokens after which the state is dropped, such as "
            "context=2048"
        )


def readable(path: Path) -> Path:
    """The same path. Raises FileNotFoundError and ValueError unless there is a file with something in it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; bits per byte need at least one byte")
    return path


def legible(path: Path, tokenizer: Tokenizer, limit: int | None) -> Path:
    """The same path. Raises ValueError if the part to be scored is not what this tokenizer reads."""
    if tokenizer.text_only:
        deque(text(path, whole(path, limit)), maxlen=0)
    return path


def whole(path: Path, limit: int | None) -> Iterator[bytes]:
    """A file's first `limit` bytes in parts; what would end inside a UTF-8 character ends before it."""
    if limit is None or limit >= path.stat().st_size:
        return parts(path)
    with path.open("rb") as file:
        file.seek(max(limit - 3, 0))
        tail = file.read(min(limit, 3) + 1)  # its last byte is the first that is left out
    back = 0
    while back + 1 < len(tail) and tail[-1 - back] & 0xC0 == 0x80:  # not the first byte of a character
        back += 1
    return parts(path, limit - back)


def cut(stream: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same ids in arrays of `size`, the last one maybe shorter."""
    kept = np.empty(0, np.int64)
    for ids in stream:
        kept = np.concatenate([kept, ids])
        while len(kept) >= size:
            yield kept[:size]
            kept = kept[size:]
    if len(kept):
        yield kept
