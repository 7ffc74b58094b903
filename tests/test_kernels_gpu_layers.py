"""What layers run in Triton between their maps. Needs a GPU, or TRITON_INTERPRET=1 for tiny sizes on a CPU.

Every kernel computes in float32 what the layer's PyTorch form, which float64 gets, computes in float64. An
output is a sum of at most 200 float32 terms, and relative to the largest of its kind 4e-6 is some 60
roundings.
"""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton comes with CUDA builds of PyTorch")

from riverrun import ops
from riverrun.algorithms import shift
from riverrun.kernels.gpu import attend, conv, headnorm, rotary, swiglu
from riverrun.kernels.gpu import norm as gpu_norm
from riverrun.kernels.gpu import removal as gpu_removal
from riverrun.kernels.gpu import scaled as gpu_scaled
from riverrun.kernels.gpu import shift as gpu_shift
from riverrun.kernels.gpu.launch import DEVICE
from riverrun.mixers.mamba2 import Mamba2
from riverrun.mixers.rwkv7 import RWKV7
from riverrun.models.rwkv7 import ChannelMix
from riverrun.nn import (
    GatedMLP,
    GatedRMSNorm,
    HeadNorm,
    RMSNorm,
    parts,
    remade,
    removal,
    rotate,
    scaled,
    shifted,
)
from riverrun.nn import norm as norms
from riverrun.nn.parts import padded
from riverrun.state import leaves

if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU here", allow_module_level=True)

