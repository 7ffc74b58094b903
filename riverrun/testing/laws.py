"""The laws: each a function whose docstring is the promise, run on any mixer under float64.

    check(lambda: MyMixer(16), Row("MyMixer", arxiv="", op="delta"))    raises AssertionError, naming the law

A law is called as `law(make, row)`: `make()` builds the mixer at width WIDTH (the laws seed it), `row` says
what is claimed of it. `laws_for` says which laws concern a row; one named in `row.breaks` must fail.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from riverrun import ops
from riverrun import state as states
from riverrun.mixers import Row
from riverrun.state import tree_map

from .probe import BATCH, WIDTH, Make, floats, gradients, inputs, instance, resets
from .tolerance import close, close_all, close_states, error, rounded

Law = Callable[[Make, Row], None]


def shape(make: Make, row: Row) -> None:
    """y has x's shape and dtype, whatever x's strides, for T = 1, a prime T and T past a chunk."""
    mixer = instance(make)
    for T in (1, 13, 67):
        x = inputs(T)
        y, _ = mixer(x)
        assert y.shape == (BATCH, T, WIDTH), f"T = {T}: y has shape {tuple(y.shape)}"
        assert y.dtype == torch.float64, f"y is {y.dtype} for float64 input"
        close(mixer(x.mT.contiguous().mT)[0], y, f"T = {T}, time along memory")
        close(mixer(x.repeat_interleave(2, 1)[:, ::2])[0], y, f"T = {T}, every other step of memory")


def agreement(make: Make, row: Row) -> None:
    """Every implementation gives the sequential one's output, final state and gradients."""
    mixer, x, reset = instance(make), inputs(67).requires_grad_(), resets(67, (0, 30), (1, 64))
    start = None if row.state == "none" else states.detach(mixer(inputs(5))[1])
    reference = None
    for impl in reversed(ops.OPS[row.op].impls):
        begin = tree_map(lambda s: s.clone().requires_grad_(s.is_floating_point()), start)
        with ops.forced(**{row.op: impl}):
            try:
                y, end = mixer(x, begin, reset)
            except ValueError as error:  # an implementation for another device
                if "cannot run" in str(error):
                    continue
                raise
        grads = gradients([y, *floats(end)], [x, *mixer.parameters(), *floats(begin)])
        if reference is None:
            reference = y, end, grads
        close(y, reference[0], f"{impl}, output")
        close_states(end, reference[1], impl)
        close_all(grads, reference[2], f"{impl}, gradient")


def split(make: Make, row: Row) -> None:
    """Continuing from a returned state is the same as never having stopped, gradients too."""
    mixer, x = instance(make), inputs(67).requires_grad_()
    wanted = [x, *mixer.parameters()]
    whole, last = mixer(x)
    slopes = gradients([whole], wanted)
    for t in (1, 16, 33, 66):
        first, state = mixer(x[:, :t])
        second, end = mixer(x[:, t:], state)
        close(torch.cat([first, second], 1), whole, f"stopped at {t}")
        if row.state == "constant":
            close_states(end, last, f"stopped at {t}")
        close_all(gradients([first, second], wanted), slopes, f"stopped at {t}, gradient")


def decode(make: Make, row: Row) -> None:
    """One step at a time gives the whole-sequence output."""
    mixer, x, state, ys = instance(make), inputs(20), None, []
    for t in range(20):
        y, state = mixer(x[:, t : t + 1], state)
        ys.append(y)
    close(torch.cat(ys, 1), mixer(x)[0], "step by step")


def causality(make: Make, row: Row) -> None:
    """y[t] depends on x[t] and x[t-1] and not at all on x[t+1:], or, if the row looks ahead, on all of it."""
    mixer, x = instance(make), inputs(67).requires_grad_()
    for t in (0, 15, 65):
        (grad,) = torch.autograd.grad(mixer(x)[0][:, t].sum(), x)
        future = grad[:, t + 1 :].abs().amax((0, 2))
        if row.causal:
            assert future.max() == 0, f"y[{t}] depends on x[{t + 1}:]"
        else:
            assert future.min() > 0, f"y[{t}] does not depend on all of x[{t + 1}:], against causal=False"
        assert grad[:, t].abs().max() > 0, f"y[{t}] does not depend on x[{t}]"
        assert not t or grad[:, t - 1].abs().max() > 0, f"y[{t}] does not depend on x[{t - 1}]"


