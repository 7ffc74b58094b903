"""Every mixer on a GPU: under every law, beside itself on a CPU, and with its steps recorded and replayed.

The laws' exact statements are in float64, which the kernels refuse; those that say something of a kernel
are held in float32 as well. `python benchmarks/cuda_laws.py` runs this file and writes a table of it.
"""

from copy import deepcopy
from itertools import pairwise

import pytest
import torch

from riverrun import state as states
from riverrun.data.tokens import ByteTokenizer
from riverrun.inference import graph
from riverrun.inference.decoding import Generation, Limits
from riverrun.inference.graph import Replay, owned
from riverrun.inference.sampling import Sampling
from riverrun.mixers import MIXERS, build
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.state import leaves, tree_map
from riverrun.testing import laws, tolerance

if not torch.cuda.is_available():
    pytest.skip("these need a GPU: torch.cuda.is_available() is False", allow_module_level=True)

# of a kernel: that it is the recurrence, forwards and backwards, wherever it is cut and whatever lies beside
SINGLE = ("agreement", "split", "decode", "causality", "reset", "independence", "select", "bounded", "save")
# In float32, roundings of 6e-8, carried through 67 steps, norms and gradients of gates, come to 1e-5, seldom
# to 1e-4 of the largest entry; the gradient of xLSTM's first normaliser, which is left when larger terms
# cancel, to 1.4e-3, on a CPU as well. A wrong index, sign or factor changes 1e-2 or more.
BOUND = 3e-3


def moved(monkeypatch, dtype):
    """Laws that build their mixers and inputs on the GPU."""
    instance, inputs, resets, load = laws.instance, laws.inputs, laws.resets, states.load
    monkeypatch.setattr(laws, "instance", lambda make: instance(make).to("cuda", dtype))
    monkeypatch.setattr(laws, "inputs", lambda T, seed=0: inputs(T, seed).to("cuda", dtype))
    monkeypatch.setattr(laws, "resets", lambda *given: resets(*given).to("cuda"))
    monkeypatch.setattr(states, "load", lambda path: (states.to(load(path)[0], "cuda"), {}))


def cases(wanted=None):
    for name, row in MIXERS.items():
        for law, check in laws.laws_for(row):
            if wanted is None or law in wanted:
                why = row.breaks.get(law)
                marks = [pytest.mark.xfail(reason=why, strict=wanted is None)] if why else []
                yield pytest.param(name, row, check, id=f"{name}-{law}", marks=marks)


@pytest.mark.parametrize("name, row, law", list(cases()))
def test_law(name, row, law, monkeypatch):
    moved(monkeypatch, torch.float64)
    law(lambda: build(name, laws.WIDTH, **row.small), row)


@pytest.mark.parametrize("name, row, law", list(cases(SINGLE)))
def test_law_in_float32(name, row, law, monkeypatch):
    moved(monkeypatch, torch.float32)
    for check in ("close", "close_all", "close_states"):
        exact = getattr(tolerance, check)
        loose = lambda a, b, what, bound=BOUND, exact=exact: exact(a, b, what, max(bound, BOUND))  # noqa: E731
        monkeypatch.setattr(laws, check, loose)
    law(lambda: build(name, laws.WIDTH, **row.small), row)


def mixer(name, width=laws.WIDTH):
    return laws.instance(lambda: build(name, width, **MIXERS[name].small))


def outcome(name, device, dtype):
    """Outputs, the last state and all gradients, of 70 steps after 20, with a reset."""
    row = MIXERS[name]
    net, x = mixer(name).to(device, dtype), laws.inputs(90).to(device, dtype).requires_grad_()
    if row.state == "none":
        found = [net(x)[0]]
    else:
        first, state = net(x[:, :20])
        second, end = net(x[:, 20:], state, laws.resets(70, (0, 31)).to(device))
        found = [first, second, *laws.floats(end)]
    found += laws.gradients(found, [x, *net.parameters()])
    return [f.detach().cpu().double() for f in found]


@pytest.mark.parametrize("name", MIXERS)
def test_cpu_and_gpu_agree(name, record_property):
    """In float32 a GPU is as near to float64 as a CPU is, up to the order of sums.

    Thirty times the CPU's own error, for sums in tiles and three tf32 products where it has one of float32;
    plus 1e-5, some hundred roundings, where the CPU is exact by luck.
    """
    exact, near, far = (
        outcome(name, *where)
        for where in (("cpu", torch.float64), ("cpu", torch.float32), ("cuda", torch.float32))
    )
    worst = 0.0
    for i, (x, a, b) in enumerate(zip(exact, near, far, strict=True)):
        cpu, gpu = tolerance.error(a, x), tolerance.error(b, x)
        worst = max(worst, gpu)
        assert gpu <= 30 * cpu + 1e-5, f"result {i}: {gpu:.1e} on the GPU, {cpu:.1e} on the CPU"
    record_property("error", f"{worst:.1e}")


