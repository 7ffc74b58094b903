"""Lengths beyond training (arXiv:2410.07145, arXiv:2504.16053): what switches keep, and what they change."""

import math
from dataclasses import replace

import pytest
import torch

from riverrun.data.tokens import ByteTokenizer
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.sampling import Sampling
from riverrun.mixers import MIXERS, build
from riverrun.models import folder
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.nn.beyond import measuring
from riverrun.testing.laws import WIDTH, inputs, instance, laws_for
from riverrun.testing.tolerance import close

TOKENIZER = ByteTokenizer()
LENGTH = 8
SWITCHES = {
    "forget": dict(forget=1.5, insert=0.5),
    "limit": dict(limit=0.05, every=1),
    "limit, every 5": dict(limit=0.05, every=5),
    "window": dict(window=11),
    "filter": dict(filter=True, global_above=0.01),
}
ON_BOTH = ("forget", "filter")
CASES = [("mamba2", s) for s in SWITCHES] + [("mamba", s) for s in ON_BOTH]


def switched(name, switch=None, length=LENGTH, **args):
    """A mixer that forgets little, in float64; with `switch`, and what is usual known to its filter."""
    given = {} if switch is None else {"beyond": {"length": length, **SWITCHES[switch]}}
    mixer = instance(lambda: build(name, WIDTH, **{**MIXERS[name].small, **given, **args}))
    with torch.no_grad():
        core(mixer).log_rate.sub_(4)
        if switch == "filter":
            with measuring(mixer):
                mixer(torch.cat([inputs(length, seed) for seed in range(20)]))
    return mixer


def core(mixer):
    """What of a mixer has the rates and the switches."""
    return getattr(mixer, "scan", mixer)


def test_a_switch_that_is_not_there_is_refused():
    for given, message in (
        ({"length": 8, "windw": 9}, "did you mean 'window'"),
        ({"limit": 1.0}, "no training length"),
    ):
        with pytest.raises(ValueError, match=message):
            build("mamba2", WIDTH, beyond=given, **MIXERS["mamba2"].small)


@pytest.mark.parametrize("name, switch", CASES)
def test_up_to_the_length_of_training_no_bit_changes(name, switch, float64):
    plain, mixer, x = switched(name), switched(name, switch), inputs(40)
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, ::LENGTH] = True  # documents as long as the training
    with torch.no_grad():
        assert torch.equal(mixer(x[:, :LENGTH])[0], plain(x[:, :LENGTH])[0])
        assert torch.equal(mixer(x, None, starts)[0], plain(x, None, starts)[0])
        y, z = mixer(x)[0], plain(x)[0]
        assert torch.equal(y[:, :LENGTH], z[:, :LENGTH]) or switch.startswith("limit")
        close(y[:, :LENGTH], z[:, :LENGTH], "cut into pieces")
        assert (y - z)[:, 2 * LENGTH :].abs().max() > 1e-4, "and beyond it something does"


@pytest.mark.parametrize("name, switch", CASES)
def test_switches_keep_the_laws(name, switch):
    row = replace(
        MIXERS[name],
        state="window" if switch == "window" else "constant",
        compiles=not switch.startswith("limit"),  # where the pieces end is data
        breaks={},
    )
    for law, holds in laws_for(row):
        if law not in ("trained", "bounded"):
            holds(lambda: switched(name, switch).float(), row)


def norms(mixer, T, seed=3):
    """|S| of the matrix states of all heads after T steps of inputs that have much in common."""
    with torch.no_grad():
        S = mixer(inputs(T, seed) + 1)[1][0]
    S = S[0] if isinstance(S, tuple) else S
    return float(S.norm())


@pytest.mark.parametrize("switch", [s for s in SWITCHES if s != "filter"])
def test_the_state_stays_as_full_as_it_was_in_training(switch, float64, monkeypatch):
    length = 16
    monkeypatch.setitem(SWITCHES, "forget", dict(forget=200.0, insert=1.0))
    monkeypatch.setitem(SWITCHES, "window", dict(window=length))
    plain = switched("mamba2")
    with torch.no_grad():
        plain.log_rate.fill_(-4)  # with steps of some 0.03 it forgets a 2,000th a step
    full = norms(plain, length)
    for limited in ("limit", "limit, every 5"):
        monkeypatch.setitem(SWITCHES, limited, SWITCHES[limited] | {"limit": full / 2})  # 4 heads
    mixer = switched("mamba2", switch, length)
    mixer.load_state_dict(plain.state_dict())
    if switch == "window":
        mixer = Window(mixer)
    assert norms(plain, 16 * length) > 8 * full, "without a switch it fills and fills"
    assert norms(mixer, 16 * length) < 3 * full


