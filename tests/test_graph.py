"""What recorded steps rest on, where there is no GPU: refusals, the check of a state, copying it over."""

from functools import partial

import pytest
import torch

from riverrun.data.tokens import ByteTokenizer
from riverrun.inference import graph
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.sampling import Sampling
from riverrun.mixers.attention import Attention
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.state import describe, leaves


def model(pattern="mingru"):
    return LanguageModel(LanguageConfig(ByteTokenizer().size, 8, depth=2, pattern=pattern))


def test_a_model_on_a_cpu_is_run_step_by_step_and_refused_when_asked_for():
    assert "on 'cpu'" in graph.refusal(model())
    with pytest.raises(ValueError, match="graph = True, but CUDA graphs need a GPU"):
        Generation(model(), ByteTokenizer(), [""], Limits(1, graph=True))
    assert not Generation(model(), ByteTokenizer(), [""], Limits(1)).recorded


def test_what_grows_or_waits_is_named(monkeypatch):
    monkeypatch.setattr(LanguageModel, "output", torch.empty(0, device="meta"))
    monkeypatch.setattr(graph, "on_gpu", lambda x: True)
    assert graph.refusal(model("mingru + attention")) is None
    assert Generation(model("mingru + attention"), ByteTokenizer(), [""], Limits(1)).recorded
    assert not Generation(model("mingru + mom"), ByteTokenizer(), [""], Limits(1)).recorded
    monkeypatch.delattr(Attention, "room")
    assert "attention grows with every token" in graph.refusal(model("mingru + attention"))
    assert "mom: which memories" in graph.refusal(model("mom"))
    assert graph.refusal(model("mingru + sliding_window")) is None


def test_a_state_may_not_change_in_what_python_sees():
    before = (torch.zeros(2, 3), None)
    assert graph.changes(before, (torch.zeros(2, 3), None)) is None
    assert "its shapes" in graph.changes(before, (torch.zeros(2, 4), None))
    assert "torch.float64" in graph.changes(before, (torch.zeros(2, 3).double(), None))
    assert "on the CPU changes" in graph.changes(before, (torch.ones(2, 3), None))


def test_a_state_is_owned_whole():
    wide = torch.arange(12.0).view(3, 4)
    mine = graph.owned(wide[:, 1:3])
    wide.zero_()
    assert mine.is_contiguous() and mine.tolist() == [[1, 2], [5, 6], [9, 10]]


def test_overwriting_reads_everything_before_it_writes(monkeypatch):
    """Two parts that change places. What lies on the CPU is never copied, so the test hides where it lies."""
    monkeypatch.setattr(graph, "on_gpu", lambda x: True)
    a, b, c = torch.ones(2), torch.full((2,), 2.0), torch.zeros(2, dtype=torch.int64)
    graph.overwrite((a, b, c), (b, a, torch.ones(2, dtype=torch.int64)))
    assert (a.tolist(), b.tolist(), c.tolist()) == ([2, 2], [1, 1], [1, 1])


class StandIn(graph.Replay):
    """A replay that runs its step again, in the memory and by the rules of a graph."""

    records = 0

    def record(self, x):
        self.x, self.graph = x.clone(), self
        StandIn.records += 1

    def replay(self):
        self.y, after = self.step(self.x, self.held)
        assert describe(self.held) == describe(after)
        for mine, new in zip(leaves(self.held), leaves(after), strict=True):
            mine.copy_(new)


@pytest.mark.parametrize(
    "pattern", ["gated_deltanet + sliding_window", "mamba2 + lstm", "gated_deltanet + attention"]
)
def test_a_state_that_is_overwritten_is_enough_for_generation(pattern, monkeypatch):
    """Sequences that stop at unequal times, and a second run that goes on, as without it; in float64. A cache
    that grows has room for so few steps that it is given more several times."""
    monkeypatch.setattr(graph, "ROOM", 7)
    monkeypatch.setattr(StandIn, "records", 0)
    torch.manual_seed(0)
    config = LanguageConfig(ByteTokenizer().size, 16, depth=2, pattern=pattern, tied=False)
    net, written = LanguageModel(config).double(), []
    torch.nn.init.normal_(net.embedding.weight)
    torch.nn.init.normal_(net.head.weight, std=0.5)
    for engine in (None, partial(StandIn, net)):
        given = Limits(30, stop=("a", "e")), Sampling(top_p=0.9)
        first = Generation(net, ByteTokenizer(), ["It is", "", "A truth"], *given, [1, 2, 3], engine=engine)
        texts = ["".join(t) for t in zip(*first, strict=True)]
        again = Generation(net, ByteTokenizer(), ["x"] * 3, *given, resume=first.sequences, engine=engine)
        written.append((texts, ["".join(t) for t in zip(*again, strict=True)]))
    assert written[0] == written[1]
    assert (StandIn.records > 6) == pattern.endswith("+ attention")


@pytest.mark.parametrize("given", ["a model", "a mixer", "a step of a model"])
def test_a_state_with_room_is_left_as_the_state_it_stands_for(given, monkeypatch):
    """Read at any time it can be gone on with by itself, and what is then read changes no replay."""
    monkeypatch.setattr(graph, "ROOM", 3)
    torch.manual_seed(0)
    net = model("attention + mingru").double()
    whole = torch.randint(0, 256, (2, 20))
    if given == "a mixer":
        net = net.blocks[0].mixer
        whole = torch.randn(2, 20, 8, dtype=torch.float64)
    step = (lambda x, state: net(x, state)) if given == "a step of a model" else net
    with torch.no_grad():
        y, state = net(whole[:, :9])
        replay = StandIn(step, state, net if given == "a step of a model" else None)
        with pytest.raises((IndexError, ValueError)):  # a step that fails takes none of the room
            replay(whole[:, 9:10, :3] if given == "a mixer" else torch.full((2, 1), 999))
        assert describe(replay.state) == describe(state)
        later = known = ()
        for t in range(9, 20):
            y = replay(whole[:, t : t + 1])
            assert all(map(torch.equal, leaves(later), known))
            expected, true = net(whole[:, : t + 1])
            torch.testing.assert_close(y[:, 0], expected[:, -1])
            kept = replay.state
            for a, b in zip(leaves(kept), leaves(true), strict=True):
                if a.is_floating_point():
                    torch.testing.assert_close(a, b)
            later = net(whole[:, :1], kept)[1]
            known = [x.clone() for x in leaves(later)]


def test_a_state_with_room_takes_neither_resets_nor_gradients():
    mixer, x = model("attention").blocks[0].mixer, torch.randn(2, 3, 8)
    with torch.no_grad():
        state = mixer.room(mixer(x)[1], 4)
        with pytest.raises(ValueError, match="takes neither `reset` nor gradients"):
            mixer(x, state, torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="takes neither `reset` nor gradients"):
        mixer(x, state)
    assert int(state[0].count_nonzero()) == 2 * 3 * 2 * 8  # nothing was written
