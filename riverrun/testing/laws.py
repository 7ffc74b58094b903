"""The laws: each a function whose docstring is the promise, run on any mixer under float64.

    check(lambda: MyMixer(16), Row("MyMixer", arxiv="", op="delta"))       raises AssertionError, naming the law

A law is called as `law(make, row)`: `make()` builds the mixer at width WIDTH (the laws seed it), `row` says what is
claimed of it. Which laws concern a row is said by `laws_for`; a law named in `row.breaks` is expected to fail.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun import state as states
from riverrun.mixers import Row
from riverrun.state import leaves, tree_map

from .tolerance import UNIT, close, close_states

BATCH, WIDTH = 2, 16
Make = Callable[[], nn.Module]
Law = Callable[[Make, Row], None]


def instance(make: Make) -> nn.Module:
    """A mixer whose parameters are the same at every call and away from special values: zeros hide mistakes."""
    torch.manual_seed(0)
    mixer = make().double()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return mixer


def inputs(T: int, seed: int = 0) -> Tensor:
    return torch.randn(
        BATCH, T, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(T + seed)
    )


def gradients(outputs: list[Tensor], wanted: list[Tensor]) -> list[Tensor]:
    """Gradients of Σ |output|², zeros where there is none."""
    loss = torch.stack([o.abs().square().sum() for o in outputs if o.requires_grad]).sum()
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]


def floats(state) -> list[Tensor]:
    return [x for x in leaves(state) if x.is_floating_point() or x.is_complex()]


def shape(make: Make, row: Row) -> None:
    """y has x's shape and dtype, for T = 1, a prime T and T past a chunk."""
    mixer = instance(make)
    for T in (1, 13, 67):
        y, _ = mixer(inputs(T))
        assert y.shape == (BATCH, T, WIDTH), f"T = {T}: y has shape {tuple(y.shape)}"
        assert y.dtype == torch.float64, f"y is {y.dtype} for float64 input"


def agreement(make: Make, row: Row) -> None:
    """Every implementation gives the sequential one's output, final state and gradients, also of the initial state."""
    mixer, x = instance(make), inputs(67).requires_grad_()
    reset = torch.zeros(BATCH, 67, dtype=torch.bool)
    reset[0, 30], reset[1, 64] = True, True
    start = None if row.state == "none" else states.detach(mixer(inputs(5))[1])
    reference = None
    for impl in reversed(ops.OPS[row.op].impls):
        begin = tree_map(lambda s: s.clone().requires_grad_(s.is_floating_point()), start)
        with ops.forced(**{row.op: impl}):
            try:
                y, end = mixer(x, begin, reset) if row.state != "none" else mixer(x)
            except ValueError as error:  # an implementation for another device
                if "cannot run" in str(error):
                    continue
                raise
        grads = gradients([y, *floats(end)], [x, *mixer.parameters(), *floats(begin)])
        if reference is None:
            reference = y, end, grads
        close(y, reference[0], f"{impl}, output")
        close_states(end, reference[1], impl)
        for i, (a, b) in enumerate(zip(grads, reference[2], strict=True)):
            close(a, b, f"{impl}, gradient {i}")


def split(make: Make, row: Row) -> None:
    """Continuing from a returned state is the same as never having stopped, wherever one stops."""
    mixer, x = instance(make), inputs(67)
    whole, last = mixer(x)
    for t in (1, 16, 33, 66):
        first, state = mixer(x[:, :t])
        second, end = mixer(x[:, t:], state)
        close(torch.cat([first, second], 1), whole, f"stopped at {t}")
        if row.state == "constant":
            close_states(end, last, f"stopped at {t}")


def decode(make: Make, row: Row) -> None:
    """One step at a time gives the whole-sequence output."""
    mixer, x, state, ys = instance(make), inputs(20), None, []
    for t in range(20):
        y, state = mixer(x[:, t : t + 1], state)
        ys.append(y)
    close(torch.cat(ys, 1), mixer(x)[0], "step by step")


def causality(make: Make, row: Row) -> None:
    """The gradient of y[t] to x[t+1:] is exactly zero, and to x[:t+1] is not."""
    mixer, x = instance(make), inputs(67).requires_grad_()
    for t in (0, 15, 65):
        (grad,) = torch.autograd.grad(mixer(x)[0][:, t].sum(), x)
        assert grad[:, t + 1 :].abs().max() == 0, f"y[{t}] depends on x[{t + 1}:]"
        assert grad[:, t].abs().max() > 0, f"y[{t}] does not depend on x[{t}]"
        assert grad[:, : t + 1].abs().max() > 0, f"y[{t}] does not depend on x[:{t + 1}]"


def reset(make: Make, row: Row) -> None:
    """A reset at t is a fresh start at t: two documents packed in one row equal two rows, gradients too."""
    mixer, x = instance(make), inputs(45).requires_grad_()
    before = states.detach(mixer(inputs(7))[1])
    for t in (0, 1, 20, 44):
        flags = torch.zeros(BATCH, 45, dtype=torch.bool)
        flags[:, t] = True
        packed, end = mixer(x, before, flags)
        alone, fresh_end = mixer(x[:, t:])
        pieces = [mixer(x[:, :t], before)[0], alone] if t else [alone]
        close(packed, torch.cat(pieces, 1), f"reset at {t}")
        close(mixer(x[:, -1:], end)[0], mixer(x[:, -1:], fresh_end)[0], f"going on after a reset at {t}")
        wanted = [x, *mixer.parameters()]
        for i, (a, b) in enumerate(zip(gradients([packed], wanted), gradients(pieces, wanted), strict=True)):
            close(a, b, f"reset at {t}, gradient {i}")
    flags = torch.zeros(BATCH, 45, dtype=torch.bool)
    flags[0, 20] = True
    other = mixer(x, before, flags)[0][1]
    close(other, mixer(x, before)[0][1], "the row without a reset")


