"""The matrix view: every mixer's matrix respects time, every op's is its output, and classes have ranks."""

import pytest
import torch
from equations_both import hydra_matrices

from riverrun import ops
from riverrun.mixers import MIXERS, build
from riverrun.nn import pooled
from riverrun.ops import Op
from riverrun.testing.inputs import FORMS, Size, make
from riverrun.testing.laws import instance, resets
from riverrun.testing.materialise import (
    AFTER,
    LINEAR,
    inner_matrices,
    materialise,
    off_diagonal_ranks,
    op_matrix,
)
from riverrun.testing.tolerance import close

SIZE = Size(T=13, H=4, G=2, K=3, V=2, D=3, N=2, W=4)
CASES = [(op, form) for op in LINEAR for form in FORMS[op]]


def small(name):
    return instance(lambda: build(name, 16, **MIXERS[name].small))


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [n for n, row in MIXERS.items() if "causality" not in row.breaks])
def test_a_causal_mixer_is_block_lower_triangular(name):
    seen = materialise(small(name), random(1, 4, 16)).norm(dim=(2, 4))[0]
    assert seen.shape == (4, 4) and (seen.diagonal() > 0).all() and (seen.diagonal(-1) > 0).all()
    ahead = seen.triu(1)
    assert ahead.max() == 0 if MIXERS[name].causal else (ahead + ahead.mT).diagonal(1).min() > 0


@pytest.mark.parametrize("name", ["mamba2", "lstm", "vig"])
def test_a_mixers_matrix_is_its_slope(name):
    mixer, x, towards, step = small(name), random(2, 5, 16), random(2, 5, 16).flip(1), 1e-5
    with torch.no_grad():
        slope = (mixer(x + step * towards)[0] - mixer(x - step * towards)[0]) / (2 * step)
    found = torch.einsum("btisj,bsj->bti", materialise(mixer, x), towards)
    close(found, slope, "central differences", 1e-7)  # they err by step² and by rounding / step, 1e-10 each


def test_packed_documents_do_not_see_each_other():
    reset = torch.zeros(1, 6, dtype=torch.bool)
    reset[0, 4] = True
    seen = materialise(small("hydra"), random(1, 6, 16), reset).norm(dim=(2, 4))[0]
    document = reset[0].cumsum(0)
    assert torch.equal(seen > 0, document[:, None] == document)


@pytest.mark.parametrize("op, form", CASES, ids=lambda x: str(x).replace(" ", "-"))
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
def test_an_ops_matrix_times_values_is_its_output(op, form, packed):
    case, op = make(op, form, SIZE, state=False, reset=packed), ops.OPS[op]
    given = dict(zip(op.signature.names, case.args, strict=True))
    M, v = op_matrix(op, **given, reset=case.reset), given[LINEAR[op.name]]
    assert M.dtype == v.dtype and M.triu(1).abs().max() == 0
    if "c" in given and given["c"] is not None:
        given["c"] = torch.zeros_like(given["c"])  # a bias is no part of the matrix
    y, _ = op(**given, reset=case.reset)
    close(torch.einsum("bhts,bshv->bthv", M, v.view(*v.shape[:3], -1)).reshape(y.shape), y, "M v")


ON_LINEAR = [n for n, row in MIXERS.items() if row.op in LINEAR]


@pytest.mark.parametrize("name", ON_LINEAR)
def test_the_matrices_inside_a_mixer_are_its_ops(name, monkeypatch):
    """What each op of a mixer gives is M times its values, whichever implementation the mixer runs."""
    mixer, x, reset, outputs = small(name), random(2, 9, 16), resets(9, (0, 4)), []
    matrices = inner_matrices(mixer, x, reset)
    assert any(op == MIXERS[name].op for op, _ in matrices), "not the op of its row"
    run = Op.__call__

    def watched(op, *args, state=None, reset=None, impl=None, **named):
        y, _ = out = run(op, *args, state=state, reset=reset, impl=impl, **named)
        if op.name in AFTER:
            op = AFTER[op.name]
            y, _ = run(op, *args, state=state, reset=reset, impl=impl, **named)
        if op.name in LINEAR:
            given = dict(zip(op.signature.names, op.signature.bind(args, named), strict=True))
            bias = 0 if given.get("c") is None else given["c"]
            outputs.append((state, given[LINEAR[op.name]], y - bias))
        return out

    monkeypatch.setattr(Op, "__call__", watched)
    with torch.no_grad():
        mixer(x, None, reset)
    for (op, M), (state, v, y) in zip(matrices, outputs, strict=True):
        if state is None:
            found = torch.einsum("bhts,bshv->bthv", M, v.reshape(*v.shape[:3], -1).to(M.dtype))
            close(found.reshape(y.shape), y.to(M.dtype), f"{op} inside {name}")