def reset(make: Make, row: Row) -> None:
    """A reset at t is a fresh start at t: two documents packed in one row equal two rows, gradients too."""
    mixer, x = instance(make), inputs(45).requires_grad_()
    before = states.detach(mixer(inputs(7))[1])  # None where no state is kept
    for t in (0, 1, 20, 44):
        packed, end = mixer(x, before, resets(45, (0, t), (1, t)))
        alone, fresh_end = mixer(x[:, t:])
        pieces = [mixer(x[:, :t], before)[0], alone] if t else [alone]
        close(packed, torch.cat(pieces, 1), f"reset at {t}")
        close(mixer(x[:, -1:], end)[0], mixer(x[:, -1:], fresh_end)[0], f"going on after a reset at {t}")
        wanted = [x, *mixer.parameters()]
        close_all(gradients([packed], wanted), gradients(pieces, wanted), f"reset at {t}, gradient")
    # left padding is this: the prompts of a batch begin where they like
    packed, end = mixer(x, before, resets(45, (0, 20), (0, 31)))
    close(packed[1], mixer(x, before)[0][1], "the row without a reset")
    alone, fresh_end = mixer(x[:1, 31:])
    close(packed[:1, 31:], alone, "the row with two resets")
    after, fresh = (mixer(x[:n, :9], s)[0][:1] for n, s in ((BATCH, end), (1, fresh_end)))
    close(after, fresh, "going on where another row has no reset")


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
        other = inputs(13, seed=1)
        _, fork = mixer(other, state)
        close(mixer(x[:, 20:], state)[0], whole, "the same state a second time")
        forked, _ = mixer(torch.cat([x[:, :20], other, x[:, :5]], 1))
        close(mixer(x[:, :5], fork)[0], forked[:, 33:], "what went on from the state first")


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
    kept = long > short if row.state == "grows" else long == short
    assert kept, f"{short} bytes after 70 steps, {long} after 500; the row says '{row.state}'"


def half(make: Make, row: Row) -> None:
    """In bfloat16 and float16 the output is finite and within a derived bound of float64's."""
    x = inputs(33)
    for dtype in (torch.bfloat16, torch.float16):
        mixer = instance(make).to(dtype)
        rough = mixer(x.to(dtype))[0]
        exact = mixer.double()(x.to(dtype).double())[0]  # the same rounded weights and input
        assert rough.dtype == dtype, f"y is {rough.dtype} for {dtype} input"
        rounded(rough, exact, dtype)


def autocast(make: Make, row: Row) -> None:
    """Under torch.autocast to bfloat16 the same bound holds, carrying a state, and gradients are finite."""
    mixer, x = instance(make), inputs(33)
    exact = mixer(x)[0]
    mixer, x = mixer.float(), x.float()
    with torch.autocast(x.device.type, torch.bfloat16):
        rough, state = mixer(x[:, :20] if row.state != "none" else x)
        if row.state != "none":
            rough = torch.cat([rough, mixer(x[:, 20:], state)[0]], 1)
    rounded(rough, exact, torch.bfloat16)
    rough.float().square().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in mixer.parameters()), "gradients"


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
        # memories that learn from such inputs are chaotic: as far apart as inputs that differ by 4 roundings
        nudged = error(mixer(x * (1 + 2.0**-50))[0], whole)
        bound = max(1e-6, nudged)
        close(torch.cat([first, mixer(x[:, 20:], state)[0]], 1), whole, "large inputs, split", bound)


def bounded(make: Make, row: Row) -> None:
    """2,000 steps of bounded input give bounded output."""
    with torch.no_grad():
        y = instance(make)(inputs(2000))[0].abs()
    early, late = y[:, :200].max(), y[:, 1000:].max()
    assert late <= 3 * early, f"output grows from {early:.3g} to {late:.3g}"  # a running sum: tenfold


def save(make: Make, row: Row) -> None:
    """A state written to disk and read back continues bit for bit."""
    mixer, x = instance(make), inputs(33)
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        _, state = mixer(x[:, :20])
        states.save(state, Path(folder) / "state.safetensors")
        restored, _ = states.load(Path(folder) / "state.safetensors")
        same = torch.equal(mixer(x[:, 20:], restored)[0], mixer(x[:, 20:], state)[0])
        assert same, "the restored state continues differently"


def compiles(make: Make, row: Row) -> None:
    """torch.compile(fullgraph=True) gives the eager result with a state and resets, backward included."""
    torch.compiler.reset()
    mixer, x = instance(make), inputs(33).requires_grad_()
    given = x, states.detach(mixer(inputs(5))[1]), resets(33, (0, 9))
    # tracing is what a mixer can break; the code generator behind it is PyTorch's own and takes minutes
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    y, state = mixer(*given)
    z, end = compiled(*given)
    close(z, y, "compiled output")
    close_states(end, state, "compiled")
    wanted = [x, *mixer.parameters()]
    close_all(gradients([z], wanted), gradients([y], wanted), "compiled gradient")


LAWS: dict[str, Law] = {
    law.__name__: law
    for law in (
        shape, agreement, split, decode, causality, reset, independence, select, trained, state_size, half,
        autocast, extremes, bounded, save, compiles,
    )
}  # fmt: skip
OF_STATE = {"split", "decode", "select", "state_size", "save"}


def laws_for(row: Row) -> Iterator[tuple[str, Law]]:
    """The laws that concern a row: those of state if it keeps one, agreement if it stands on an op."""
    for name, law in LAWS.items():
        if name in OF_STATE and row.state == "none":
            continue
        if name == "agreement" and not row.op:
            continue
        if name != "compiles" or row.compiles:
            yield name, law


def check(make: Make, row: Row) -> None:
    """Hold one mixer to every law that concerns it; AssertionError names the first that fails.

    A law named in `row.breaks` must fail: a claim that has become too modest is found as well.
    """
    for name, law in laws_for(row):
        try:
            law(make, row)
        except Exception as error:  # a law may also be broken by what the mixer or PyTorch raises
            if name not in row.breaks:
                raise AssertionError(f"law '{name}' ({law.__doc__}): {error}") from error
        else:
            assert name not in row.breaks, f"law '{name}' holds, but the row says: {row.breaks[name]}"