BOUND, ROUNDED = 4e-6, 2e-2  # float32; what a few roundings to bfloat16 amount to
B, T = (2, 5) if DEVICE == "cpu" else (3, 150)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def gradients(run, inputs, seed=3):
    """Outputs of `run(*inputs)` and the gradients of all inputs that have one."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = run(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    given = [numbers(*y.shape, seed=seed + i).to(y) for i, y in enumerate(out)]
    wanted = [x for x in inputs if x.requires_grad]
    return [*out, *torch.autograd.grad(out, wanted, given)]


def agree(run, inputs, dtype=torch.float32, bound=BOUND):
    """`run` on the device in `dtype` against itself in float64; the same bits twice."""

    def to(x, device, dtype):
        return x.to(device, dtype if x.is_floating_point() else None)

    rounded = [to(x, "cpu", dtype) for x in inputs]
    exact = gradients(run, [to(x, "cpu", torch.float64) for x in rounded])
    found, again = (gradients(run, [to(x, DEVICE, dtype) for x in rounded]) for _ in range(2))
    for i, (a, b, c) in enumerate(zip(found, exact, again, strict=True)):
        assert torch.equal(a, c), f"{i} differs between two runs"
        a, b = a.detach().cpu().double(), b.detach()
        assert a.shape == b.shape
        assert float((a - b).abs().max() / b.abs().max()) < bound, i


def dtypes(test):
    cases = (
        [(torch.float32, BOUND)] if DEVICE == "cpu" else [(torch.float32, BOUND), (torch.bfloat16, ROUNDED)]
    )
    return pytest.mark.parametrize("dtype, bound", cases, ids=[str(d) for d, _ in cases])(test)


@dtypes
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "remade"])
@pytest.mark.parametrize("resets", [True, False])
def test_token_shift(kept, resets, dtype, bound, monkeypatch):
    """Both ways back: with what was mixed kept, and made again; one mixture is read by two maps."""
    D = 12 if DEVICE == "cpu" else 200
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 2], reset[1, 0] = True, True
    x, mix, last = numbers(B, T, D), numbers(3, D), numbers(B, D)
    weights = [numbers(n, D, seed=n) / D**0.5 for n in (4, 6, 8, 10)]
    monkeypatch.setattr(remade, "watched", lambda: kept)

    def run(x, mix, last, *weights):
        layers = [nn.Linear(*w.shape[::-1], bias=False, device="meta") for w in weights]
        for layer, w in zip(layers, weights, strict=True):
            del layer.weight
            layer.weight = w  # a tensor with a history, so that its gradient can be asked for
        given = reset.to(x.device) if resets else None
        return shifted(x, mix, last if resets else None, given, layers, [0, 1, 2, 1])[: len(weights)]

    monkeypatch.setattr(remade, "plain", lambda layer: True)
    if resets:
        agree(run, (x, mix, last, *weights), dtype, bound)
    else:
        agree(lambda x, mix, *w: run(x, mix, None, *w), (x, mix, *weights), dtype, bound)


@dtypes
@pytest.mark.parametrize("K", [6, 64])
def test_removal(K, dtype, bound):
    H = 2 if DEVICE == "cpu" else 12
    inputs = [numbers(B, T, H, K, seed=i) for i in range(3)] + [numbers(H, K, seed=i) for i in range(2)]
    agree(partial(removal, strength=1.5), inputs, dtype, bound)
    some = lambda *inputs: tuple(removal(*inputs, strength=1.5)[i] for i in (0, 1, 3))  # noqa: E731
    agree(some, inputs, dtype, bound)  # one output has no gradient


@dtypes
@pytest.mark.parametrize("bonus", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_head_norm(bias, gated, bonus, dtype, bound):
    H, P = (2, 6) if DEVICE == "cpu" else (12, 64)
    inputs = [3 + numbers(B, T, H, P), numbers(H * P), numbers(H * P, seed=1), numbers(B, T, H * P)]
    inputs += [numbers(B, T, H, P, seed=i) for i in range(4, 7)] + [numbers(H, P)]
    used = [True, True, bias, gated, *[bonus] * 4]

    def run(*some):
        given = iter(some)
        x, w, b, gate, *rest = (next(given) if there else None for there in used)
        layer = HeadNorm(H * P, 1e-5, bias)
        del layer.weight, layer.bias
        layer.weight, layer.bias = w, b
        return layer(x, gate, tuple(rest) if bonus else None)

    agree(run, [x for x, there in zip(inputs, used, strict=True) if there], dtype, bound)


@dtypes
@pytest.mark.parametrize("before", [True, False])
def test_gated_norm_with_a_skip(before, dtype, bound):
    H, P = (3, 4) if DEVICE == "cpu" else (24, 64)
    inputs = [numbers(B, T, H * P), numbers(B, T, H * P, seed=1), numbers(H * P), numbers(H)]
    inputs += [numbers(B, T, H * P + 5)]

    def run(x, z, w, d, wider):
        layer = GatedRMSNorm(H * P, 2 * P if H == 24 else P, before=before)
        del layer.weight
        layer.weight = w
        return layer(x, z, (d, wider[..., 5:].unflatten(-1, (H, P))))

    agree(run, inputs, dtype, bound)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, BOUND), (torch.bfloat16, ROUNDED)], ids=str)
@pytest.mark.parametrize("shape", [(B, T, 12), (B, T, 3, 50), (7, 1030)], ids=str)
def test_rms_norm(shape, dtype, bound, monkeypatch):
    """Of a part of wider rows, too; y and the gradients have the dtypes of x and the weight."""
    launches = []
    monkeypatch.setattr(norms, "LARGE", 0)
    whole = gpu_norm.gated_rms_norm
    monkeypatch.setattr(gpu_norm, "gated_rms_norm", lambda *args: launches.append(1) or whole(*args))

    def run(x, wider, w):
        layer = RMSNorm(shape[-1], 1e-3)
        del layer.weight
        layer.weight = w
        return layer(x), layer(wider[..., 3 : 3 + shape[-1]])

    agree(run, (numbers(*shape), numbers(*shape[:-1], shape[-1] + 5), numbers(shape[-1])), dtype, bound)
    assert len(launches) == 4  # and none for float64


def test_rms_norm_is_pytorchs_where_it_must_be(monkeypatch):
    monkeypatch.setattr(norms, "LARGE", 0)
    monkeypatch.setattr(gpu_norm, "gated_rms_norm", None)
    layer, x = RMSNorm(8).to(DEVICE), numbers(3, 8).to(DEVICE)
    with ops.forced(outer="chunk"):
        forced = layer(x)
    torch.testing.assert_close(torch.func.vmap(layer)(x), forced)  # vmap takes it apart: other roundings


@dtypes
def test_scaled(dtype, bound):
    """On a part of a wider tensor; the numbers stay float32, so their gradients do."""
    H, P = (3, 6) if DEVICE == "cpu" else (24, 64)
    run = lambda wider, s: scaled(wider[..., 2 : 2 + H * P].unflatten(-1, (H, P)), s)  # noqa: E731
    agree(run, (numbers(B, T, H * P + 4), numbers(B, T, H)), dtype, bound)


ON_A_GPU = pytest.mark.skipif(DEVICE == "cpu", reason="for a GPU: it is slow, and knows no bfloat16 products")
CACHES = [(2, 4, 2, 16, 300), (1, 3, 3, 20, 700), (3, 2, 1, 64, 64), (1, 5, 1, 8, 1), (1, 2, 1, 8, 9000)]
LARGE = [(1, 12, 12, 64, 70_000), (2, 8, 2, 128, 3000), (70, 2, 1, 256, 65)]


@pytest.mark.parametrize("programs", [2, 200])
@pytest.mark.parametrize(
    "dtype, bound", [(torch.float32, 2e-6), pytest.param(torch.bfloat16, 8e-3, marks=ON_A_GPU)]
)
@pytest.mark.parametrize("B, H, G, K, n", [*CACHES, *(pytest.param(*c, marks=ON_A_GPU) for c in LARGE)])
def test_attention_over_a_cache_of_which_some_counts(B, H, G, K, n, dtype, bound, programs, monkeypatch):
    """bfloat16: weights and y are rounded by 2^-9, two roundings or three of the largest entry."""
    monkeypatch.setattr(attend, "processors", lambda device: programs)
    make = torch.Generator().manual_seed(0)
    q, kv = (torch.randn(*s, generator=make).to(DEVICE, dtype) for s in ((B, H, K), (B, 2 * G, n, K)))
    filled = torch.randint(n - n // 20 - 1, n, (B,), generator=make).to(DEVICE)
    start = torch.randint(-3, n // 2 + 1, (B,), generator=make).to(DEVICE)
    steps = torch.arange(n, device=DEVICE)
    mask = (steps >= start[:, None]) & (steps <= filled[:, None])
    k, v = (x.repeat_interleave(H // G, 1) for x in kv.double().chunk(2, 1))
    score = (k @ q.double()[..., None])[..., 0] / K**0.5
    true = score.masked_fill(~mask[:, None], -torch.inf).softmax(-1)[:, :, None] @ v
    y = attend.attend(q, kv, start, filled.int())
    assert float((y - true[:, :, 0]).norm() / true.norm()) < bound


@dtypes
@pytest.mark.parametrize("rows", [1, B])
def test_rotary_positions(rows, dtype, bound):
    """Of a part of a wider tensor; positions of each sequence, or one's for all."""
    H, K = (3, 6) if DEVICE == "cpu" else (12, 64)
    position = 7 * torch.arange(T)[None] + 1000 * torch.arange(rows)[:, None]

    def run(wider):
        x = wider[..., 4 : 4 + H * K].unflatten(-1, (H, K))
        return rotate(x, position.to(x.device))

    agree(run, (numbers(B, T, H * K + 6),), dtype, bound)


