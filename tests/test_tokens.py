"""Tokenizers: text and bytes to ids and back, whole, as a stream, and as a prompt."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inside
from tokenizers import models, normalizers

from riverrun.data import tokens
from riverrun.data.tokens import BPETokenizer, ByteTokenizer

TEXT = "Anne hoped she had outlived the age of blushing; but the age of emotion she certainly had not. " * 4
BPE = BPETokenizer.train(TEXT, 300)


@given(st.text())
def test_text_survives_both_tokenizers(text):
    for tokenizer in (BPE, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.end for i in ids)


@given(st.binary())
def test_bytes_take_anything(data):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@given(st.text(), st.integers(1, 7))
def test_a_stream_gives_the_tokens_of_the_whole(text, size):
    data = text.encode()
    pieces = [data[i : i + size] for i in range(0, len(data), size)]
    for tokenizer in (BPE, ByteTokenizer()):
        ids = [i for part in tokenizer.encode_stream(pieces) for i in part.tolist()]
        assert ids == tokenizer.encode(text)


def test_a_stream_is_cut_before_a_space():
    """What a space and the word after it make together must not depend on where the text is cut."""
    tokenizer = BPETokenizer.train("the sea the sea the sea ", 270)
    text = "the sea  the\nsea \n the sea " * 3
    for size in (1, 4, 6):
        pieces = [text[i : i + size].encode() for i in range(0, len(text), size)]
        ids = [i for part in tokenizer.encode_stream(pieces) for i in part.tolist()]
        assert ids == tokenizer.encode(text)


def test_a_stream_without_spaces_stays_in_constant_memory(monkeypatch):
    monkeypatch.setattr(tokens, "LONGEST", 100)
    pieces = [b"sea" * 10] * 50
    sizes = [len(part) for part in BPE.encode_stream(pieces)]
    assert len(sizes) > 10 and max(sizes) <= 100


def test_ids_take_the_narrowest_type_that_holds_them():
    for size, dtype in ((257, np.uint16), (1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)):
        tokenizer = ByteTokenizer()
        tokenizer.size = size
        assert tokenizer.dtype == dtype and np.array([tokenizer.end], tokenizer.dtype)[0] == size - 1


def test_streaming_text_never_shows_half_a_character():
    text = "é漢🎉x"
    for tokenizer in (BPE, ByteTokenizer()):
        stream = tokenizer.stream()
        shown = [stream.push(i) for i in tokenizer.encode(text)]
        assert "".join(shown) + stream.finish() == text
        assert not any("\ufffd" in s for s in shown)
    stream = ByteTokenizer().stream()
    assert [stream.push(0xE6), stream.push(0x41), stream.push(0xC3), stream.finish()] == [
        "", "\ufffdA", "", "\ufffd",
    ]  # fmt: skip


def test_bpe_learns_and_is_saved(tmp_path):
    assert BPE.size == 300 and len(BPE.encode(TEXT)) < len(TEXT) / 2
    for tokenizer in (BPE, ByteTokenizer()):
        tokenizer.save(tmp_path / "tokenizer.json")
        again = tokens.load(tmp_path / "tokenizer.json")
        assert (again.kind, again.size, again.encode(TEXT)) == (
            tokenizer.kind, tokenizer.size, tokenizer.encode(TEXT),
        )  # fmt: skip


@pytest.mark.parametrize(
    "read", [BPE.encode, lambda data: list(BPE.encode_stream([data[:2], data[2:]]))], ids=["whole", "stream"]
)
def test_bpe_says_what_to_do_about_bytes_that_are_not_text(read):
    with pytest.raises(ValueError, match=r"byte 4 \(0xe9\) is not UTF-8.*iconv.*byte tokenizer"):
        read(b"caf \xe9 x")
    with pytest.raises(ValueError, match=r"byte 3 \(0xe6\) is not UTF-8"):
        read(b"cut\xe6\xbc")


def test_special_tokens_in_prompts():
    tokenizer = ByteTokenizer()
    assert tokenizer.prompt("ab") == [97, 98]
    with pytest.raises(ValueError, match=r"contains '<\|im_start\|>'.*special='text'"):
        tokenizer.prompt("x <|im_start|>")
    with pytest.raises(ValueError, match=r"unknown special token '<\|im_start\|>'; there is one: <\|end\|>"):
        tokenizer.prompt("x <|im_start|>", special="read")
    assert tokenizer.prompt("<|end|>a", special="read") == [256, 97]
    assert tokenizer.prompt("<|x|>", special="text") == list(b"<|x|>")
    assert BPE.end not in BPE.encode("<|end|>")


@pytest.mark.parametrize("tokenizer", [BPE, ByteTokenizer()], ids=["bpe", "bytes"])
def test_a_prompt_that_was_not_typed_in_utf8_is_refused(tokenizer):
    with pytest.raises(ValueError, match="not UTF-8 at character 3"):
        tokenizer.prompt("caf" + os.fsdecode(b"\xe9"), "text")


def test_wrong_tokenizers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least 257"):
        BPETokenizer.train(TEXT, 100)
    with pytest.raises(FileNotFoundError, match="no tokenizer file"):
        tokens.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text('{"kind": "words"}')
    with pytest.raises(ValueError, match="there are 'bytes' and 'bpe'"):
        tokens.load(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match=r"this tokenizer has 0\.\.256"):
        ByteTokenizer().decode([257])
    with pytest.raises(ValueError, match="no token -1"):
        BPE.decode([-1])


def test_vocabularies_that_are_not_of_bytes_are_refused(tmp_path):
    words = dict(BPE.inner.get_vocab())
    for wrong in (
        {"a": 0, "b": 1},  # a text with "c" would lose it
        {w: i for w, i in words.items() if i != 270},
        {**words, "漢": len(words)},
    ):
        with pytest.raises(ValueError, match="not that of a byte-level BPE"):
            BPETokenizer(Inside(models.BPE(wrong, [])))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda inner: inner.add_special_tokens(["<|user|>"]), r"\['<\|user\|>'\] would be read as special"),
        (lambda inner: inner.add_tokens(["emotion"]), r"\['emotion'\] would be read"),
        (lambda inner: setattr(inner, "normalizer", normalizers.NFC()), "would change the text"),
    ],
)
def test_what_reads_text_as_anything_else_is_refused(change, message):
    inner = Inside.from_str(BPE.inner.to_str())
    assert BPETokenizer(inner).encode(TEXT) == BPE.encode(TEXT)
    change(inner)
    with pytest.raises(ValueError, match=message):
        BPETokenizer(inner)


def test_files_that_are_no_tokenizers_are_refused(tmp_path):
    for text in ('{"kind": "bpe"}', '{"kind": "bpe", "tokenizers": 3}', "[]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="not a readable tokenizer"):
            tokens.load(tmp_path / "tokenizer.json")