def independence(make: Make, row: Row) -> None:
    """Sequences in a batch do not see each other."""
    mixer, x = instance(make), inputs(33)
    for i in range(BATCH):
        close(mixer(x)[0][i : i + 1], mixer(x[i : i + 1])[0], f"sequence {i} alone")


def select(make: Make, row: Row) -> None:
    """Picking, repeating or reordering rows of a state continues just those sequences, and harms no other."""
    mixer, x = instance(make), inputs(33)
    with torch.no_grad():
        _, state = mixer(x[:, :20])
        whole, _ = mixer(x[:, 20:], state)
        for rows in ([1], [1, 0], [0, 1, 1]):
            y, _ = mixer(x[rows, 20:], states.select(state, rows))
            close(y, whole[rows], f"rows {rows}")
        mixer(inputs(13, seed=1), state)
        close(mixer(x[:, 20:], state)[0], whole, "the same state a second time")


def trained(make: Make, row: Row) -> None:
    """Every parameter receives a gradient."""
    mixer = instance(make)
    mixer(inputs(33))[0].square().sum().backward()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.abs().max() > 0, f"parameter {name} has no gradient"


def state_size(make: Make, row: Row) -> None:
    """The state has the same bytes after 70 and 500 steps, or those the row claims."""
    mixer = instance(make)
    with torch.no_grad():
        short, long = (states.nbytes(mixer(inputs(T))[1]) for T in (70, 500))
    assert short > 0, "there is no state"
    assert (long > short) == (row.state == "grows"), f"{short} bytes after 70 steps, {long} after 500"


def half(make: Make, row: Row) -> None:
    """In bfloat16 and float16 the output is finite and within a derived bound of float64's."""
    x = inputs(33)
    for dtype in (torch.bfloat16, torch.float16):
        mixer = instance(make).to(dtype)
        rough = mixer(x.to(dtype))[0]
        exact = mixer.double()(x.to(dtype).double())[0]  # the same rounded weights and input
        assert rough.dtype == dtype, f"y is {rough.dtype} for {dtype} input"
        assert torch.isfinite(rough).all(), f"not finite in {dtype}"
        found = (rough.double() - exact).norm() / exact.norm()
        # some 16 roundings of half a unit lie on a path through projections, gates, memory and norms; they add like a
        # random walk, sqrt(16) / 2 = 2 units. Divisions by small norms amplify: ten times that
        assert found < 20 * UNIT[dtype], f"relative error {found:.4f} in {dtype}"


def extremes(make: Make, row: Row) -> None:
    """Inputs a thousand times too large give finite outputs and gradients, and split still holds."""
    mixer, x = instance(make), (1e3 * inputs(67)).requires_grad_()
    whole, _ = mixer(x)
    assert torch.isfinite(whole).all(), "not finite for large inputs"
    (grad,) = torch.autograd.grad(whole.sum(), x)
    assert torch.isfinite(grad).all(), "gradients are not finite for large inputs"
    zero, _ = mixer(torch.zeros_like(x))
    assert torch.isfinite(zero).all(), "not finite for zeros"
    if row.state != "none":
        first, state = mixer(x[:, :20])
        close(torch.cat([first, mixer(x[:, 20:], state)[0]], 1), whole, "large inputs, split", 1e-6)


def bounded(make: Make, row: Row) -> None:
    """2,000 steps of bounded input give bounded output."""
    with torch.no_grad():
        y = instance(make)(inputs(2000))[0].abs()
    early, late = y[:, :200].max(), y[:, 1000:].max()
    assert late <= 10 * early, f"output grows from {early:.3g} to {late:.3g}"


def save(make: Make, row: Row) -> None:
    """A state written to disk and read back continues bit for bit."""
    mixer, x = instance(make), inputs(33)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, state = mixer(x[:, :20])
        states.save(state, Path(folder) / "state.safetensors")
        restored, _ = states.load(Path(folder) / "state.safetensors")
        assert torch.equal(mixer(x[:, 20:], restored)[0], mixer(x[:, 20:], state)[0]), (
            "restored state differs"
        )


def compiles(make: Make, row: Row) -> None:
    """torch.compile(fullgraph=True) gives the eager result, backward included."""
    torch.compiler.reset()
    mixer, x = instance(make), inputs(33).requires_grad_()
    # tracing is what a mixer can break; the code generator behind it is PyTorch's own and takes minutes
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, state = mixer(x)
    z, end = compiled(x)
    close(z, y, "compiled output")
    close_states(end, state, "compiled")
    wanted = [x, *mixer.parameters()]
    for a, b in zip(gradients([z], wanted), gradients([y], wanted), strict=True):
        close(a, b, "compiled gradient")


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        shape, agreement, split, decode, causality, reset, independence, select, trained, state_size, half, extremes,
        bounded, save, compiles,
    )
}  # fmt: skip
OF_STATE = {"split", "decode", "reset", "select", "state_size", "save"}


def laws_for(row: Row) -> Iterator[tuple[str, Law]]:
    """The laws that concern a row: those of state only if it keeps one, causality only if it claims it."""
    for name, law in LAWS.items():
        if name in OF_STATE and row.state == "none":
            continue
        if (name == "causality" and not row.causal) or (name == "agreement" and not row.op):
            continue
        if name == "compiles" and not row.compiles:
            continue
        yield name, law


def check(make: Make, row: Row) -> None:
    """Hold one mixer to every law that concerns it; AssertionError names the first that fails."""
    for name, law in laws_for(row):
        if name in row.breaks:
            continue
        try:
            law(make, row)
        except AssertionError as error:
            raise AssertionError(f"law '{name}' ({law.__doc__}): {error}") from error
