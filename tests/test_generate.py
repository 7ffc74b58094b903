"""Generation: what is drawn, where it stops, and that batches, pieces and saved states change nothing."""

import gc
import json
import os
from pathlib import Path

import pytest
import torch

from riverrun import state as states
from riverrun.data.tokens import ByteTokenizer
from riverrun.inference import decoding, snapshot
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.sampling import Sampling
from riverrun.models.language import LanguageConfig, LanguageModel


class Letters(ByteTokenizer):
    """Reads bytes, writes a visible character for every token: no two texts look alike by chance."""

    def bytes_of(self, token):
        return bytes([33 + token % 93])


TOKENIZER = Letters()
CONSTANT, HYBRID = "gated_deltanet + mingru", "gated_deltanet + attention"
PROMPTS = ["It is", "", "A truth universally acknowledged", "é"]
MIXED = Sampling(temperature=0.9, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.2, penalty_window=8)


def model(pattern=CONSTANT, seed=0, width=16):
    """A small model in float64, whose rounding cannot change a draw, with logits far from uniform."""
    torch.manual_seed(seed)
    heads = {name: {"num_heads": 2} for name in ("gated_deltanet", "attention") if name in pattern}
    config = LanguageConfig(TOKENIZER.size, width, depth=2, pattern=pattern, mixers=heads, tied=False)
    made = LanguageModel(config).double()
    with torch.no_grad():
        made.embedding.weight.normal_()
        made.head.weight.normal_(std=0.5)
        made.head.weight[TOKENIZER.end] = 0  # rarely drawn
    return made


def bent(logit):
    """A model to which the end of the document is always more likely by `logit`, and all else alike."""
    made = LanguageModel(LanguageConfig(TOKENIZER.size, 8, depth=1, pattern="mingru", tied=False))
    with torch.no_grad():  # the last activations are ones, whatever the state
        made.blocks[0].mixer.out.weight.zero_()
        made.blocks[0].mlp.out.weight.zero_()
        made.embedding.weight.fill_(1)
        made.head.weight.zero_()
        made.head.weight[TOKENIZER.end] = logit
    return made


def texts(run):
    """Each sequence's whole text."""
    steps = list(run)
    return ["".join(parts) for parts in zip(*steps, strict=True)]


@pytest.mark.parametrize("pattern", [CONSTANT, HYBRID])
@pytest.mark.parametrize("piece", [3, 1024])
def test_a_batch_of_unequal_prompts_gives_what_each_gives_alone(pattern, piece):
    made, limits = model(pattern), Limits(40, piece=piece)
    seeds = [5, 6, 7, 8]
    together = texts(Generation(made, TOKENIZER, PROMPTS, limits, MIXED, seeds))
    for prompt, seed, text in zip(PROMPTS, seeds, together, strict=True):
        assert texts(Generation(made, TOKENIZER, [prompt], Limits(40), MIXED, seed)) == [text]
    assert len(set(together)) == len(PROMPTS)


@pytest.mark.parametrize("pattern", [CONSTANT, HYBRID])
def test_saved_sequences_go_on_with_unequal_prompts_as_each_does_alone(pattern):
    made = model(pattern)
    first = Generation(made, TOKENIZER, PROMPTS, Limits(10), MIXED, [1, 2, 3, 4])
    texts(first)
    more = ["", " and so", ", they said, ", "!"]
    together = texts(Generation(made, TOKENIZER, more, Limits(20, piece=5), MIXED, resume=first.sequences))
    for prompt, stream, text in zip(more, first.sequences, together, strict=True):
        assert texts(Generation(made, TOKENIZER, [prompt], Limits(20), MIXED, resume=[stream])) == [text]


