"""Documents packed into one circle of tokens, and the batches cut from it.

Every document is [end, its tokens]: the `end` that stands before a document is the target that closes the
one before, and the place of its `reset`. A batch is a pure function of (seed, step), so that a run resumed
at a step sees just what it would have seen.

    windows   each epoch cuts the circle into windows of `length` from a random place on, in random order
    stream    row b reads on from b / batch of the circle, step after step: for a state carried between steps
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .tokens import Tokenizer, characters

PART = 1 << 16  # bytes read at a time


class Batch(NamedTuple):
    """Tokens (B, T), those that follow them (B, T), and where documents begin (B, T), None when nowhere."""

    tokens: Tensor
    targets: Tensor
    reset: Tensor | None


@dataclass(frozen=True)
class Corpus:
    """Packed documents: tokens (N), in which `end` begins each, and the bytes of text they came from."""

    tokens: np.ndarray
    end: int
    nbytes: int

    @classmethod
    def read(cls, files: Sequence[str | Path], tokenizer: Tokenizer, separator: str | None = None) -> Corpus:
        """Read files, each a document, or several where `separator` splits it.

        Raises FileNotFoundError, and ValueError for an empty file and one that the tokenizer cannot read.
        """
        pieces, nbytes = [], 0
        begin = np.array([tokenizer.end], tokenizer.dtype)
        for path in files:
            for document in documents(Path(path), separator):
                try:
                    ids = list(tokenizer.encode_stream(document))
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                pieces += [begin, *ids]
            nbytes += Path(path).stat().st_size
        if not pieces:
            raise ValueError(f"there is nothing but separators {separator!r} in {', '.join(map(str, files))}")
        return cls(np.concatenate(pieces), tokenizer.end, nbytes)

    @property
    def tokens_per_byte(self) -> float:
        return len(self.tokens) / self.nbytes

    def gather(self, starts: np.ndarray, length: int) -> Batch:
        """`length` tokens of the circle from each of `starts` (B) on, with their targets."""
        index = (starts[:, None] + np.arange(length + 1)) % len(self.tokens)
        rows = torch.from_numpy(self.tokens[index].astype(np.int64))
        reset = rows[:, :-1] == self.end
        return Batch(rows[:, :-1], rows[:, 1:], reset if bool(reset.any()) else None)


@dataclass(frozen=True)
class Batches:
    """Which tokens step n reads: `batches[n]` is its Batch."""

    corpus: Corpus
    mode: Literal["windows", "stream"]
    batch: int
    length: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1:
            raise ValueError(f"batch = {self.batch} and length = {self.length} must be at least 1")
        if len(self.corpus.tokens) < self.length + 1:
            raise ValueError(
                f"the text has {len(self.corpus.tokens)} tokens, fewer than the {self.length + 1} of "
                f"one window: "
                "give more text or a smaller length"
            )

    def __getitem__(self, step: int) -> Batch:
        place = self.windows if self.mode == "windows" else self.stream
        return self.corpus.gather(place(step), self.length)

    def stream(self, step: int) -> np.ndarray:
        rows = np.arange(self.batch) * len(self.corpus.tokens) // self.batch
        return rows + step * self.length

    def windows(self, step: int) -> np.ndarray:
        count = len(self.corpus.tokens) // self.length
        numbers = np.arange(step * self.batch, (step + 1) * self.batch)
        return np.array([_order(self.seed, int(n // count), count, self.length)[n % count] for n in numbers])


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int, length: int) -> np.ndarray:
    """Where the windows of one epoch begin, in the order in which they are read."""
    random = np.random.default_rng((seed, epoch))
    return random.permutation(count) * length + random.integers(count * length)


def documents(path: Path, separator: str | None) -> Iterator[Iterator[bytes]]:
    """The documents of a file, each in parts. A separator belongs to none, and none is empty."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; a text has at least one byte")
    if separator is None:
        yield parts(path)
        return
    for document in path.read_bytes().split(separator.encode()):
        if document:
            yield iter([document])


def text(path: Path, pieces: Iterator[bytes]) -> Iterator[str]:
    """What a file holds, as characters. Raises ValueError, naming the file, where it is not UTF-8."""
    try:
        yield from characters(pieces)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parts(path: Path, limit: int | None = None) -> Iterator[bytes]:
    """A file's bytes, up to `limit` of them, some at a time."""
    left = limit if limit is not None else path.stat().st_size
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(PART, left))):
            left -= len(part)
            yield part


def find(patterns: Sequence[str]) -> list[Path]:
    """Files meant by paths, folders (their *.txt) and patterns such as `books/*.txt`, in order of name."""
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        names = (
            sorted(path.glob("*.txt")) if path.is_dir() else sorted(map(Path, glob(pattern, recursive=True)))
        )
        files = [path] if path.is_file() else [name for name in names if name.is_file()]
        if not files:
            raise FileNotFoundError(
                f"no file, no folder with *.txt files and no pattern that matches: '{pattern}'"
            )
        found += [name for name in files if name not in found]
    return found
