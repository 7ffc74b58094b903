"""Valid random arguments for every op and form: small, of any size, or at the ends of their ranges.

    case = make("outer", "key", Size(T=200, K=64), seed=1)
    y, state = ops.outer(*case.args, state=case.state, reset=case.reset)

The numbers are drawn in float64 on the CPU from the seed, so a case is the same on every machine; `Case.to`
rounds and moves it. Resets fall inside the first chunk, at a chunk's first step, at 0 and at random times.
The state is one that the recurrence can reach.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from riverrun import ops
from riverrun.recurrences.fold import fold
from riverrun.state import State, tree_map


@dataclass(frozen=True)
class Size:
    """Axes: G q/k heads, H heads, K keys, V values, D (or E) channels, N states, W taps, P units a head."""

    B: int = 2
    T: int = 133  # two chunks of 64 and a rest
    G: int = 2
    H: int = 4
    K: int = 5
    V: int = 3
    D: int = 6
    N: int = 4
    W: int = 4
    P: int = 5


SMALL = Size()


@dataclass(frozen=True)
class Case:
    """Arguments for one call of the op `op`."""

    op: str
    form: str
    args: tuple[Tensor | None, ...]
    state: State
    reset: Tensor | None

    def to(self, dtype: torch.dtype, device: str | torch.device = "cpu") -> Case:
        """Rounded to `dtype` (complex parts too) and moved; the state stays at least float32, as in ops."""
        wide = torch.promote_types(dtype, torch.float32)
        reset = None if self.reset is None else self.reset.to(device)
        args = tuple(None if x is None else cast(x, dtype).to(device) for x in self.args)
        return replace(
            self, args=args, state=tree_map(lambda x: cast(x, wide).to(device), self.state), reset=reset
        )


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    if not x.is_complex():
        return x.to(dtype)
    if dtype.itemsize < 4:
        raise ValueError(f"there is no complex {dtype}; use float32 or float64")
    return x.to(dtype.to_complex())


class Draw:
    """Random float64 numbers from one seed."""

    def __init__(self, seed: int, extreme: bool):
        self.generator, self.extreme = torch.Generator().manual_seed(seed), extreme

    def normal(self, *shape: int, large: float = 1.0) -> Tensor:
        """Standard normal; times `large` in an extreme case."""
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return x * large if self.extreme else x

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def pick(self, values: tuple[float, ...], *shape: int) -> Tensor:
        index = torch.randint(len(values), shape, generator=self.generator)
        return torch.tensor(values, dtype=torch.float64)[index]

    def between(self, usual: Tensor, ends: tuple[float, ...]) -> Tensor:
        """Usual values; in an extreme case values from `ends`."""
        return self.pick(ends, *usual.shape) if self.extreme else usual

    def log_decay(self, *shape: int) -> Tensor:
        """≤ 0: from almost nothing forgotten to almost all; extreme: nothing, and all within a step."""
        return self.between(3 * F.logsigmoid(self.normal(*shape) + 1), (0.0, -1e-3, -1.0, -50.0, -1000.0))


Args = tuple[Tensor | None, ...]


def _diagonal(form: str, s: Size, r: Draw) -> Args:
    a = r.between(r.uniform(s.B, s.T, s.D), (0.0, 1.0, -1.0, 0.999))
    if form == "complex":
        angle = 6.3 * r.uniform(s.B, s.T, s.D)
        b = torch.complex(r.normal(s.B, s.T, s.D, large=100), r.normal(s.B, s.T, s.D, large=100))
        return torch.polar(a.abs(), angle), b
    return a, r.normal(s.B, s.T, s.D, large=100)


def _selective(form: str, s: Size, r: Draw) -> Args:
    dt = r.between(F.softplus(r.normal(s.B, s.T, s.D) - 1), (0.0, 1e-3, 1.0, 20.0))
    A = -r.between(4 * r.uniform(s.D, s.N), (0.0, 1e-3, 1.0, 20.0))
    x, B, C = r.normal(s.B, s.T, s.D, large=10), r.normal(s.B, s.T, s.N), r.normal(s.B, s.T, s.N)
    low = r.between(2 * r.uniform(s.D, s.N) - 1, (-1.0, -0.5, 0.0)) if form == "signed" else None
    return x, dt, A, B, C, low


def _qkv(s: Size, r: Draw, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """k of length 1, as every model that needs it makes it; values are what an extreme case enlarges."""
    q, k = r.normal(s.B, s.T, heads, s.K), F.normalize(r.normal(s.B, s.T, heads, s.K), dim=-1)
    return q, k, r.normal(s.B, s.T, s.H, s.V, large=100)


def _decay(form: str, s: Size, r: Draw) -> Tensor | None:
    if form.startswith("none"):
        return None
    return r.log_decay(s.B, s.T, s.H, *((s.K,) if form.startswith("key") else ()))


def _outer(form: str, s: Size, r: Draw) -> Args:
    u = r.normal(s.H, s.K) if form.endswith("bonus") else None
    return *_qkv(s, r, s.G), _decay(form, s, r), u


def _mlstm(form: str, s: Size, r: Draw) -> Args:
    # the equation holds e^-m, so below -88 the definition itself leaves float32's range
    i = r.between(3 * r.normal(s.B, s.T, s.H), (-60.0, 0.0, 60.0, 500.0))
    return *_qkv(s, r, s.G), r.log_decay(s.B, s.T, s.H), i


def _delta(form: str, s: Size, r: Draw) -> Args:
    beta = r.between(2 * r.uniform(s.B, s.T, s.H), (0.0, 1.0, 2.0))
    return *_qkv(s, r, s.G), beta, _decay(form, s, r)


def _dplr(form: str, s: Size, r: Draw) -> Args:
    """As RWKV-7 makes them: a = -α κ and b = κ with |κ| = 1 and α in [0, 1]."""
    q, k, v = _qkv(s, r, s.H)
    kappa = F.normalize(r.normal(s.B, s.T, s.H, s.K), dim=-1)
    alpha = r.between(r.uniform(s.B, s.T, s.H, s.K), (0.0, 1.0))
    return q, k, v, r.log_decay(s.B, s.T, s.H, s.K), -alpha * kappa, kappa


def _fastweight(form: str, s: Size, r: Draw) -> Args:
    """A memory of width P inside. Steps small enough that each descends; extreme: no step, and no memory."""
    q, k, v = _qkv(s, r, s.H)
    W1, W2 = r.normal(s.H, s.K, s.P) / s.K**0.5, r.normal(s.H, s.P, s.V) / s.P**0.5
    lr = r.between(0.1 * r.uniform(s.B, s.T, s.H), (0.0, 1e-4))
    g = r.log_decay(s.B, s.T, s.H) if form == "decay" else None
    return q, k, v, W1, W2, lr, g, r.log_decay(s.B, s.T, s.H) - 0.1, None


def _softmax(form: str, s: Size, r: Draw) -> Args:
    return 3 * r.normal(s.B, s.T, s.H, large=100), r.normal(s.B, s.T, s.H, s.V, large=100)


def _short_conv(form: str, s: Size, r: Draw) -> Args:
    bias = r.normal(s.D) if form == "bias" else None
    return r.normal(s.B, s.T, s.D, large=100), r.normal(s.D, s.W), bias


def _cell(gates: int) -> Callable[[str, Size, Draw], Args]:
    def make(form: str, s: Size, r: Draw) -> Args:
        """Recurrent weights of spectral radius about a half: the state neither explodes nor turns chaotic."""
        R = r.normal(gates, s.H, s.P, s.P)
        R = 0.5 * R / s.P**0.5
        c = r.normal(gates, s.H, s.P) if form == "bias" else None
        return r.normal(s.B, s.T, gates, s.H, s.P, large=100), R, c

    return make


MAKERS: dict[str, tuple[tuple[str, ...], Callable[[str, Size, Draw], Args]]] = {
    "diagonal": (("real", "complex"), _diagonal),
    "selective": (("real", "signed"), _selective),
    "outer": (("none", "head", "key", "none bonus", "head bonus", "key bonus"), _outer),
    "mlstm": (("head",), _mlstm),
    "delta": (("none", "head", "key"), _delta),
    "dplr": (("key",), _dplr),
    "fastweight": (("none", "decay"), _fastweight),
    "softmax": (("head",), _softmax),
    "short_conv": (("bias", "no bias"), _short_conv),
    "short_conv_silu": (("bias", "no bias"), _short_conv),
    "elman": (("bias", "no bias"), _cell(1)),
    "lstm": (("bias", "no bias"), _cell(4)),
    "gru": (("bias", "no bias"), _cell(3)),
    "slstm": (("bias", "no bias"), _cell(4)),
}
FORMS: dict[str, tuple[str, ...]] = {op: forms for op, (forms, _) in MAKERS.items()}


def make(
    op: str, form: str, size: Size = SMALL, seed: int = 0, extreme: bool = False, state=True, reset=True
) -> Case:
    """Float64 arguments of `op` in one of its `FORMS`, with a state to continue from and resets if asked for.

    `extreme`: decays exactly 0 and 1, exponents and values a hundred times as large, within float16's range.
    """
    if op not in MAKERS or form not in FORMS[op]:
        raise ValueError(f"no form '{form}' of op '{op}'; there are {FORMS}")
    draw = Draw(seed, extreme)
    args = MAKERS[op][1](form, size, draw)
    before = _reached(op, form, size, seed) if state else None
    return Case(op, form, args, before, _resets(size, draw) if reset else None)


def cases(op: str, size: Size = SMALL, seed: int = 0, extreme: bool = False) -> Iterator[Case]:
    """Every form of an op, with a state and resets."""
    for form in FORMS[op]:
        yield make(op, form, size, seed, extreme)


def _reached(op: str, form: str, size: Size, seed: int) -> State:
    """What the recurrence arrives at after a few usual steps."""
    few = replace(size, T=5)
    args = MAKERS[op][1](form, few, Draw(seed + 1, extreme=False))
    with torch.no_grad():
        return fold(ops.OPS[op].recurrence, args)[1]


def _resets(size: Size, draw: Draw) -> Tensor:
    reset = draw.uniform(size.B, size.T) < 2 / size.T
    reset[-1, 0] = True
    for row, t in ((0, 7), (-1, 64)):
        if t < size.T:
            reset[row, t] = True
    return reset