@dtypes
@pytest.mark.parametrize("silu", [True, False])
def test_short_convolution_of_a_part(silu, dtype, bound):
    """Of a wider projection, as mixers have it, without a copy of it."""
    D, W = (5, 4) if DEVICE == "cpu" else (300, 4)
    gpu, cpu = (conv.short_conv_silu, shift.short_conv_silu) if silu else (conv.short_conv, shift.short_conv)

    def run(wider, w, c, state):
        return (cpu if wider.dtype == torch.float64 else gpu)(wider[..., 3 : 3 + D], w, c, state)

    agree(run, (numbers(B, T, D + 8), numbers(D, W), numbers(D), numbers(B, W - 1, D)), dtype, bound)


ANGLES = numbers(2, B, T, 2).to(DEVICE)  # "cosines and sines" of no angle: a map as linear as with one
KERNELS = {
    "gated_norm": (
        lambda x, z, w, d, u: gpu_norm.gated_rms_norm(x, z, w, 4, 1e-3, True, (d, u)),
        ((B, T, 8), (B, T, 8), (4,), (2,), (B, T, 2, 4)),
    ),
    "rms_norm": (lambda x, w: gpu_norm.gated_rms_norm(x, None, w, 8), ((B, T, 8), (8,))),
    "unit": (lambda x: gpu_norm.unit(x, 1e-3), ((B, T, 2, 4),)),
    "head_norm": (
        lambda x, w, gate, *bonus: headnorm.head_norm(x, w, None, gate, bonus, 1e-3),
        ((B, T, 2, 4), (8,), (B, T, 8), *[(B, T, 2, 4)] * 3, (2, 4)),
    ),
    "removal": (
        lambda *inputs: gpu_removal.removal(*inputs, -0.6, -1.5, 1e-3),
        (*[(B, T, 2, 4)] * 3, (2, 4), (2, 4)),
    ),
    "rotate": (lambda x: rotary.rotate(x, *ANGLES), ((B, T, 2, 4),)),
    "scaled": (gpu_scaled.scaled, ((B, T, 2, 4), (B, T, 2))),
    "token_shift": (gpu_shift.call, ((B, T, 8), (3, 8), (B, 8))),
    "swiglu": (swiglu.call, ((B, T, 8),)),
    "short_conv_silu": (lambda x, w: conv.short_conv_silu(x, w)[0], ((B, T, 8), (8, 3))),
}


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.seen.append(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_by_itself_and_as_an_operator(name):
    """The same bits called directly, through the dispatcher, and from a compiled graph."""
    run, shapes = KERNELS[name]
    inputs = [numbers(*shape, seed=i).to(DEVICE) for i, shape in enumerate(shapes)]
    found = gradients(run, inputs)
    assert "Direct" in type(found[0].grad_fn).__name__
    with Watching() as mode:
        watched = gradients(run, inputs)
    op = f"riverrun::{'gated_norm' if name == 'rms_norm' else name}_gpu"
    assert op in mode.seen and (name == "rotate" or f"{op}_backward" in mode.seen)
    compiled = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"), inputs)
    for a, b, c in zip(found, watched, compiled, strict=True):
        assert a.dtype == b.dtype == c.dtype and torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("name", KERNELS)
def test_second_derivatives(name):
    """Refused, whoever watches; only a rotation is its own derivative."""
    run, shapes = KERNELS[name]
    for context in (nullcontext(), Watching()):
        inputs = [numbers(*shape, seed=i).to(DEVICE).requires_grad_() for i, shape in enumerate(shapes)]
        with context:
            y = run(*inputs)
            y = sum(v.square().sum() for v in y) if isinstance(y, tuple) else y.square().sum()
            first = torch.autograd.grad(y, inputs, create_graph=True)[0]
            if name == "rotate":
                (second,) = torch.autograd.grad(first.sum(), inputs)
                squares = 2 * ANGLES.square().sum(0)[:, :, None]
                torch.testing.assert_close(second, torch.cat([squares, squares], -1).expand_as(second))
            else:
                with pytest.raises(RuntimeError, match="no second derivative"):
                    first.sum().backward()


def test_parts_of_a_padded_map():
    """The same parts and gradients as without rows of zeros below the weight."""
    layer, sizes = nn.Linear(6, 21, bias=False, dtype=torch.float64), (10, 8, 3)
    results = []
    for run in (padded, parts):
        x = numbers(B, T, 6).double().requires_grad_()
        found = run(layer, x, sizes)
        assert [p.shape[-1] for p in found] == list(sizes)
        y = torch.cat(found, -1)
        results.append([y, *torch.autograd.grad(y, (x, layer.weight), numbers(*y.shape).double())])
    for a, b in zip(*results, strict=True):
        assert float((a - b).abs().max()) < 1e-12  # sums in another order


@dtypes
def test_what_a_gated_mlp_remakes(dtype, bound):
    """Gradients of its weights, and that nothing of the inner width is kept but what the first map gave."""
    width, inner = (6, 10) if DEVICE == "cpu" else (96, 1300)
    torch.manual_seed(0)
    mlp = GatedMLP(width, inner).double()
    mine = GatedMLP(width, inner).to(DEVICE, dtype)
    mine.load_state_dict(mlp.state_dict())
    mlp.load_state_dict(mine.state_dict())  # the same rounded numbers
    x = numbers(B, T, width).to(dtype)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x)
    for layer, given, context in ((mlp, x.double(), nullcontext()), (mine, x.to(DEVICE), hooks)):
        with context:
            y = layer(given)
        y.backward(numbers(*y.shape).to(y))
    assert inner not in {x.shape[-1] for x in kept if x.shape[0] == B}
    for a, b in zip(mine.parameters(), mlp.parameters(), strict=True):
        assert float((a.grad.cpu().double() - b.grad).abs().max() / b.grad.abs().max()) < bound