@pytest.mark.parametrize("pattern", [CONSTANT, HYBRID])
@pytest.mark.parametrize("n", [0, 1, 17])
def test_a_saved_run_goes_on_as_if_it_had_not_ended(tmp_path, pattern, n):
    made, file = model(pattern), tmp_path / "run.state"
    whole = texts(Generation(made, TOKENIZER, PROMPTS, Limits(40), MIXED, 9))
    run = Generation(made, TOKENIZER, PROMPTS, Limits(n), MIXED, 9)
    begun = texts(run)
    snapshot.save(file, run.sequences, made)
    again = Generation(
        made, TOKENIZER, limits=Limits(40 - n), sampling=MIXED, resume=snapshot.load(file, made)
    )
    assert [a + b for a, b in zip(begun, texts(again), strict=True)] == whole
    assert all(s.read == len(p.encode()) + 40 for s, p in zip(again.sequences, PROMPTS, strict=True))


def test_leaving_the_loop_leaves_sequences_that_can_go_on():
    made, prompts = model(), ["It is", "A truth"]
    whole = texts(Generation(made, TOKENIZER, prompts, Limits(30), MIXED, 2))
    run = Generation(made, TOKENIZER, prompts, Limits(30), MIXED, 2)
    begun = []
    for step in run:
        begun.append(step)
        if len(begun) == 12:
            break
    drawn = run.sequences[0].draws
    rest = texts(Generation(made, TOKENIZER, limits=Limits(30 - drawn), sampling=MIXED, resume=run.sequences))
    assert 0 < drawn < 30
    assert ["".join(parts) for parts in zip(*begun, rest, strict=True)] == whole


