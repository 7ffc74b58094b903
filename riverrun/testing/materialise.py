"""Sequence mixing as matrices: what every output owes to every input, and how that matrix is made.

    materialise(mixer, x)[b, t, i, s, j] = ∂ y[b, t, i] / ∂ x[b, s, j]         of any mixer, at x
    op_matrix(ops.outer, q, k, v, g): M (B, H, T, T) with y_t = Σ_s M_ts v_s    of ops linear in one argument
    inner_matrices(mixer, x): the M of every such op that a mixer runs on x
    off_diagonal_ranks(M): the largest rank of a block below the diagonal, and above it

A state of N numbers a value channel gives the blocks below the diagonal at most rank N (semiseparable); two
directions, those above it too (quasiseparable); one sum over all tokens, the whole matrix (low rank). A fixed
filter makes it constant along its diagonals (Toeplitz); attention does none of this (dense).
Source: Hwang et al. 2024 (Hydra, arXiv:2407.09941) sec. 2; Dao & Gu 2024 (arXiv:2405.21060) sec. 3.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.ops import Op
from riverrun.recurrences.fold import fold

# the argument in which an op is linear, the others given
LINEAR = {
    "outer": "v", "delta": "v", "dplr": "v", "mlstm": "v", "softmax": "v",
    "selective": "x", "short_conv": "x", "diagonal": "b",
}  # fmt: skip
# ops that are a function, number by number, of what such an op gives
AFTER = {"short_conv_silu": ops.short_conv}


def materialise(mixer: nn.Module, x: Tensor, reset: Tensor | None = None) -> Tensor:
    """The Jacobian (B, T, D, T, D) of a mixer's output at x (B, T, D), from no state: T backward passes.

    Sequences of a batch do not see each other, so that each has a T·D × T·D matrix of its own, and so that D
    copies of a sequence give the slopes of its D channels at once. The norm over both channel axes,
    `.norm(dim=(2, 4))`, is a picture (B, T, T) of which token sees which.
    """
    D = x.shape[2]
    copies = every(x.detach(), D).requires_grad_()
    y = mixer(copies, None, None if reset is None else every(reset, D))[0]
    own = y.unflatten(0, (-1, D)).diagonal(dim1=1, dim2=3)  # (B, T, D): channel i of copy i
    rows = [torch.autograd.grad(at_t.sum(), copies, retain_graph=True)[0] for at_t in own.unbind(1)]
    return torch.stack(rows, 1).unflatten(0, (-1, D)).transpose(1, 2)


def op_matrix(op: Op, *args: Any, reset: Tensor | None = None, **named: Any) -> Tensor:
    """M (B, H, T, T), in float64 and from the op's definition: what every time hears of an impulse at s.

    H are heads, or channels where each has its own matrix. Raises ValueError for an op that is linear in none
    of its arguments. The values themselves do not enter, only their shape.
    """
    if op.name not in LINEAR:
        raise ValueError(f"op '{op.name}' is linear in none of its arguments; these are in one: {LINEAR}")
    args, linear = op.signature.bind(args, named), LINEAR[op.name]
    op.signature.check(args, None, reset)
    given = dict(zip(op.signature.names, args, strict=True))
    values = given[linear]
    B, T, H = values.shape[:3]
    impulses = torch.eye(T, T + 1, device=values.device).mT  # (T + 1, T), the last of them silence
    impulses = impulses[:, :, None].expand(T + 1, T, H).repeat(B, 1, 1)
    exact = {name: repeated(op, name, x, T + 1) for name, x in given.items()}
    exact[linear] = (impulses if values.dim() == 3 else impulses[..., None]).to(widened(values))
    y, _ = fold(op.recurrence, tuple(exact.values()), None, None if reset is None else every(reset, T + 1))
    y = y.reshape(B, T + 1, T, H)
    return (y[:, :-1] - y[:, -1:]).permute(0, 3, 2, 1)  # less what is added anyway: a bias


@torch.no_grad()
def inner_matrices(mixer: nn.Module, x: Tensor, reset: Tensor | None = None) -> list[tuple[str, Tensor]]:
    """(op's name, its matrix) for every op linear in its values that the mixer runs on x, in order of calls.

    A convolution with SiLU counts as the convolution. Gates, keys and queries are those of this x. Raises
    ValueError for a mixer that runs none.
    """
    found: list[tuple[str, Tensor]] = []
    run = Op.__call__

    def watched(op: Op, *args: Any, state=None, reset=None, impl=None, **named: Any):
        linear = AFTER.get(op.name, op)
        if linear.name in LINEAR:
            found.append((linear.name, op_matrix(linear, *args, reset=reset, **named)))
        return run(op, *args, state=state, reset=reset, impl=impl, **named)

    with patch.object(Op, "__call__", watched):
        mixer(x, None, reset)
    if not found:
        raise ValueError(
            f"{type(mixer).__name__} runs no op that is linear in one argument: {sorted(LINEAR)}"
        )
    return found


def widened(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float64)


def every(x: Tensor, times: int) -> Tensor:
    """Each sequence of a batch `times` times."""
    return x.repeat_interleave(times, 0)


def repeated(op: Op, name: str, x: Tensor | None, times: int) -> Tensor | None:
    """An argument in float64, repeated if it is a sequence."""
    if x is None:
        return None
    x = x.detach().to(widened(x))
    return every(x, times) if op.recurrence.is_sequence(name) else x


def off_diagonal_ranks(M: Tensor, tolerance: float = 1e-9) -> tuple[int, int]:
    """The largest rank of the blocks M[t:, :t] and M[:t, t:] of M (..., T, T), as far as float64 can tell.

    `tolerance` is relative to the largest singular value of M: what is smaller is rounding.
    """
    smallest = float(tolerance * torch.linalg.matrix_norm(M, 2).max())
    cuts = range(1, M.shape[-1])
    below = max(int(torch.linalg.matrix_rank(M[..., t:, :t], atol=smallest).max()) for t in cuts)
    above = max(int(torch.linalg.matrix_rank(M[..., :t, t:], atol=smallest).max()) for t in cuts)
    return below, above
