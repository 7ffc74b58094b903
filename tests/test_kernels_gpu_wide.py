"""Cells whose heads several programs share, and others of many sequences. Needs a GPU, or TRITON_INTERPRET=1,
where one program holds all units: that examines the equations, a GPU the rest."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with CUDA builds of PyTorch")

from riverrun import ops
from riverrun.kernels.gpu import KERNELS, cells, wide_cells
from riverrun.kernels.gpu.launch import DEVICE
from riverrun.testing import inputs
from riverrun.testing.exactness import definition, distance, outcome
from riverrun.testing.inputs import Size

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

NAMES = tuple(cells.GATES)
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no GPU")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels have their own tests")
# a width that no tile divides; one that most of a chip shares; more programs than multiprocessors
SIZES = (Size(B=18, T=33, H=2, P=160), Size(B=3, T=24, H=1, P=768), Size(B=40, T=9, H=3, P=256))


def agrees(name, case, dtype):
    """Outputs, states and all gradients within the bounds derived in `exactness`."""
    op = ops.OPS[name]
    truth, scales, bounds, gain = definition(op, case, dtype)
    found, _ = outcome(op, case.to(dtype, DEVICE), "gpu", gain=gain)
    for what, x in truth.items():
        assert distance(found[what].cpu(), x, scales[what]) <= bounds[what], what
    return found


@pytest.fixture
def shared(monkeypatch):
    """Under the interpreter the kernels of wide heads run on a CPU, for heads of any width."""
    if DEVICE == "cpu":
        monkeypatch.setattr(cells, "wide", lambda x, R, back: True)
        for name in NAMES:
            kernel = ops.Kernel(KERNELS[name], "cpu", lambda name, args: None, half=True)
            monkeypatch.setitem(ops.OPS[name].kernels, "gpu", kernel)


@interpreted
@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, extreme, shared):
    for case in inputs.cases(name, Size(B=17, T=5, H=2, P=11), extreme=extreme):
        agrees(name, case.to(torch.float32), torch.float32)


@on_gpu
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s.B}-{s.H}-{s.P}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_the_definition(name, dtype, size):
    """Twice: programs that wait for each other must give the same bits whoever comes first."""
    case = inputs.make(name, "bias", size, seed=3).to(dtype)
    first, second = agrees(name, case, dtype), agrees(name, case, dtype)
    for what, x in first.items():
        assert torch.equal(x, second[what]), what


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("P", [11] if DEVICE == "cpu" else [7, 20, 64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_narrow_heads_of_many_sequences(name, P, dtype, monkeypatch):
    """Sequences in several blocks, the last of them not full, and sums over time in several stretches."""
    if DEVICE == "cpu":
        if dtype != torch.float32:
            pytest.skip("the interpreter's bounds are float32's")
        kernel = ops.Kernel(KERNELS[name], "cpu", lambda name, args: None, half=True)
        monkeypatch.setitem(ops.OPS[name].kernels, "gpu", kernel)
        monkeypatch.setattr(cells, "STEPS", 16)
    size = Size(B=17, T=20 if DEVICE == "cpu" else 64, H=2, P=P)
    for state in (False, True):
        case = inputs.make(name, "bias", size, seed=4, state=state, reset=state).to(dtype)
        agrees(name, case, dtype)


@pytest.mark.parametrize("name", NAMES)
def test_without_resets_with_a_state_and_without(name, shared):
    """Other arguments are absent than in the doctor's cases."""
    size = Size(B=2, T=5, H=1, P=11) if DEVICE == "cpu" else Size(B=2, T=20, H=1, P=192)
    for state in (False, True):
        case = inputs.make(name, "no bias", size, seed=2, state=state, reset=False).to(torch.float32)
        agrees(name, case, torch.float32)


@on_gpu
def test_is_captured_in_a_graph():
    case = inputs.make("lstm", "bias", Size(B=4, T=50, H=1, P=512)).to(torch.bfloat16, DEVICE)
    with torch.no_grad():
        expected, _ = ops.lstm(*case.args, state=case.state, reset=case.reset)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = ops.lstm(*case.args, state=case.state, reset=case.reset)
        for _ in range(3):  # counters begin at zero every time
            y.zero_()
            graph.replay()
            assert torch.equal(y, expected)


@on_gpu
def test_wider_is_refused():
    P = wide_cells.WIDEST + 8
    x, R = torch.zeros(1, 2, 1, 1, P, device=DEVICE), torch.zeros(1, 1, P, P, device=DEVICE)
    assert "more heads" in ops.explain("elman", x, R)
