"""Episodes in one pass, each cut off from the one before: Lu et al. 2023 (arXiv:2303.03982)."""

from itertools import pairwise

import pytest
import torch

from riverrun import ops
from riverrun.algorithms.scan import scan
from riverrun.mixers.s5 import S5
from riverrun.testing.laws import WIDTH, gradients, inputs, instance
from riverrun.testing.tolerance import close, close_all

STEPS = 50
CPU_IMPLS = [i for i in ops.OPS["diagonal"].impls if i != "gpu"]


def pattern(seed, rate):
    """(2, STEPS) flags at random; the first and the last step are among those that happen."""
    return torch.rand(2, STEPS, generator=torch.Generator().manual_seed(seed)) < rate


def episodes(mixer, x, start, reset):
    """Each episode by itself, step by step: outputs and last states, put side by side."""
    ys, ends = [], []
    with ops.forced(diagonal="sequential"):
        for row in range(len(x)):
            cuts = [0, *[t for t in range(1, STEPS) if reset[row, t]], STEPS]
            pieces, state = [], None if reset[row, 0] else start[row : row + 1]
            for begin, end in pairwise(cuts):
                y, last = mixer(x[row : row + 1, begin:end], state)
                pieces.append(y)
                state = None
            ys.append(torch.cat(pieces, 1))
            ends.append(last)
    return torch.cat(ys), torch.cat(ends)


@pytest.mark.parametrize("impl", CPU_IMPLS)
@pytest.mark.parametrize("seed, rate", list(enumerate([0.0, 0.02, 0.1, 0.1, 0.5, 0.9, 1.0])))
def test_one_pass_over_many_episodes_is_each_by_itself(impl, seed, rate, float64):
    mixer, reset = instance(lambda: S5(WIDTH, 4)), pattern(seed, rate)
    x = inputs(STEPS, seed).requires_grad_()
    start = mixer(inputs(9))[1].detach().requires_grad_()
    wanted = [x, start, *mixer.parameters()]
    expected = episodes(mixer, x, start, reset)
    with ops.forced(diagonal=impl):
        found = mixer(x, start, reset)
        slopes = gradients(list(found), wanted)
    close_all(found, expected, f"rate {rate}")
    close_all(slopes, gradients(list(expected), wanted), f"rate {rate}, gradient")
    if reset[:, 0].all():
        assert slopes[1].abs().max() == 0, "nothing passes a reset at the first step"


def resettable(left, right):
    """The paper's (A, b, d) ⊕ (A', b', d'): (A', b', d') where d' is set, else (A'A, A'b + b', d)."""
    (a1, b1, d1), (a2, b2, d2) = left, right
    cut = d2.bool()
    return torch.where(cut, a2, a2 * a1), torch.where(cut, b2, a2 * b1 + b2), torch.where(cut, d2, d1)


@pytest.mark.parametrize("seed", range(4))
def test_the_papers_operator_is_associative_and_gives_our_states(seed, float64):
    random = torch.Generator().manual_seed(seed)
    a = torch.complex(*torch.randn(2, 2, STEPS, 3, generator=random)) * 0.5
    b = torch.complex(*torch.randn(2, 2, STEPS, 3, generator=random))
    reset = pattern(seed, 0.15)
    elements = a, b, reset[..., None].expand(a.shape).double()
    x, y, z = (tuple(e[:, t] for e in elements) for t in (7, 8, 9))
    for flags in range(8):  # every pattern of three
        three = [(p[0], p[1], torch.full_like(p[2], float(flags >> i & 1))) for i, p in enumerate((x, y, z))]
        one = resettable(resettable(three[0], three[1]), three[2])
        close_all(one, resettable(three[0], resettable(three[1], three[2])), f"flags {flags}")
    tree = scan(resettable, elements)
    for impl in CPU_IMPLS:
        close(tree[1], ops.diagonal(a, b, reset=reset, impl=impl)[0], impl)
    fold = tuple(e[:, 0] for e in elements)
    for t in range(1, STEPS):
        fold = resettable(fold, tuple(e[:, t] for e in elements))
    close(fold[1], tree[1][:, -1], "left to right")