def test_a_mixer_without_a_linear_op_has_no_matrices():
    with pytest.raises(ValueError, match="GRU runs no op that is linear"):
        inner_matrices(small("gru"), random(1, 4, 16))


@pytest.mark.parametrize("op", ["elman", "lstm", "gru", "slstm", "fastweight"])
def test_what_is_linear_in_nothing_is_refused(op):
    case = make(op, FORMS[op][0], SIZE)
    with pytest.raises(ValueError, match=f"'{op}' is linear in none of its arguments; these are"):
        op_matrix(ops.OPS[op], *case.args)


@pytest.mark.parametrize(
    "op, rank",
    [("outer", "K"), ("delta", "K"), ("dplr", "K"), ("mlstm", "K"), ("selective", "N"), ("diagonal", 1)],
)
def test_a_state_makes_a_semiseparable_matrix(op, rank):
    """Blocks below the diagonal have the rank of what passes between times: the keys of one head's state."""
    for form in FORMS[op]:
        case = make(op, form, SIZE, state=False, reset=False)
        M = op_matrix(ops.OPS[op], *case.args)
        assert off_diagonal_ranks(M) == (rank if rank == 1 else getattr(SIZE, rank), 0), form


def test_a_filter_makes_a_toeplitz_matrix():
    case = make("short_conv", "bias", SIZE)
    M = op_matrix(ops.short_conv, *case.args)
    assert torch.equal(M[..., 1:, 1:], M[..., :-1, :-1]), "not constant along diagonals"
    assert off_diagonal_ranks(M) == (SIZE.W - 1, 0), "a filter remembers W - 1 inputs"


def test_fixed_dynamics_make_a_toeplitz_matrix_too():
    """And then the recurrence is a convolution, of rank one."""
    b = random(2, 13, 3)
    M = op_matrix(ops.diagonal, torch.full_like(b, 0.9), b)
    close(M[..., 1:, 1:], M[..., :-1, :-1], "constant along diagonals")
    close(
        M[..., :, 0], 0.9 ** torch.arange(13.0, dtype=torch.float64).expand(2, 3, 13), "powers of the decay"
    )


def test_a_window_makes_a_banded_matrix():
    seen = materialise(small("sliding_window"), random(1, 12, 16)).norm(dim=(2, 4))[0]  # window = 8
    assert torch.equal(seen > 0, torch.ones(12, 12, dtype=torch.bool).tril().triu(-7))


def test_a_pool_makes_a_matrix_of_low_rank():
    q, k = random(1, 13, 1, 3), random(1, 13, 1, 3).flip(1)
    M = pooled(q, k, torch.eye(13, dtype=torch.float64)[None, :, None])[:, :, 0]
    assert torch.linalg.matrix_rank(M) == 3
    assert off_diagonal_ranks(M) == (3, 3)


def test_hydra_makes_a_quasiseparable_matrix(float64):
    """Both triangles have the rank of one direction's state, and the diagonal belongs to neither."""
    mixer = small("hydra")  # N = 3
    with torch.no_grad():
        M, _, _ = hydra_matrices(mixer, random(1, 13, 16)[0])
    assert off_diagonal_ranks(M) == (3, 3)
    assert torch.linalg.matrix_rank(M).min() == 13


def test_attention_makes_a_dense_matrix():
    """exp(q·k) has no finite state: the blocks below the diagonal have all the rank that they can have."""
    q, k = random(1, 12, 2), random(1, 12, 2).flip(1)
    M = (q @ k.mT + torch.full((12, 12), -torch.inf).triu(1)).softmax(-1)
    assert off_diagonal_ranks(M, tolerance=1e-12) == (6, 0)
