"""Batches of packed documents: which tokens a step reads."""

import numpy as np
import pytest
import torch

from riverrun.data.packing import Batches, Corpus, find, parts
from riverrun.data.tokens import BPETokenizer, ByteTokenizer

TEXT = "Anne hoped she had outlived the age of blushing; but the age of emotion she certainly had not. " * 4
BPE = BPETokenizer.train(TEXT, 300)


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
    (books / "empty.txt").write_text("----")
    with pytest.raises(ValueError, match=r"nothing but separators '--' in .*empty\.txt"):
        Corpus.read([books / "empty.txt"], ByteTokenizer(), "--")


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
