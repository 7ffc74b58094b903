"""Triton's matrix memories against their definitions: in Triton's interpreter on a CPU, or compiled on a GPU.

Without a GPU run with TRITON_INTERPRET=1 and a Triton that the environment offers; else the file skips. The
operators' own forward and backward are called, so that the interpreter needs no device and the registration
is left to a GPU.
"""

import itertools
import os

import numpy as np
import pytest
import torch

from riverrun.recurrences.delta import delta
from riverrun.recurrences.dplr import dplr
from riverrun.recurrences.fold import fold
from riverrun.recurrences.mlstm import mlstm
from riverrun.recurrences.outer import outer
from riverrun.state import leaves

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (torch.cuda.is_available() or INTERPRETED):
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

from triton.runtime import interpreter  # noqa: E402

from riverrun.kernels.gpu import delta as gpu_delta  # noqa: E402
from riverrun.kernels.gpu import dplr as gpu_dplr  # noqa: E402
from riverrun.kernels.gpu import memory, plan, step  # noqa: E402
from riverrun.kernels.gpu import outer as gpu_outer  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the definition runs on the CPU, and so do the other workers
FORWARD = {"outer": gpu_outer._forward, "mlstm": gpu_outer._mlstm_forward, "delta": gpu_delta._forward,
           "dplr": gpu_dplr._forward}  # fmt: skip
BACKWARD = {"outer": gpu_outer._backward, "mlstm": gpu_outer._mlstm_backward, "delta": gpu_delta._backward,
            "dplr": gpu_dplr._backward}  # fmt: skip
MEANING = {"outer": outer, "mlstm": mlstm, "delta": delta, "dplr": dplr}
FORMS = ["outer", "outer-head", "outer-key", "outer-bonus", "outer-key-bonus", "outer-head-bonus", "mlstm",
         "delta", "delta-head", "delta-key", "dplr"]  # fmt: skip