def test_a_step_of_a_small_model_runs_on_one_thread_and_nothing_else_does(monkeypatch):
    small, threads, inside, outside = model(), torch.get_num_threads(), [], []
    small.register_forward_hook(lambda *_: inside.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        for _ in Generation(small, TOKENIZER, ["It is"], Limits(3)):
            outside.append(torch.get_num_threads())
        monkeypatch.setattr(decoding, "ALONE", 0)
        for _ in Generation(small, TOKENIZER, ["It is"], Limits(3)):
            pass
    finally:
        torch.set_num_threads(threads)
    assert inside == [1, 1, 1, 2, 2, 2] and set(outside) == {2}


def test_a_stopped_sequence_ends_and_the_others_run_on():
    made = model()
    free = texts(Generation(made, TOKENIZER, PROMPTS, Limits(40), MIXED, 9))
    stop = free[0][10:13]
    run = Generation(made, TOKENIZER, PROMPTS, Limits(40, stop=(stop,)), MIXED, 9)
    for text, whole, s in zip(texts(run), free, run.sequences, strict=True):
        assert text == whole.split(stop)[0]
        assert s.finished == ("stop" if stop in whole else "length")
    assert run.sequences[0].draws < 40


def test_the_end_of_a_document_ends_its_sequence():
    run = Generation(bent(10), TOKENIZER, ["a"], Limits(50), Sampling())
    assert texts(run) == [""]
    assert run.sequences[0].finished == "end" and run.sequences[0].draws == 1


def test_the_penalty_looks_back_on_a_window_only():
    made = model()
    run = Generation(made, TOKENIZER, ["x" * 100], Limits(100), MIXED)
    texts(run)
    assert len(run.sequences[0].recent) == MIXED.penalty_window


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read as Linux tells it")
def test_memory_is_the_same_after_1000_and_20000_tokens():
    run = Generation(bent(-10), TOKENIZER, ["a"], Limits(20_000), Sampling(repetition_penalty=1.1))
    stream, resident, sizes = run.sequences[0], [], []
    for step, _ in enumerate(run, 1):
        if step in (1_000, 20_000):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident.append(pages * os.sysconf("SC_PAGE_SIZE"))
            sizes.append(sum(x.nbytes for x in gc.get_objects() if type(x) is torch.Tensor))
    assert stream.read == 20_001 and len(stream.recent) == 64
    assert sizes[0] == sizes[1]  # of all tensors of the process, the state among them
    # 19,000 steps that each kept as little as their logits (1 KB) would show as 19 MB; allocators wander by
    # less, up to 9 MB in a process of 1.4 GB
    assert resident[1] - resident[0] < 15_000_000


def test_a_long_prompt_is_read_in_pieces():
    made, sizes = model(), []
    hidden = made.hidden
    made.hidden = lambda tokens, *rest: (sizes.append(tokens.shape[1]), hidden(tokens, *rest))[1]
    run = Generation(made, TOKENIZER, ["abcdefghij" * 10], Limits(0, piece=16))
    steps = list(run)
    assert sizes == [16] * 6 + [4] and len(steps) == len(sizes)
    assert run.sequences[0].read == 100 and run.sequences[0].pending == [ord("j")]


def test_prompts_that_look_like_special_tokens_are_refused():
    with pytest.raises(ValueError, match=r"<\|user\|>"):
        Generation(model(), TOKENIZER, ["<|user|> hello"])


def test_prompts_seeds_and_sequences_must_agree_in_number():
    made = model()
    with pytest.raises(ValueError, match="2 seeds for 1"):
        Generation(made, TOKENIZER, ["a"], seeds=[1, 2])
    with pytest.raises(ValueError, match="seed = -1"):
        Generation(made, TOKENIZER, ["a"], seeds=-1)
    with pytest.raises(ValueError, match="no prompt"):
        Generation(made, TOKENIZER, [])
    saved = Generation(made, TOKENIZER, ["a", "b"]).sequences
    with pytest.raises(ValueError, match="3 prompts for a saved state of 2"):
        Generation(made, TOKENIZER, ["a", "b", "c"], resume=saved)


def test_a_state_is_refused_by_any_other_model(tmp_path):
    made, file = model(), tmp_path / "run.state"
    run = Generation(made, TOKENIZER, ["a"], Limits(3))
    texts(run)
    snapshot.save(file, run.sequences, made)
    for other in (model(seed=1), model(HYBRID), model(width=32), model().float()):
        with pytest.raises(ValueError, match="another model"):
            snapshot.load(file, other)
    assert snapshot.load(file, model())[0].read == 4


def test_files_that_hold_no_run_are_refused(tmp_path):
    made, file = model(), tmp_path / "run.state"
    with pytest.raises(FileNotFoundError, match="no state file"):
        snapshot.load(file, made)
    states.save((torch.zeros(2),), file)
    with pytest.raises(ValueError, match="not written by generation"):
        snapshot.load(file, made)
    run = Generation(made, TOKENIZER, ["a"], Limits(3))
    texts(run)
    snapshot.save(file, run.sequences, made)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="truncated or damaged"):
        snapshot.load(file, made)
    states.save((None,), file, model=snapshot.digest(made), sequences=json.dumps([{"pending": [1]}]))
    with pytest.raises(ValueError, match="cannot be gone on with"):
        snapshot.load(file, made)


@pytest.mark.parametrize(
    "stop, match", [(("a", ""), "is empty, ''"), ("ab", "stop is 'ab'"), ((3,), "is 3; it")]
)
def test_stop_strings_that_are_none_are_refused(stop, match):
    with pytest.raises(ValueError, match=match):
        Limits(stop=stop)


def test_a_sequence_that_has_ended_goes_on_after_a_prompt_only():
    made = model()
    run = Generation(made, TOKENIZER, ["a"], Limits(40), MIXED)
    stop = texts(run)[0][5:8]
    ended = Generation(made, TOKENIZER, ["a"], Limits(40, stop=(stop,)), MIXED)
    texts(ended)
    with pytest.raises(ValueError, match="every saved sequence has ended"):
        Generation(made, TOKENIZER, resume=ended.sequences)
    again = Generation(made, TOKENIZER, ["b"], Limits(7), MIXED, resume=ended.sequences)
    assert len(texts(again)[0]) == 7