@dtypes
@pytest.mark.parametrize(
    "make", [partial(RWKV7, 64, 2, 8, 8, 8), partial(ChannelMix, 64, 96)], ids=["mixer", "mlp"]
)
def test_a_whole_layer(make, dtype, bound):
    """RWKV-7's, with a state and resets: y, the state, and gradients of x and every parameter."""
    torch.manual_seed(0)
    true = make()
    with torch.no_grad():
        for p in true.parameters():
            p.copy_(p.to(dtype))
    mine = make().to(DEVICE, dtype)
    mine.load_state_dict(true.state_dict())
    true = true.double()
    x = numbers(B, T, 64).to(dtype)
    reset = torch.zeros(B, T, dtype=torch.bool)
    reset[0, 3] = True
    results = []
    for layer, given in ((true, x.double()), (mine, x.to(DEVICE))):
        x = given.requires_grad_()
        _, state = layer(x.detach()[:, :4], None, None)
        y, state = layer(x, state, reset.to(x.device))
        (y * numbers(*y.shape).to(y)).sum().backward()
        results.append([y, *leaves(state), x.grad, *(p.grad for p in layer.parameters())])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        a, b = b.detach().cpu().double(), a.detach()
        assert float((a - b).abs().max() / b.abs().max()) < 5 * bound, i


@pytest.mark.parametrize(
    "make", [partial(RWKV7, 64, 2, 8, 8, 8), partial(Mamba2, 32, 2, 8), partial(GatedMLP, 32, 48)],
    ids=["rwkv7", "mamba2", "mlp"],
)  # fmt: skip
def test_layers_compile(make):
    """In one graph, with the gradients of the eager layer; what is remade there is kept here."""
    torch.manual_seed(0)
    layer = make().to(DEVICE)
    x = numbers(B, T, layer.width if hasattr(layer, "width") else 32).to(DEVICE)
    results = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        given = x.clone().requires_grad_()
        y = call(given)
        y = y[0] if isinstance(y, tuple) else y
        wanted = [given, *layer.parameters()]
        results.append([y, *torch.autograd.grad(y, wanted, numbers(*y.shape).to(y))])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        assert float((a - b).abs().max() / b.abs().max()) < 5 * BOUND, i
