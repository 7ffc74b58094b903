"""Tokenizers, settings, and batches of packed documents."""

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Inside
from tokenizers import models

from riverrun.config import from_dict, keys, override, to_dict
from riverrun.data import tokens
from riverrun.data.packing import Batches, Corpus, find, parts
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
    for words in ({"a": 0, "b": 2}, {"a": 0, "漢": 1}):
        with pytest.raises(ValueError, match="not that of a byte-level BPE"):
            BPETokenizer(Inside(models.BPE(words, [])))
    for text in ('{"kind": "bpe"}', '{"kind": "bpe", "tokenizers": 3}', "[]"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match="not a readable tokenizer"):
            tokens.load(tmp_path / "tokenizer.json")


@pytest.fixture
def books(tmp_path):
    (tmp_path / "b.txt").write_text("bcd")
    (tmp_path / "a.txt").write_bytes(b"a\xff--x--")
    (tmp_path / "notes.md").write_text("not a book")
    return tmp_path


def test_documents_begin_with_the_end_of_the_one_before(books):
    tokenizer = ByteTokenizer()
    corpus = Corpus.read(find([str(books)]), tokenizer)
    assert corpus.tokens.tolist() == [256, *b"a\xff--x--", 256, *b"bcd"]
    assert corpus.nbytes == 10
    split = Corpus.read([books / "a.txt"], tokenizer, separator="--")
    assert split.tokens.tolist() == [256, *b"a\xff", 256, *b"x"]


def test_files_by_name_folder_and_pattern(books):
    a, b = books / "a.txt", books / "b.txt"
    assert find([str(b), str(books)]) == [b, a]
    assert find([str(books / "*.md")]) == [books / "notes.md"]
    (books / "shelf").mkdir()
    (books / "shelf" / "deep").mkdir()
    (books / "shelf" / "deep" / "c.txt").write_text("c")
    assert find([str(books / "**" / "*.txt")]) == [a, b, books / "shelf" / "deep" / "c.txt"]
    assert find([str(books / "*")]) == [a, b, books / "notes.md"], "folders that match are no files"
    with pytest.raises(FileNotFoundError, match="nothing"):
        find([str(books / "nothing")])


def test_bad_files_are_refused(books):
    (books / "empty.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.txt is empty"):
        Corpus.read([books / "empty.txt"], ByteTokenizer())
    with pytest.raises(ValueError, match=r"a\.txt: byte 1 \(0xff\) is not UTF-8"):
        Corpus.read([books / "a.txt"], BPE)


def test_one_byte_is_a_text_but_no_window(tmp_path):
    (tmp_path / "one.txt").write_bytes(b"x")
    corpus = Corpus.read([tmp_path / "one.txt"], ByteTokenizer())
    with pytest.raises(ValueError, match="has 2 tokens, fewer than the 9 of one window"):
        Batches(corpus, "windows", 1, 8)
    with pytest.raises(ValueError, match="has 2 tokens, fewer than the 3 of one window"):
        Batches(corpus, "windows", 1, 2)
    for batch, length in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            Batches(corpus, "windows", batch, length)
    batch = Batches(corpus, "stream", 1, 1)[0]
    assert (batch.tokens.tolist(), batch.targets.tolist()) == ([[256]], [[120]])


def circle(n=101, ends=(0, 40)):
    ids = np.arange(1, n + 1, dtype=np.uint16)
    ids[list(ends)] = 0
    return Corpus(ids, end=0, nbytes=n)


def test_targets_follow_tokens_and_resets_stand_at_document_beginnings():
    for mode in ("windows", "stream"):
        batches = Batches(circle(), mode, batch=3, length=8)
        for step in range(20):
            tokens_, targets, reset = batches[step]
            assert torch.equal(tokens_[:, 1:], targets[:, :-1])
            assert torch.equal(
                tokens_ == 0, torch.zeros_like(tokens_, dtype=bool) if reset is None else reset
            )


