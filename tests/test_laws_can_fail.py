"""A law that nothing can break promises nothing: for each, a mixer that is right but for one defect."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from riverrun import ops
from riverrun.mixers import Row
from riverrun.nn import carried
from riverrun.testing.laws import LAWS, WIDTH, check

ROW = Row("Leaky", arxiv="", op="diagonal")


class Leaky(nn.Module):
    """Right in every respect."""

    def __init__(self):
        super().__init__()
        self.width = WIDTH
        self.inp = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x, state=None, reset=None):
        state = carried(self, x, state, reset)
        u, a, z = self.inp(x).chunk(3, -1)
        h, state = ops.diagonal(a.sigmoid(), (-a).sigmoid() * u, state=state, reset=reset)
        return self.out(h * F.silu(z)), state


class OtherDtype(Leaky):
    def forward(self, x, state=None, reset=None):
        y, state = super().forward(x, state, reset)
        return y.float(), state


class NoState(Leaky):
    def forward(self, x, state=None, reset=None):
        return super().forward(x, None, reset)


class OtherStep(Leaky):
    """Decoding by another program, which is nearly the same."""

    def forward(self, x, state=None, reset=None):
        y, state = super().forward(x, state, reset)
        return (1.0001 * y if x.shape[1] == 1 else y), state


class Peeks(Leaky):
    def forward(self, x, state=None, reset=None):
        y, state = super().forward(x, state, reset)
        return y + 1e-3 * F.pad(x[:, 1:], (0, 0, 0, 1)), state


class NoReset(Leaky):
    def forward(self, x, state=None, reset=None):
        return super().forward(x, state)


class SeesBatch(Leaky):
    def forward(self, x, state=None, reset=None):
        y, state = super().forward(x, state, reset)
        return y + 1e-3 * y.mean(0), state


class WritesState(Leaky):
    """Decays the state that it was given in place, as if nobody else could hold it."""

    def forward(self, x, state=None, reset=None):
        y, after = super().forward(x, state, reset)
        if state is not None and not torch.is_grad_enabled():
            state.mul_(0.9)
        return y, after


class Idle(Leaky):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))


class Grows(Leaky):
    def forward(self, x, state=None, reset=None):
        past, state = (None, state) if state is None else state
        y, state = super().forward(x, state, reset)
        return y, (x if past is None else torch.cat([past, x], 1), state)


class Narrow(Leaky):
    """Leaves float16's range on the way."""

    def forward(self, x, state=None, reset=None):
        y, state = super().forward(1e5 * x / 1e5, state, reset)
        return y, state


class NotUnderAutocast(Leaky):
    """Adds up a long sum by a matrix product, which autocast rounds to bfloat16 and back."""

    def forward(self, x, state=None, reset=None):
        y, state = super().forward(x, state, reset)
        large = y + 1e3
        return large @ torch.eye(WIDTH, dtype=large.dtype) - 1e3, state


class Overflows(Leaky):
    def forward(self, x, state=None, reset=None):
        y, state = super().forward(x, state, reset)
        return y * x.exp() / x.exp(), state


class Adds(Leaky):
    """Adds up instead of averaging."""

    def forward(self, x, state=None, reset=None):
        u, _, z = self.inp(x).chunk(3, -1)
        h, state = ops.diagonal(torch.ones_like(u), u.square(), state=state, reset=reset)
        return self.out(h * F.silu(z)), state


class Remembers(Leaky):
    """Keeps something beside the state's numbers."""

    def forward(self, x, state=None, reset=None):
        y, after = super().forward(x, state, reset)
        if not torch.is_grad_enabled():
            after.calls = getattr(state, "calls", 0) + 1
            y = y * (1 + 0.1 * (after.calls > 1))
        return y, after


class Breaks(Leaky):
    def forward(self, x, state=None, reset=None):
        y, state = super().forward(x, state, reset)
        return (y if float(y.detach().sum()) else 2 * y), state


DEFECTS = {
    "shape": OtherDtype,
    "split": NoState,
    "decode": OtherStep,
    "causality": Peeks,
    "reset": NoReset,
    "independence": SeesBatch,
    "select": WritesState,
    "trained": Idle,
    "state_size": Grows,
    "half": Narrow,
    "autocast": NotUnderAutocast,
    "extremes": Overflows,
    "bounded": Adds,
    "save": Remembers,
    "compiles": Breaks,
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_breaks_its_law(name):
    with pytest.raises(Exception):  # noqa: B017  what is raised depends on the defect
        LAWS[name](DEFECTS[name], ROW)


def test_a_wrong_implementation_breaks_agreement(monkeypatch):
    scan = ops.diagonal.parallel["scan"]

    def wrong(a, b, state=None, reset=None):
        return scan(a, b, state, None if reset is None else torch.zeros_like(reset))

    monkeypatch.setitem(ops.diagonal.parallel, "scan", wrong)
    with pytest.raises(AssertionError, match="scan"):
        LAWS["agreement"](Leaky, ROW)


def test_every_law_has_a_defect_and_none_finds_one_where_there_is_none():
    assert set(DEFECTS) | {"agreement"} == set(LAWS)
    check(Leaky, ROW)
