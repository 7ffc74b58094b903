"""Tokenizers: text or bytes to token ids and back, whole or as a stream.

    tokenizer = BPETokenizer.train(Path("book.txt").read_text(), size=4096)        or ByteTokenizer()
    ids = tokenizer.encode("riverrun, past Eve and Adam's")
    for text in map(tokenizer.stream().push, ids): print(text, end="")

Ids 0 .. size-2 stand for bytes, id size-1 (`tokenizer.end`) is the end of a text: it stands before every
document, and a model that emits it has finished. No text is ever read as a special token: `encode` takes
"<|end|>" as seven characters; `prompt` is where a person may mean the token by it.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END = "<|end|>"
SPECIAL = re.compile(r"<\|[^|<>\s]*\|>")  # what people write for special tokens
LONGEST = 1 << 20  # characters without a space after which a stream is cut anyway, to keep memory constant

Text = str | bytes


class Tokenizer(ABC):
    """What the rest of the library knows of a tokenizer."""

    kind: str
    text_only: bool  # reads UTF-8, not any bytes
    size: int  # ids are 0 .. size-1: the model's vocabulary

    @property
    def end(self) -> int:
        """The id that ends a text and begins the next."""
        return self.size - 1

    @property
    def dtype(self) -> type[np.unsignedinteger]:
        """The narrowest type that holds every id."""
        return np.uint16 if self.size <= 1 << 16 else np.uint32

    @abstractmethod
    def encode(self, text: Text) -> list[int]:
        """Ids of a text, nothing added. Raises ValueError for bytes that this tokenizer cannot read."""

    @abstractmethod
    def encode_stream(self, parts: Iterable[bytes]) -> Iterator[np.ndarray]:
        """The ids of a text that arrives in parts, in constant memory: joined, those of `encode`."""

    @abstractmethod
    def bytes_of(self, token: int) -> bytes:
        """The bytes that one id stands for; none for `end`."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """What `load` rebuilds the tokenizer from."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The exact bytes of ids."""
        return b"".join(map(self.bytes_of, ids))

    def stream(self) -> TextStream:
        """A decoder that takes one id at a time and never gives out half a character."""
        return TextStream(self)

    def prompt(self, text: str, special: Literal["refuse", "read", "text"] = "refuse") -> list[int]:
        """Ids of a prompt, in which "<|...|>" is refused, read as the token it names, or plain text."""
        if strange := re.search("[\ud800-\udfff]", text):  # bytes that Python could not read as UTF-8
            raise ValueError(
                f"the prompt is not UTF-8 at character {strange.start()}; give it in UTF-8, as a terminal "
                "does whose LANG ends in UTF-8, or in a file"
            )
        found = SPECIAL.findall(text)
        if special == "refuse" and found:
            raise ValueError(
                f"the prompt contains '{found[0]}', which looks like a special token: special='text' "
                f"takes it as "
                f"characters, special='read' as a token (there is one: {END})"
            )
        if special != "read":
            return self.encode(text)
        for name in found:
            if name != END:
                raise ValueError(
                    f"the prompt contains the unknown special token '{name}'; there is one: {END}"
                )
        ids = [[*self.encode(part), self.end] for part in text.split(END)]
        return [i for part in ids for i in part][:-1]

    def save(self, path: str | Path) -> None:
        """Write the tokenizer as one JSON file."""
        Path(path).write_text(json.dumps(self.to_json()), encoding="utf-8")

    def check(self, token: int) -> int:
        if not 0 <= token < self.size:
            raise ValueError(f"no token {token}; this tokenizer has 0..{self.size - 1}")
        return token