def test_an_epoch_of_windows_reads_everything_once_in_another_order_each_time():
    batches = Batches(circle(96), "windows", batch=4, length=8, seed=5)
    epochs = [torch.cat([batches[s].tokens for s in range(3 * e, 3 * e + 3)]) for e in (0, 1)]
    for epoch in epochs:
        assert epoch.flatten().unique().numel() == 95  # 94 words and the end, which stands there twice
    assert not torch.equal(*epochs)


def test_epochs_cut_their_windows_at_different_places():
    places = [Batches(circle(96), "windows", 4, 8, seed=5).windows(3 * e) % 8 for e in range(6)]
    assert len({tuple(p) for p in places}) > 1, "each epoch has one place, and they differ"
    assert all((p == p[0]).all() for p in places)


def test_a_stream_reads_on_where_it_stopped():
    batches = Batches(circle(), "stream", batch=3, length=8)
    rows = torch.cat([batches[s].tokens for s in range(40)], 1)
    expected = np.stack([np.roll(circle().tokens, -(b * 101 // 3)) for b in range(3)])
    assert rows.numpy().tolist() == np.tile(expected, 4)[:, :320].tolist()


def test_batches_depend_on_the_seed_and_the_step_alone():
    one, two, other = (Batches(circle(), "windows", 3, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(one[7].tokens, two[7].tokens) and not torch.equal(one[7].tokens, other[7].tokens)


def test_parts_stop_at_the_limit(tmp_path):
    (tmp_path / "long").write_bytes(bytes(200_000))
    assert [len(p) for p in parts(tmp_path / "long")] == [65536, 65536, 65536, 3392]
    assert [len(p) for p in parts(tmp_path / "long", 70_000)] == [65536, 4464]


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    kind: Literal["cosine", "stable"] = "cosine"
    betas: tuple[float, ...] = (0.9, 0.95)


@dataclass(frozen=True)
class Settings:
    name: str
    steps: int | None = None
    loud: bool = False
    files: tuple[str, ...] = ()
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    inner: Inner = field(default_factory=Inner)


def test_settings_are_read_as_their_types_say():
    config = override(
        Settings("x"),
        ["name=7", "steps=1e3", "loud=yes", "files=a.txt,b.txt", "inner.rate=3", "inner.kind=stable",
         "inner.betas=0.8,0.9", "mixers.mamba.num_states=4", "mixers.mamba.bias=true"],
    )  # fmt: skip
    assert config == Settings(
        "7", 1000, True, ("a.txt", "b.txt"), {"mamba": {"num_states": 4, "bias": True}},
        Inner(3.0, "stable", (0.8, 0.9)),
    )  # fmt: skip
    assert override(config, ["steps=none"]).steps is None
    assert from_dict(Settings, to_dict(config)) == config
    assert "inner.rate" in keys(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("step=3", "no setting 'step'; did you mean 'steps'"),
        ("rate=3", r"did you mean 'inner\.rate'"),
        ("inner.rat=3", r"did you mean 'inner\.rate'"),
        ("steps=soon", "'soon' is not int or none"),
        ("steps=1.5", "not int or none"),
        ("inner.kind=linear", "not 'cosine' or 'stable'"),
        ("loud=loudly", "not bool"),
        ("inner=3", "group of settings"),
        ("name.x=3", "has nothing inside"),
        ("name", "not of the form key=value"),
    ],
)
def test_wrong_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        override(Settings("x"), [setting])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "lacks the field 'name'"),
        ({"name": "x", "step": 1}, "unknown field 'step'; did you mean 'steps'"),
        ({"name": "x", "inner": {"rates": 1}}, "inner has an unknown field 'rates'"),
        ({"name": 3}, "name is 3; it must be str"),
        ({"name": "x", "loud": 1}, "loud is 1; it must be bool"),
        ([], "must be an object"),
    ],
)
def test_wrong_json_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        from_dict(Settings, values)