class Window:
    """The state that a window's outputs are read from: S_t - e^{Σ g} S_{t-r}, put together again."""

    def __init__(self, mixer):
        self.mixer = mixer

    def __call__(self, x):
        y, ((S, _, old, kept), _) = self.mixer(x)
        H = self.mixer.num_heads
        return y, ((S - kept[..., -H:].sum(1).exp()[..., None, None] * old,), None)


def test_a_window_reads_the_last_steps_only(float64):
    """What it gives at t is what the steps from t - r + 1 on give by themselves, but for the convolution."""
    mixer = switched("mamba2", "window", window=1)
    r, x = SWITCHES["window"]["window"], inputs(40)
    plain = switched("mamba2", window=1)
    with torch.no_grad():
        y = mixer(x)[0]
        for t in (5, 10, 11, 30, 39):
            last = x[:, max(0, t - r + 1) : t + 1]
            close(y[:, t], plain(last)[0][:, -1], f"step {t}")


def test_every_step_is_brought_down_when_asked(float64):
    mixer, x = switched("mamba2", "limit"), inputs(30)
    with torch.no_grad():
        whole, end = mixer(x)
        assert end[0][0].norm(dim=(-2, -1)).max() < 0.05 + 1e-12
        plain, state, ys = switched("mamba2"), None, []
        for t in range(30):
            y, (S, conv) = plain(x[:, t : t + 1], state)
            if t >= LENGTH:
                S = S * (0.05 / S.norm(dim=(-2, -1), keepdim=True)).clamp(max=1)
            ys.append(y)
            state = S, conv
    close(torch.cat(ys, 1), whole, "one step after another")


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_the_filter_keeps_the_decay_of_training_in_global_channels(name, float64):
    length, times = 32, 16
    mixer = switched(name, "filter", length)
    x, kept = inputs(times * length, 5), []

    def note(beyond, given, made):
        kept.append((given[0].sum(1), made[0].sum(1), made[0]))

    beyond = core(mixer).beyond
    beyond.register_forward_hook(note)
    with torch.no_grad():
        mixer(x)
    before, after, steps = kept[0]
    wide_open = beyond.decay > beyond.global_above
    assert wide_open.any()
    usual = beyond.usual.mean(1) * length  # steps of one length together
    # one length whole, and of the others as much as keeps each within it: 1 + log 16 lengths, not 16; a
    # quarter more because these are other tokens than were measured
    allowed = 1.25 * (1 + math.log(times)) * usual
    assert (before > 12 * usual)[:, wide_open].all()
    assert (after < allowed)[:, wide_open].all()
    assert torch.equal(after[:, ~wide_open], before[:, ~wide_open])
    assert (steps[:, :length] > 0).all()


def test_a_channel_that_forgets_is_local(float64):
    mixer = switched("mamba2", "filter")
    with torch.no_grad():
        mixer.log_rate[0], mixer.log_rate[1] = 5.0, -9.0
        with measuring(mixer):
            mixer(inputs(LENGTH))
    assert mixer.beyond.decay[0] < mixer.beyond.global_above < mixer.beyond.decay[1]
    with measuring(mixer), pytest.raises(ValueError, match="as long as the training, 8"):
        mixer(inputs(LENGTH + 1))


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_model_with_switches_is_saved_with_what_is_usual(switch, tmp_path):
    torch.manual_seed(0)
    args = {"num_heads": 2, "num_states": 4, "beyond": {"length": LENGTH, **SWITCHES[switch]}}
    net = LanguageModel(LanguageConfig(TOKENIZER.size, 16, 2, "mamba2", {"mamba2": args}))
    tokens = torch.randint(256, (1, 30))
    with torch.no_grad(), measuring(net):
        net(tokens[:, :LENGTH])
    folder.save(tmp_path / "model", net, TOKENIZER)
    again, _ = folder.load(tmp_path / "model")
    with torch.no_grad():
        first, state = again(tokens[:, :20])
        whole = net(tokens)[0]
        close(torch.cat([first, again(tokens[:, 20:], state)[0]], 1), whole, "in two calls", 1e-5)  # float32
        run = Generation(again, TOKENIZER, ["It was a truth"], Limits(20), Sampling(0))
        assert sum(len(text) for (text,) in run) > 0


@pytest.mark.parametrize(
    "name, beyond, match",
    [
        ("mamba2", dict(length=0), "length is 0"),
        ("mamba2", dict(length=9, window=8), "at least as long"),
        ("mamba2", dict(length=9, limit=1.0, window=9), "takes none"),
        ("mamba2", dict(length=9, forget=0.5), "at least 1"),
        ("mamba", dict(length=9, window=9), "such as mamba2"),
    ],
)
def test_switches_that_mean_nothing(name, beyond, match):
    with pytest.raises(ValueError, match=match):
        build(name, WIDTH, beyond=beyond)(torch.zeros(1, 1, WIDTH))
