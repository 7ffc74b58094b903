"""One step of generation: which token is drawn, which text goes out, where it stops."""

import numpy as np
import pytest
import torch

from riverrun.inference.sampling import Sampling, choose, distribution, draw, uniform
from riverrun.inference.stopping import Outlet
from riverrun.inference.streams import complete


def test_each_filter_keeps_the_tokens_it_names():
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()

    def kept(**how):
        p = distribution(logits, Sampling(**how), [[]])[0]
        return (p > 0).tolist()

    assert kept() == [True] * 4
    assert kept(top_k=1) == kept(temperature=0) == [True, False, False, False]
    assert kept(top_k=2) == kept(top_p=0.6) == kept(min_p=0.3) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]  # the first alone reaches it
    assert kept(top_p=0.51) == [True, True, False, False]
    assert kept(min_p=0.24) == [True] * 4


def test_temperature_and_penalty_follow_their_equations():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    cold = distribution(logits, Sampling(temperature=0.5), [[]])
    assert torch.allclose(cold, (logits.double() / 0.5).softmax(-1))
    penalised = distribution(logits, Sampling(repetition_penalty=2.0), [[0, 1, 0]])
    assert torch.allclose(penalised, torch.tensor([[1.0, -2.0, 0.5]]).double().softmax(-1))


@pytest.mark.parametrize(("seed", "count"), [(0, 0), (3, 7), (2**64 - 1, 10**6)])
def test_a_number_is_philox_at_its_count(seed, count):
    made = np.random.Generator(np.random.Philox(key=seed, counter=[0, count, 0, 0])).random()
    assert uniform(seed, count) == made and uniform(seed, count + 1) != made


def test_the_likeliest_token_is_chosen_after_the_penalty():
    logits, how = (
        torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.5]]),
        Sampling(temperature=0, repetition_penalty=1.4),
    )
    recent, counts = [[1], []], [(0, 0), (0, 0)]
    assert choose(logits, how, recent, counts) == [1, 1]  # 3 / 1.4 is still above 2
    assert choose(logits, how, [[1], [1]], counts) == [1, 2]
    assert draw(distribution(logits, how, [[1], [1]]), [0.5, 0.5]) == [1, 2]


def test_draws_follow_the_distribution_and_never_take_what_was_filtered():
    p = torch.tensor([[0.0, 0.6, 0.0, 0.4, 0.0]], dtype=torch.float64)
    drawn = [draw(p, [uniform(3, i)])[0] for i in range(2000)]
    assert set(drawn) == {1, 3}
    # the share of 2,000 draws has a standard deviation of 0.011; the seed is fixed
    assert abs(drawn.count(1) / 2000 - 0.6) < 0.04
    assert draw(p, [0.0]) == [1] and draw(p, [0.6]) == [3] and draw(p, [1 - 2**-53]) == [3]


@pytest.mark.parametrize(
    "wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0}, {"min_p": 2}, {"repetition_penalty": 0}]
)
def test_sampling_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_logits_that_are_no_numbers_are_an_error():
    with pytest.raises(FloatingPointError, match="NaN"):
        distribution(torch.tensor([[0.0, float("nan")]]), Sampling(), [[]])


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_stop_string_is_found_wherever_the_text_is_cut(cut):
    text, outlet, out = "aab abaabc rest", Outlet(), ""
    for i in range(0, len(text), cut):
        new, stopped = outlet.put(text[i : i + cut], ("aabc", "zz"))
        out += new
        if stopped:
            break
    assert stopped and out == "aab ab"


def test_text_that_began_a_stop_string_in_vain_is_not_lost():
    outlet = Outlet()
    assert outlet.put("ab", ("abc",)) == ("", False)
    assert outlet.put("d", ("abc",)) == ("abd", False)


def test_a_stop_string_that_spans_two_runs_is_found():
    outlet = Outlet()
    assert outlet.put("xab", ("abc",)) == ("x", False)
    assert outlet.drain() == "ab"  # the first run ends
    assert outlet.put("cd", ("abc",)) == ("", True)
    assert Outlet("ab", shown=2).put("dx", ("abc",)) == ("dx", False)


def test_characters_of_several_bytes_come_out_whole():
    out, waits = "", b""
    for byte in "né€😀".encode() + b"\xff!":
        text, waits = complete(waits, bytes([byte]))
        assert "�" not in text or byte == 0xFF
        out += text
    assert out == "né€😀�!" and waits == b""
