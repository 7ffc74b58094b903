"""Scans, cells, softmax, convolution and norm in Triton. Needs a GPU, or TRITON_INTERPRET=1 for tiny sizes on
a CPU."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton comes with CUDA builds of PyTorch")
from triton.runtime import interpreter

from riverrun import doctor, ops
from riverrun.kernels.gpu import KERNELS, norm, scan, selective, swiglu
from riverrun.kernels.gpu import loss as gpu_loss
from riverrun.kernels.gpu.launch import DEVICE
from riverrun.kernels.gpu.tape import repeated
from riverrun.nn import GatedMLP, GatedRMSNorm, unit
from riverrun.state import leaves
from riverrun.testing import exactness, inputs
from riverrun.testing.inputs import Size
from riverrun.training.loss import cross_entropy

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

NAMES = ("diagonal", "selective", "softmax", "short_conv", "short_conv_silu", "elman", "lstm", "gru", "slstm")
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has no GPU")
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels have their own tests")


def run(name: str, case: inputs.Case):
    return KERNELS[name](*case.args, state=case.state, reset=case.reset)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_doctor_passes(name, dtype):
    """Outputs, states and all gradients, random and extreme, within the bounds derived in `exactness`."""
    (found,) = doctor.run("cuda", ops=[name], dtypes=[dtype], impls=["gpu"], remember=False)
    assert found.verdict == "pass", found.line


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name, monkeypatch):
    """The same statement where there is no GPU, on sizes that Triton's interpreter can bear."""
    op = ops.OPS[name]
    kernel = ops.Kernel(KERNELS[name], "cpu", lambda name, args: None, half=True)
    monkeypatch.setitem(op.kernels, "gpu", kernel)
    for case in inputs.cases(name, Size(B=2, T=9, H=2, K=3, V=3, D=3, N=2, P=3)):
        case = case.to(torch.float32)
        truth, scales, bounds, _ = exactness.definition(op, case, torch.float32)
        found, _ = exactness.outcome(op, case, "gpu")
        for what, x in truth.items():
            assert exactness.distance(found[what], x, scales[what]) <= bounds[what], what


@interpreted
@pytest.mark.parametrize(("T", "resets"), [(16, True), (256, True), (400, True), (400, False)])
def test_selective_tiles(T, resets, monkeypatch):
    """Tiles that are full and that are not, more than one of them, and time in pieces, which remember what
    was before them where there are no resets."""
    kernel = ops.Kernel(KERNELS["selective"], "cpu", lambda name, args: None, half=True)
    monkeypatch.setitem(ops.selective.kernels, "gpu", kernel)
    case = inputs.make("selective", "real", Size(B=1, T=T, D=3, N=2)).to(torch.float32)
    if not resets:
        x, dt, *others = case.args
        case = replace(case, args=(x, 0.01 * dt, *others), reset=None)
    truth, scales, bounds, _ = exactness.definition(ops.selective, case, torch.float32)
    found, _ = exactness.outcome(ops.selective, case, "gpu")
    for what, x in truth.items():
        assert exactness.distance(found[what], x, scales[what]) <= bounds[what], what
    y, h = run("selective", case)  # without gradients other states are kept
    assert torch.equal(y, found["y"]) and torch.equal(h, found["state 0"])


@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_same_input_same_bits(name):
    """There are no atomics: outputs and gradients of two runs are equal to the last bit."""
    case = inputs.make(name, inputs.FORMS[name][0], Size(B=4, T=700, D=96, P=64)).to(torch.bfloat16, DEVICE)
    first, second = (exactness.outcome(ops.OPS[name], case, "gpu")[0] for _ in range(2))
    for what, x in first.items():
        assert torch.equal(x, second[what]), what