def inputs(form: str, B=1, T=70, G=1, H=2, K=16, V=16, strength=1.0, seed=0, length=1.0):
    """The arguments of a form's op in float64; keys have length one, if no other is asked for, where a
    correction needs it to be stable."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    rule = form.split("-")[0]
    G = H if rule == "dplr" else G
    q, k, v = normal(B, T, G, K), normal(B, T, G, K), normal(B, T, H, V)
    k = length * torch.nn.functional.normalize(k, dim=-1) if rule in ("delta", "dplr") else k
    g = None
    if "head" in form:
        g = -strength * normal(B, T, H).abs()
    if "key" in form or rule == "dplr":
        g = -strength * normal(B, T, H, K).abs()
    u = normal(H, K) if "bonus" in form else None
    if rule == "outer":
        return q, k, v, g, u
    if rule == "mlstm":
        return q, k, v, -normal(B, T, H).abs(), 3 * normal(B, T, H)
    if rule == "delta":
        return q, k, v, 2 * torch.rand(B, T, H, generator=make, dtype=torch.float64), g
    b = length * torch.nn.functional.normalize(normal(B, T, H, K), dim=-1)
    return q, k, v, g, -b * torch.rand(B, T, H, 1, generator=make, dtype=torch.float64), b


def states(form: str, args, seed=1):
    v, K = args[2], args[1].shape[-1]
    make = torch.Generator().manual_seed(seed)
    S = torch.randn(v.shape[0], v.shape[2], K, v.shape[3], generator=make, dtype=torch.float64)
    return (S, S[..., 0] * 0.5, S[..., 0, 0]) if form == "mlstm" else (S,)


def compare(form: str, dtype=torch.float32, bound=2e-4, state=True, reset=False, grads=True, **sizes):
    """Outputs, last state and every gradient against the definition in float64."""
    rule = form.split("-")[0]
    args = inputs(form, **sizes)
    start = states(form, args) if state else (None,) * (3 if rule == "mlstm" else 1)
    B, T = args[2].shape[:2]
    flags = None
    if reset:
        flags = torch.zeros(B, T, dtype=torch.bool)
        flags[0, [0, T // 3, T // 3 + 1, 2 * T // 3]] = True
    narrow = [None if x is None else x.to(dtype).to(DEVICE) for x in args]
    exact = [None if x is None else x.double().cpu().requires_grad_() for x in narrow]
    start64 = [None if s is None else s.requires_grad_() for s in start]
    whole = None if not state else tuple(start64) if rule == "mlstm" else start64[0]
    y64, last64 = fold(MEANING[rule], tuple(exact), whole, flags)
    start32 = [None if s is None else s.detach().float().to(DEVICE) for s in start]
    moved = None if flags is None else flags.to(DEVICE)
    out = FORWARD[rule](*narrow, *start32, moved, grads)
    count = 1 + len(start)
    close("y", out[0], y64, bound)
    for n, (mine, true) in enumerate(zip(out[1:count], leaves(last64), strict=True)):
        close(f"state {n}", mine, true, bound)
    if not grads:
        return
    make = torch.Generator().manual_seed(9)
    dy = torch.randn(y64.shape, generator=make, dtype=torch.float64).to(dtype)
    dlast = [
        torch.randn(s.shape, generator=make, dtype=torch.float64) if state else None for s in leaves(last64)
    ]
    loss = (y64 * dy.double()).sum() + sum(
        (s * d).sum() for s, d in zip(leaves(last64), dlast) if d is not None
    )
    wanted = [x for x in itertools.chain(exact, start64) if x is not None]
    true = torch.autograd.grad(loss, wanted)
    dlast = [None if d is None else d.float().to(DEVICE) for d in dlast]
    found = BACKWARD[rule](*narrow, *start32, moved, *out, dy.to(DEVICE), *dlast)
    assert found[-1] is None  # reset
    mine = [(d, x) for d, x in zip(found, itertools.chain(narrow, start32)) if x is not None]
    for n, ((d, x), t) in enumerate(zip(mine, true, strict=True)):
        assert d.dtype == x.dtype and d.shape == x.shape
        close(f"gradient {n}", d, t, 2 * bound)


def close(name: str, mine: torch.Tensor, true: torch.Tensor, bound: float):
    error = (mine.double().cpu() - true).norm() / true.norm().clamp_min(1e-30)
    assert error <= bound, f"{name}: relative error {error:.2e} over {bound:.0e}"


# float32: the compiled kernels multiply in three tf32 products, a unit in the last place or two each; sums of
# a few hundred terms and the triangular inverse bring that near 1e-5, and 2e-4 leaves room for correlated
# keys.
@pytest.mark.parametrize("form", FORMS)
def test_definition(form):
    compare(form)


@pytest.mark.parametrize("form", FORMS)
def test_reset(form):
    compare(form, reset=True, T=50)


@pytest.mark.parametrize("form", ["outer-head", "outer-key-bonus", "mlstm", "delta-key"])
def test_groups_padding_no_state(form):
    compare(form, state=False, B=2, G=2, H=4, K=20, V=24, T=33)


@pytest.mark.parametrize("form", ["outer-key", "outer-key-bonus", "delta-key", "dplr"])
def test_strong_decay(form):
    """Decays far under the smallest float: nothing overflows, because no exponent is positive."""
    compare(form, strength=300.0, T=40)


@pytest.mark.parametrize("form", ["outer-key", "outer-key-bonus", "delta-key", "dplr"])
def test_pairs_that_cancel(form, monkeypatch):
    """The gradient of decays per key is what pairs leave that cancel in it. They do if both sides have the
    same factors to the last bit, whatever the order in which a chip adds: at most 3e-6 is left (three tf32
    products), and 6e-6 to 1.3e-5 if a chunk's whole decay is one rounding off."""
    if INTERPRETED:  # sums that do not end as running sums do
        monkeypatch.setattr(interpreter.ReduceOps, "sum", backwards)
    compare(form, bound=2.2e-6)


def backwards(op, x):
    total = np.sum(np.flip(x.handle.data, op.axis), op.axis, keepdims=op.keep_dims)
    return op.to_tensor(total, x.dtype)


@pytest.mark.parametrize("form", ["outer-head", "outer-key", "mlstm", "delta-head", "delta-key", "dplr"])
@pytest.mark.parametrize("reset", [False, True])
def test_parts(form, reset, monkeypatch):
    """Time cut into parts that are walked at the same time."""
    monkeypatch.setattr(plan.Inputs, "parts", property(lambda self: 3))
    compare(form, T=150, reset=reset, V=20)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("form", ["delta", "delta-head", "delta-key", "dplr"])