@pytest.mark.parametrize("name", [n for n, row in MIXERS.items() if row.causal and row.state != "none"])
def test_replayed_steps_are_the_steps(name, monkeypatch):
    """The same bits as the steps themselves, in bfloat16, for longer than any chunk or window is.

    A cache that grows is read by another kernel, which adds in another order: four roundings apart. It is
    given more room on the way.
    """
    grows = MIXERS[name].state == "grows"
    monkeypatch.setattr(graph, "ROOM", 16)
    net, x = mixer(name).to("cuda", torch.bfloat16), laws.inputs(60).to("cuda", torch.bfloat16)
    with torch.no_grad():
        _, state = net(x[:, :20])
        replay = Replay(net, state)
        if MIXERS[name].unrecorded:
            with pytest.raises(ValueError, match="cannot be recorded"):
                replay(x[:, :1])
            return
        for t in range(20, 60):
            step = x[:, t : t + 1].contiguous()  # products of strided memory are summed in another order
            y, state = net(step, tree_map(owned, state))
            mine = replay(step)
            assert torch.equal(mine, y) or (grows and near(mine, y)), f"step {t}"
        for a, b in zip(leaves(replay.state), leaves(state), strict=True):
            assert a.device.type == "cpu" or torch.equal(a, b)


def near(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm()) < 2**-6


@pytest.mark.parametrize("groups", [4, 2])
def test_attention_in_pieces_in_bfloat16(groups):
    """Against each document by itself in float64, with gradients: some ten roundings of 2⁻⁹.

    A piece that sees all before it takes another kernel of PyTorch's than one in or after a reset.
    """
    torch.manual_seed(0)
    net, x = build("attention", 256, num_heads=4, num_key_heads=groups), torch.randn(2, 300, 256)
    cut = torch.zeros(2, 300, dtype=torch.bool, device="cuda")
    cut[0, 180] = True

    def outcome(device, dtype, read):
        mixer, given = deepcopy(net).to(device, dtype), x.to(device, dtype).detach().requires_grad_()
        y = read(mixer, given)
        return [f.detach().cpu().double() for f in (y, *laws.gradients([y], [given, *mixer.parameters()]))]

    def pieces(mixer, given):
        ys, state = [], None
        for i, j in pairwise((0, 50, 120, 200, 300)):
            y, state = mixer(given[:, i:j], state, cut[:, i:j] if i == 120 else None)
            ys.append(y)
        return torch.cat(ys, 1)

    def documents(mixer, given):
        first = torch.cat([mixer(given[:1, :180])[0], mixer(given[:1, 180:])[0]], 1)
        return torch.cat([first, mixer(given[1:])[0]])

    mine = outcome("cuda", torch.bfloat16, pieces)
    tolerance.close_all(mine, outcome("cpu", torch.float64, documents), "pieces", 2e-2)


class Letters(ByteTokenizer):
    """Reads bytes, writes a visible character for every token."""

    def bytes_of(self, token):
        return bytes([33 + token % 93])


def model(pattern):
    torch.manual_seed(0)
    made = LanguageModel(LanguageConfig(Letters().size, 32, depth=2, pattern=pattern, tied=False)).to("cuda")
    with torch.no_grad():
        made.embedding.weight.normal_()
        made.head.weight.normal_(std=0.5)
    return made


PATTERNS = ["gated_deltanet + sliding_window", "mamba2 + gla", "lstm + s5", "gated_deltanet + attention"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_generation_writes_what_it_would_without_graphs(pattern):
    """Sequences of unequal length that stop at unequal times, and a second run that goes on."""
    net, tokenizer = model(pattern), Letters()
    prompts, how = ["It is", "", "A truth universally acknowledged"], Sampling(top_p=0.9)
    written = []
    for recorded in (True, False):
        limits = Limits(40, stop=("a", "b"), graph=recorded)
        first = Generation(net, tokenizer, prompts, limits, how, seeds=[1, 2, 3])
        texts = ["".join(t) for t in zip(*first, strict=True)]
        again = Generation(net, tokenizer, ["x", "y", "z"], limits, how, resume=first.sequences)
        written.append(
            (texts, ["".join(t) for t in zip(*again, strict=True)], [s.read for s in again.sequences])
        )
        assert first.recorded == recorded
    assert written[0] == written[1]


def test_a_step_that_waits_for_the_gpu_is_refused():
    def step(x, state):
        return (x if bool((x > 0).all()) else -x), state

    one, other, stream = torch.ones(1, device="cuda"), torch.cuda.Stream(), torch.cuda.current_stream()
    well = Replay(lambda x, state: (x + state, state + x), one)
    before = [float(well(one)) for _ in range(3)]
    with pytest.raises(ValueError, match="it waits for the GPU"):
        Replay(step, one)(one)
    assert torch.cuda.current_stream() == stream  # and all else is as it was
    assert before + [float(well(one)) for _ in range(3)] == [2, 3, 4, 5, 6, 7]
    torch.randn(1, device="cuda")
    place = set()
    for _ in range(3):  # memory that another stream has used is free again when it is done
        used = torch.empty(1 << 22, device="cuda")
        place.add(used.data_ptr())
        used.record_stream(other)
        del used
        torch.cuda.synchronize()
    assert len(place) == 1


def test_a_step_that_counts_on_the_cpu_is_refused():
    def step(x, state):
        return x * int(state[1]), (state[0], state[1] + 1)

    with pytest.raises(ValueError, match="lies on the CPU changes"):
        Replay(step, (torch.zeros(1, device="cuda"), torch.zeros(1)))(torch.ones(1, device="cuda"))
