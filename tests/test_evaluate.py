"""Bits per byte of a text that is read once, through the carried state."""

import math

import pytest
import torch
import torch.nn.functional as F

from riverrun.data.tokens import BPETokenizer, ByteTokenizer
from riverrun.mixers import MIXERS
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.training.evaluate import evaluate

TEXT = "".join(f"It was line {n * 7919 % 1000} of a book that nobody had read. " for n in range(60))


def model(pattern="gated_deltanet", vocabulary=257, **sizes):
    torch.manual_seed(0)
    mixers = {pattern: MIXERS[pattern].small}
    sizes = {"width": 16, "depth": 2, **sizes}
    return LanguageModel(LanguageConfig(vocabulary, pattern=pattern, mixers=mixers, **sizes))


def text_file(tmp_path, data):
    (tmp_path / "text.txt").write_bytes(data)
    return tmp_path / "text.txt"


def test_bits_per_byte_are_those_of_one_pass_over_the_whole_text(tmp_path):
    one, data = model().double(), TEXT[:500].encode()
    path = text_file(tmp_path, data)
    ids = torch.tensor([[256, *data]])
    nats = F.cross_entropy(one(ids[:, :-1])[0][0], ids[0, 1:], reduction="sum").item()
    for chunk in (7, 100, 2048):
        score = evaluate(one, ByteTokenizer(), path, chunk=chunk)
        assert math.isclose(score.nats, nats, rel_tol=1e-9) and (score.tokens, score.nbytes) == (500, 500)
        assert math.isclose(score.bits_per_byte, nats / math.log(2) / 500, rel_tol=1e-9)
    told = []
    limited = evaluate(one, ByteTokenizer(), path, limit=100, chunk=40, progress=lambda *x: told.append(x))
    assert limited.nbytes == 100 and [n for n, _ in told] == [40, 80, 100]
    assert told[-1][1] == limited.bits_per_byte


def test_a_prefix_is_read_token_by_token(tmp_path):
    """Read as a whole, its tokens would have seen what they predict."""
    one, data = model("jrt").double(), TEXT[:60].encode()
    state, nats, last = None, 0.0, 256
    for i, token in enumerate(data):
        state = None if i % 20 == 0 else state
        logits, state = one(torch.tensor([[last]]), state)
        nats, last = nats + F.cross_entropy(logits[0], torch.tensor([token])).item(), token
    score = evaluate(one, ByteTokenizer(), text_file(tmp_path, data), context=20)
    assert one.prefix == 6 and math.isclose(score.nats, nats, rel_tol=1e-9)


def test_a_limit_inside_a_character_ends_before_it(tmp_path):
    bpe = BPETokenizer.train(TEXT, 270)
    path = text_file(tmp_path, "ab漢字".encode())
    for limit, nbytes in ((2, 2), (3, 2), (4, 2), (5, 5), (7, 5), (8, 8), (100, 8)):
        assert evaluate(model(vocabulary=bpe.size), bpe, path, limit=limit).nbytes == nbytes


def test_bits_are_shared_among_bytes_and_not_among_tokens(tmp_path):
    bpe = BPETokenizer.train(TEXT, 300)
    score = evaluate(model(vocabulary=bpe.size), bpe, text_file(tmp_path, TEXT.encode()))
    assert score.nbytes == len(TEXT) > 2 * score.tokens
    assert math.isclose(score.bits_per_byte, score.nats / math.log(2) / len(TEXT))


def test_growing_states_are_evaluated_with_a_context(tmp_path):
    one, path = model("attention").double(), text_file(tmp_path, TEXT[:100].encode())
    with pytest.raises(ValueError, match=r"attention grows with every token.*context=2048"):
        evaluate(one, ByteTokenizer(), path)
    score = evaluate(one, ByteTokenizer(), path, context=40)
    assert math.isclose(evaluate(one, ByteTokenizer(), path, context=40, chunk=20).nats, score.nats)
    halves = [TEXT[:40], TEXT[39:80], TEXT[79:100]]
    nats = 0.0
    for i, half in enumerate(halves):
        ids = torch.tensor([([256] if i == 0 else []) + list(half.encode())])
        nats += F.cross_entropy(one(ids[:, :-1])[0][0], ids[0, 1:], reduction="sum").item()
    assert math.isclose(score.nats, nats, rel_tol=1e-9)


def test_files_that_cannot_be_scored_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        evaluate(model(), ByteTokenizer(), tmp_path / "nothing")
    with pytest.raises(ValueError, match="is empty"):
        evaluate(model(), ByteTokenizer(), text_file(tmp_path, b""))
    assert evaluate(model(), ByteTokenizer(), text_file(tmp_path, b"x")).tokens == 1