def test_carried_values(form, parts, monkeypatch):
    """Values a chunk ahead of the walk in registers, as where tiles fill shared memory."""
    monkeypatch.setattr(memory, "ahead", lambda x, BV, all: (1, True))
    monkeypatch.setattr(plan.Inputs, "parts", property(lambda self: parts))
    compare(form, T=150, reset=True, V=20)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 3])
def test_steps(form, T):
    assert step.FEW >= 3
    compare(form, T=T, grads=False, K=24, G=1, H=2, reset=T == 3 and form != "outer")


@pytest.mark.parametrize("form", FORMS)
def test_one_step_with_gradients(form):
    compare(form, T=1)


@pytest.mark.parametrize(
    "form", ["outer-head", "outer-key-bonus", "mlstm", "delta-head", "delta-key", "dplr"]
)
def test_long_chunks(form, monkeypatch):
    """The chunk length of bfloat16, in numbers that the interpreter multiplies exactly."""
    monkeypatch.setattr(plan, "length", lambda bf16, long: 64)
    compare(form, T=130)


# bfloat16 keeps 8 bits: each product's operands are rounded by up to 2^-9, states and pair weights once more,
# and the errors of independent terms add as their root mean square; 2e-2 is some five such roundings.
@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not multiply bfloat16")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_half(form, width):
    compare(form, dtype=torch.bfloat16, bound=2e-2, T=130, K=width, V=width)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not multiply bfloat16")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [64, 128])
def test_half_reset(form, width):
    compare(form, dtype=torch.bfloat16, bound=2e-2, T=300, K=width, V=width, reset=True)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not multiply bfloat16")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K, V", [(19, 21), (20, 24)])
def test_half_rows_that_are_not_aligned(form, K, V):
    compare(form, dtype=torch.bfloat16, bound=2e-2, T=133, K=K, V=V, reset=True)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not multiply bfloat16")
@pytest.mark.parametrize(
    "form", ["outer-head", "outer-key", "mlstm", "delta", "delta-head", "delta-key", "dplr"]
)
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_half_parts(form, reset, width, monkeypatch):
    monkeypatch.setattr(plan.Inputs, "parts", property(lambda self: 3))
    compare(form, dtype=torch.bfloat16, bound=2e-2, T=450, K=width, V=width, reset=reset)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not multiply bfloat16")
@pytest.mark.parametrize("form", ["delta", "delta-head", "delta-key", "dplr"])
@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("width", [64, 128])
def test_half_many_heads(form, reset, width, monkeypatch):
    """More heads than multiprocessors: walks hold more values a program."""
    monkeypatch.setattr(plan, "processors", lambda device: 0)
    compare(form, dtype=torch.bfloat16, bound=2e-2, T=330, K=width, V=width, reset=reset)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not multiply bfloat16")
@pytest.mark.parametrize("form", ["delta", "delta-head", "delta-key", "dplr"])
def test_half_long_keys(form):
    """Inverses whose numbers leave float16's range, in which they are made first.

    States grow to 1e6 here: rounding q, k and v to bfloat16 once more moves y by 1.1e-2 to 2.2e-2 (six ways
    of rounding) and gradients by 3e-2 to 9e-2, dplr's most. Decays per key are multiplied into operands,
    which rounds them twice.
    """
    bound = 4e-2 if form in ("delta-key", "dplr") else 2e-2
    compare(form, dtype=torch.bfloat16, bound=bound, T=6, K=64, V=64, strength=0.01, length=15.0)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter does not multiply bfloat16")
@pytest.mark.parametrize("form", ["outer-key", "delta-key", "dplr"])
def test_half_strong_decay(form):
    compare(form, dtype=torch.bfloat16, bound=2e-2, T=130, K=64, V=64, strength=300.0)


@pytest.mark.skipif(INTERPRETED, reason="slow, and shared memory is what is tested")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("K, V", [(128, 64), (256, 128)])
def test_wide(form, dtype, K, V):
    """The largest keys fit on the chip in every dtype. float16's tf32 products round to 11 bits."""
    compare(
        form,
        dtype=dtype,
        bound={torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-4}[dtype],
        K=K,
        V=V,
    )