class TextStream:
    """Ids to text, one at a time: bytes wait until their character is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this id completes; "" while a character is half there."""
        return self.decoder.decode(self.tokenizer.bytes_of(token))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that never became whole."""
        return self.decoder.decode(b"", True)


class ByteTokenizer(Tokenizer):
    """Every byte is its own id, 0..255, and 256 ends a text: takes any file, learns nothing beforehand."""

    kind, text_only, size = "bytes", False, 257

    def encode(self, text: Text) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    def encode_stream(self, parts: Iterable[bytes]) -> Iterator[np.ndarray]:
        return (np.frombuffer(part, np.uint8).astype(self.dtype) for part in parts)

    def bytes_of(self, token: int) -> bytes:
        return bytes([self.check(token)]) if token != self.end else b""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) of UTF-8 text."""

    kind, text_only = "bpe", True

    def __init__(self, inner: tokenizers.Tokenizer):
        self.inner, self.size = inner, inner.get_vocab_size() + 1
        letters = alphabet()
        words = {i: w for w, i in inner.get_vocab().items()}
        whole = sorted(words) == list(range(len(words))) and letters.keys() <= set(words.values())
        if not whole or not all(letters.keys() >= set(w) for w in words.values()):
            raise ValueError("the vocabulary is not that of a byte-level BPE: every byte, and words of bytes")
        if added := [token.content for token in inner.get_added_tokens_decoder().values()]:
            raise ValueError(f"text that holds {added} would be read as special tokens; add no tokens")
        if inner.normalizer is not None:
            raise ValueError("a normalizer would change the text before it is read; set it to None")
        self.words = [bytes(letters[c] for c in words[i]) for i in range(len(words))]

    @classmethod
    def train(cls, text: str | Iterable[str], size: int) -> BPETokenizer:
        """Learn `size` - 257 merges from text, or from pieces of it."""
        if size < 257:
            raise ValueError(
                f"size is {size}; a byte-level BPE has at least 257 tokens: 256 bytes and the end"
            )
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        )
        inner.train_from_iterator([text] if isinstance(text, str) else text, trainer)
        return cls(inner)

    def encode(self, text: Text) -> list[int]:
        return self.inner.encode(utf8(text)).ids

    def encode_stream(self, parts: Iterable[bytes]) -> Iterator[np.ndarray]:
        kept = ""
        for part in characters(parts):
            kept += part
            # a space after something else begins a new piece of text to the BPE: cutting there changes no id
            cut = max((m.start() + 1 for m in re.finditer(r"\S\s", kept)), default=0)
            if not cut and len(kept) > LONGEST:
                cut = LONGEST
            if cut:
                yield np.array(self.encode(kept[:cut]), self.dtype)
                kept = kept[cut:]
        if kept:
            yield np.array(self.encode(kept), self.dtype)

    def bytes_of(self, token: int) -> bytes:
        return self.words[self.check(token)] if token != self.end else b""

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "tokenizers": json.loads(self.inner.to_str())}


def alphabet() -> dict[str, int]:
    """The byte behind each character of a byte-level BPE: itself where printable, else one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(0x100 + i): b for i, b in enumerate(others)}


def utf8(text: Text) -> str:
    """Text as characters. Raises ValueError for bytes that are not UTF-8."""
    try:
        return text if isinstance(text, str) else text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(error, 0) from error


def characters(parts: Iterable[bytes]) -> Iterator[str]:
    """Text that arrives in parts, which may end inside a character. Raises ValueError if it is not UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    try:
        for part in parts:
            yield decoder.decode(part)
            done += len(part)
        yield decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        waiting = len(decoder.getstate()[0])
        raise not_utf8(error, done - waiting) from error


def not_utf8(error: UnicodeDecodeError, before: int) -> ValueError:
    """The message for bytes that are no text, `before` bytes into a stream."""
    return ValueError(
        f"byte {before + error.start} (0x{error.object[error.start]:02x}) is not UTF-8, and a BPE "
        f"tokenizer reads "
        "text: convert the file (iconv -f latin1 -t utf-8 FILE), or take the byte tokenizer, which "
        "reads any bytes"
    )


def load(path: str | Path) -> Tokenizer:
    """Read a tokenizer that `Tokenizer.save` wrote."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no tokenizer file {path}")
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return from_json(values)
    except Exception as error:  # `tokenizers` raises nothing more special
        raise ValueError(f"{path} is not a readable tokenizer file: {error}") from error


def from_json(values: dict[str, Any]) -> Tokenizer:
    """The inverse of `Tokenizer.to_json`."""
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "bpe":
        return BPETokenizer(tokenizers.Tokenizer.from_str(json.dumps(values["tokenizers"])))
    raise ValueError(f"no kind of tokenizer '{kind}'; there are 'bytes' and 'bpe'")