@on_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_captured_in_a_graph(name):
    case = inputs.make(name, inputs.FORMS[name][0], Size(B=4, T=1, D=96, P=64)).to(torch.bfloat16, DEVICE)
    with torch.no_grad():
        expected, state = run(name, case)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, after = run(name, case)
        y.zero_()
        graph.replay()
    assert torch.equal(y, expected)
    for a, b in zip(leaves(after), leaves(state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_a_sequence_continues_from_its_state(name):
    """One call of T steps equals two calls: the same sums in tiles of other sizes, so float32 rounding
    apart."""
    size = Size(T=9, D=3, P=3) if DEVICE == "cpu" else Size(T=300, D=96, P=64)
    case = inputs.make(name, inputs.FORMS[name][0], size).to(torch.float32, DEVICE)
    sequence = [ops.OPS[name].recurrence.is_sequence(n) for n in ops.OPS[name].signature.names]
    cut = size.T // 3

    def part(time: slice):
        args = [x[:, time] if s and x is not None else x for x, s in zip(case.args, sequence, strict=True)]
        return replace(case, args=tuple(args), reset=case.reset[:, time])

    whole, _ = run(name, case)
    head, state = run(name, part(slice(None, cut)))
    tail, _ = run(name, replace(part(slice(cut, None)), state=state))
    scale = whole.abs().max()
    torch.testing.assert_close(torch.cat([head, tail], 1) / scale, whole / scale, rtol=0, atol=2e-6)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_gated_norm(before, shared):
    """Against PyTorch in float64; a group is a sum of at most 96 float32 terms, so 2e-6 is some 30
    roundings."""
    width, group = (12, 4) if DEVICE == "cpu" else (480, 96)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 50, width, generator=generator)
    z = torch.randn(3, 50, 3 * width, generator=generator).to(DEVICE)[..., :width]  # as a projection gives it
    w = torch.randn(group if shared else width, generator=generator)
    ours = [v.to(DEVICE).requires_grad_() for v in (x, z, w)]
    exact = [v.detach().cpu().double().requires_grad_() for v in (x, z, w)]
    gate = F.silu(exact[1])
    u = exact[0] * gate if before else exact[0]
    n = F.rms_norm(u.unflatten(-1, (-1, group)), (group,), eps=1e-6) * exact[2].view(-1, group)
    y = n.flatten(-2) if before else n.flatten(-2) * gate
    dy = torch.randn(y.shape, generator=generator)
    layer = GatedRMSNorm(width, group, before=before, shared=shared).to(DEVICE)
    layer.weight = torch.nn.Parameter(ours[2].detach())
    ours[2] = layer.weight
    found = layer(*ours[:2])
    assert torch.equal(found, norm.gated_rms_norm(*ours, group=group, before=before))
    pairs = zip(
        (found, *torch.autograd.grad(found, ours, dy.to(DEVICE))),
        (y, *torch.autograd.grad(y, exact, dy.double())),
        strict=True,
    )
    for a, b in pairs:
        a, b = a.detach().cpu().double(), b.detach()
        assert float((a - b).abs().max() / b.abs().max()) < 2e-6


def against_float64(kernel, layer, x, exact):
    """y and dx of a kernel and of the layer that runs it, on a part of a wider tensor, against float64."""
    ours, true = x.requires_grad_(), x.detach().cpu().double().requires_grad_()
    found, expected = kernel(ours), exact(true)
    assert torch.equal(layer(ours), found)
    dy = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    pairs = (
        (found, expected),
        (*torch.autograd.grad(found, ours, dy.float().to(DEVICE)), *torch.autograd.grad(expected, true, dy)),
    )
    for a, b in pairs:
        a, b = a.detach().cpu().double(), b.detach()
        assert float((a - b).abs().max() / b.abs().max()) < 2e-6  # as the gated norm


def test_unit():
    wide = torch.randn(3, 20, 4 * 24, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = wide[..., 24:48].unflatten(-1, (4, 6))  # as a projection gives keys

    def exact(x):
        return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)

    against_float64(lambda x: norm.unit(x, 1e-6), unit, x, exact)


def test_swiglu():
    x = torch.randn(3, 20, 2 * 36, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mlp = GatedMLP(72, 36).to(DEVICE)
    mlp.inp, mlp.out = torch.nn.Identity(), torch.nn.Identity()
    against_float64(lambda x: swiglu.call(x)[0], mlp, x, lambda x: F.silu(x[..., :36]) * x[..., 36:])


@pytest.mark.parametrize("block", [16, 4096])
def test_losses(block, monkeypatch):
    """Against float64: rows of 37 logits, in one piece and in three; large ones cannot overflow."""
    monkeypatch.setattr(gpu_loss, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    x, E = 30 * torch.randn(9, 8, generator=generator), torch.randn(37, 8, generator=generator)
    targets = torch.randint(37, (9,), generator=generator)
    ours = [v.to(DEVICE).requires_grad_() for v in (x, E)]
    true = [v.double().requires_grad_() for v in (x, E)]
    found = cross_entropy(ours[0][None], ours[1], targets.to(DEVICE)[None])
    expected = F.cross_entropy(true[0] @ true[1].T, targets)
    pairs = (found, *torch.autograd.grad(found, ours)), (expected, *torch.autograd.grad(expected, true))
    for a, b in zip(*pairs, strict=True):
        a, b = a.detach().cpu().double(), b.detach()
        assert float((a - b).abs().max() / b.abs().max()) < 1e-4  # float32's rounding of exponents up to 300


@on_gpu
def test_refusals_name_the_reason():
    x, R = torch.zeros(1, 2, 4, 1, 1040, device=DEVICE), torch.zeros(4, 1, 1040, 1040, device=DEVICE)
    assert "more heads" in ops.explain("lstm", x, R)
    a = torch.zeros(1, 2, 3, device=DEVICE, dtype=torch.float64)
    assert "float64" in ops.explain("diagonal", a, a)


@interpreted
def test_signed_decays_near_one_are_exact(monkeypatch):
    """A chip's exponential that always errs to one side, by as much as a GPU's may, in 64 decays from the
    first step to the last: 2e-5 if it is taken, 64 roundings of 2^-24 if not."""
    mine = interpreter.InterpreterBuilder.create_exp
    shift = np.float32(1 + 2**-22)

    def skewed(builder, x):
        e = mine(builder, x)
        return interpreter.TensorHandle(e.data * shift, x.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp", skewed)
    one = torch.ones(1, 65, 1)
    A, low = torch.full((1, 1), -0.5), torch.full((1, 1), -0.3)
    args = F.pad(one[:, :1], (0, 0, 0, 64)), 0.01 * one, A, one, one, low
    y, _ = KERNELS["selective"](*args)
    decay = 1.3 * torch.exp(args[1][0, 0].double() * A[0].double()) - 0.3
    expected = 0.01 * decay ** torch.arange(65)
    torch.testing.assert_close(y[0, :, 0].double(), expected, rtol=4e-6, atol=0)


@interpreted
@pytest.mark.parametrize("form", inputs.FORMS["diagonal"])
def test_pieces_of_time(form, monkeypatch):
    """Few channels and many steps: several programs for one sequence, here with tiles of eight steps."""
    monkeypatch.setattr(scan, "shape", lambda *sizes: (4, 2, 4, 1))
    case = inputs.make("diagonal", form, Size(T=83)).to(torch.float32)
    a, b, h = (x.requires_grad_() for x in (*case.args, case.state))
    assert scan._plan(b, False)[0][2] > 1
    found = scan.diagonal(a, b, h, case.reset)
    true = ops.diagonal(a, b, state=h, reset=case.reset, impl="sequential")
    for x, y in zip(found, true, strict=True):
        torch.testing.assert_close(x, y)
    grads = (torch.autograd.grad(out, (a, b, h), (b, h)) for out in (found, true))
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)  # sums of 83 numbers in another order


@pytest.mark.parametrize(
    ("kernel", "form", "size"),
    [(scan, form, Size(T=40, D=5)) for form in inputs.FORMS["diagonal"]]
    + [(selective, "signed", Size(B=1, T=330, D=3, N=1))],  # in pieces
)
def test_repeated_calls(kernel, form, size):
    """The third call of a kind repeats the second with its own tensors: the bits of a call by itself."""
    name = "diagonal" if kernel is scan else "selective"
    forward, backward = repeated(kernel._run), repeated(kernel._run_backward)
    for seed in range(3):
        case = inputs.make(name, form, size, seed).to(torch.float32, DEVICE)
        for state, dh in ((case.state, None), (None, case.state)):
            given = (*case.args, state, case.reset)
            made = forward(*given, True)
            found = *made, *backward(*given, *made, made[0], dh)
            made = kernel._run(*given, True)
            true = *made, *kernel._run_backward(*given, *made, made[0], dh)
            for a, b in zip(found, true, strict=True):
                assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("of", ["a", "b", "dy"])
def test_conjugates(of):
    """As on the CPU: flags beside the numbers in memory."""
    case = inputs.make("diagonal", "complex", Size(T=9), state=False, reset=False).to(torch.complex64, DEVICE)
    a, b = case.args
    a, b, dy = (
        (x.conj() if name == of else x).detach().requires_grad_(name != "dy")
        for name, x in (("a", a), ("b", b), ("dy", b))
    )
    y, y0 = scan.diagonal(a, b)[0], ops.diagonal(a, b, impl="sequential")[0]
    torch.testing.assert_close(y, y0)
    for x, x0 in zip(*(torch.autograd.grad(out, (a, b), dy) for out in (y, y0)), strict=True):
        torch.testing.assert_close(x, x0)


@on_gpu
def test_mixed_dtypes_and_strides():
    """Decays in float32 beside bfloat16 inputs, as models make them, transposed in memory."""
    a = torch.rand(2, 40, 33, device=DEVICE).transpose(1, 2).requires_grad_()
    b = torch.randn(2, 40, 33, device=DEVICE).bfloat16().transpose(1, 2).requires_grad_()
    y, h = ops.diagonal(a, b, impl="gpu")
    assert y.dtype == torch.bfloat16 and h.dtype == torch.float32
    expected, _ = ops.diagonal(a, b, impl="sequential")
    torch.testing.assert_close(y, expected)  # bfloat16's default tolerance: a rounding or two
    da, db = torch.autograd.grad(y.float().sum(), (a, b))
    assert da.dtype == torch.float32 and db.dtype == torch.bfloat16


@on_gpu
def test_compiles_into_one_graph():
    case = inputs.make("lstm", "bias", Size(T=7, P=16)).to(torch.float32, DEVICE)
    compiled = torch.compile(lambda *a: ops.lstm(*a)[0], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*case.args), ops.lstm(*case.args)[0])
