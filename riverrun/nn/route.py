"""Many memories of which each token meets few: who goes where, and how only that is computed.

    p_t = softmax(W x_t) over M memories    token t meets the k with the largest p_t

Two ways to run the memories, with the same numbers, as rows of a batch that any op takes:

    packed    each memory runs over its own tokens only, in their order: with even load the work of k
              memories, not M; it is U · L steps, so a memory that gets most tokens makes the others wait
    masked    each memory runs over all steps, with zeros where it was not chosen: the definition, and what
              torch.compile can follow, since no shape depends on data

Zeros must leave a memory as it is: no decay, nothing written. Axes: `B` batch, `T` steps, `M` memories, `k`
choices, `U` memories that some token of the batch chose, `L` the most tokens that any of them got.
Sources: Du et al. 2025 (MoM, arXiv:2502.13685); the loss, Fedus et al. 2021 (arXiv:2101.03961) eq.
4-6.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shape import wide


class Router(nn.Module):
    """p (B, T, M), and the choices (B, T, k) in falling order of p. Computed in float32 or wider, so that
    rounding of the rest does not change who is chosen."""

    def __init__(self, width: int, num_memories: int, chosen: int, what: str = "chosen"):
        super().__init__()
        if not 1 <= chosen <= num_memories:
            raise ValueError(f"{what} = {chosen} of {num_memories} memories; it must be 1..{num_memories}")
        self.chosen = chosen
        self.weight = nn.Parameter(torch.randn(num_memories, width) * width**-0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(wide(x), wide(self.weight)).softmax(-1)
        return p, p.topk(self.chosen, -1).indices


class PerMemory(nn.Module):
    """A matrix for each memory: `weight` is (M, width, out)."""

    def __init__(self, num_memories: int, width: int, out: int):
        super().__init__()
        bound = width**-0.5  # that of nn.Linear
        self.weight = nn.Parameter(torch.empty(num_memories, width, out).uniform_(-bound, bound))

    def forward(self, rows: Tensor, used: Tensor) -> Tensor:
        """(U·B, L, width) -> (U·B, L, out), by the matrices of the U memories `used`."""
        shape, rows = rows.shape[:2], rows.view(len(used), -1, rows.shape[-1])
        if len(used) == len(self.weight):
            y = rows @ self.weight
        else:  # not by copies of the matrices: they are larger than what a step does with them
            W = self.weight.unbind()
            y = torch.stack([x @ W[m] for x, m in zip(rows, used.tolist(), strict=True)])
        return y.view(*shape, -1)


def balance(p: Tensor, index: Tensor) -> Tensor:
    """M Σ_m (mean of p_m) (share of choices that are m): 1 when both are even, M when one memory has all."""
    M = p.shape[-1]
    share = torch.bincount(index.flatten(), minlength=M) / index.numel()
    return M * (p.flatten(0, -2).mean(0) * share).sum()


@contextmanager
def balances(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, each call of a router in `model` adds its `balance` to the list: `loss + 0.01 * sum(found)`."""
    found: list[Tensor] = []

    def note(router: nn.Module, given: tuple[Tensor], made: tuple[Tensor, Tensor]) -> None:
        found.append(balance(*made))

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, Router)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class Routes:
    """Where each choice of each token stands among the rows (U·B, L), memory after memory."""

    slot: Tensor | None  # (B·T·k): place among U·B·L; None for one token, whose rows are its choices
    shape: tuple[int, int, int]  # U, B, L
    choices: tuple[int, int, int]  # B, T, k
    num_memories: int
    reset: Tensor | None  # (U·B, L): the first token of a document in a memory
    used: Tensor  # (U), the memories of the rows
    count: Tensor | None = None  # packed: (U·B) tokens in a row
    document: Tensor | None = None  # packed, with resets: (U·B, L) documents begun so far
    kept: Tensor | None = None  # packed, with resets: (B, M), no document began after a memory's last token

    def spread(self, x: Tensor) -> Tensor:
        """(B, T, n), or (B, T, k, n) -> (U·B, L, n), with zeros where there is no token."""
        U, B, L = self.shape
        x = x[:, :, None].expand((*self.choices, x.shape[-1])) if x.dim() == 3 else x
        if self.slot is None:
            return x.view(U, 1, -1)
        rows = x.new_zeros(U * B * L, x.shape[-1])
        return rows.index_copy(0, self.slot, x.reshape(-1, x.shape[-1])).view(U * B, L, -1)

    def real(self, like: Tensor) -> Tensor:
        """(U·B, L, 1): one where there is a token, else zero."""
        if self.slot is None:
            return like.new_ones(1, 1, 1)
        return self.spread(like.new_ones(1).expand((*self.choices, 1)))

    def collect(self, y: Tensor) -> Tensor:
        """(U·B, L, n) -> (B, T, k, n)."""
        if self.slot is None:
            return y.view(*self.choices, *y.shape[2:])
        return y.flatten(0, 1).index_select(0, self.slot).view((*self.choices, *y.shape[2:]))

    def take(self, state: Tensor | None) -> Tensor | None:
        """The states (U·B, ...) of the rows, from (B, M, ...)."""
        return None if state is None else state.index_select(1, self.used).transpose(0, 1).flatten(0, 1)

    def put(self, state: Tensor | None, new: Tensor) -> Tensor:
        """`state` (B, M, ...) with those of the rows; memories that nobody met keep theirs bit for bit."""
        U, B, _ = self.shape
        old = new.new_zeros(B, self.num_memories, *new.shape[1:]) if state is None else state.to(new.dtype)
        new = old.index_copy(1, self.used, new.unflatten(0, (U, B)).transpose(0, 1))
        if self.kept is not None:
            new = torch.where(self.kept.view(B, -1, *[1] * (new.dim() - 2)), new, 0)
        return new

    def tail(self, x: Tensor, past: Tensor | None, steps: int) -> Tensor:
        """The last `steps` inputs (U·B, steps, n) of packed rows x (U·B, L, n), of their last document."""
        if self.count is None:
            raise ValueError("rows that are not packed have gaps; a short convolution cannot run over them")
        past = x.new_zeros(len(x), steps, x.shape[2]) if past is None else past.to(x.dtype)
        at = self.count[:, None] + torch.arange(steps, device=x.device)
        found = torch.cat([past, x], 1).gather(1, at[..., None].expand(-1, -1, x.shape[2]))
        if self.document is None:
            return found
        document = F.pad(self.document, (steps, 0)).gather(1, at)
        return found.masked_fill((document != self.document.amax(1, keepdim=True))[..., None], 0)


def masked(index: Tensor, num_memories: int, reset: Tensor | None) -> Routes:
    """Routes for choices (B, T, k) in which every memory sees every step."""
    B, T, k = index.shape
    time = torch.arange(B * T, device=index.device).view(B, T, 1)
    reset = None if reset is None else reset.repeat(num_memories, 1)
    slot = (index * B * T + time).flatten()
    used = torch.arange(num_memories, device=index.device)
    return Routes(slot, (num_memories, B, T), (B, T, k), num_memories, reset, used)


def packed(index: Tensor, num_memories: int, reset: Tensor | None) -> Routes:
    """Routes for choices (B, T, k), k different memories a token, in which each sees its own tokens only."""
    (B, T, k), M = index.shape, num_memories
    if B == T == 1:
        return alone(index[0, 0], M, reset)
    chosen = torch.zeros(B, T, M, dtype=torch.long, device=index.device).scatter_(2, index, 1)
    count = chosen.sum(1)
    used = count.any(0).nonzero()[:, 0]
    U, L = len(used), int(count.max())
    order = torch.zeros(M, dtype=torch.long, device=index.device).index_copy(
        0, used, torch.arange(U, device=index.device)
    )
    row = order[index] * B + torch.arange(B, device=index.device).view(B, 1, 1)
    slot = (row * L + (chosen.cumsum(1) - 1).gather(2, index)).flatten()
    routes = Routes(slot, (U, B, L), (B, T, k), M, None, used, count[:, used].T.flatten())
    if reset is None:
        return routes
    begun = reset.cumsum(1)
    document = routes.spread(begun[..., None])[..., 0]
    first = document.diff(dim=1, prepend=document.new_zeros(U * B, 1)) > 0
    kept = (chosen * begun[..., None]).amax(1) == begun[:, -1:]
    return replace(routes, reset=first, document=document, kept=kept)


def alone(used: Tensor, num_memories: int, reset: Tensor | None) -> Routes:
    """`packed` for one token, as in decoding, that chose the memories `used` (k): no sorting, no sums."""
    k = len(used)
    routes = Routes(None, (k, 1, 1), (1, 1, k), num_memories, None, used, torch.ones_like(used))
    if reset is None:
        return routes
    chosen = torch.zeros(1, num_memories, dtype=torch.bool, device=used.device).index_fill(1, used, True)
    first = reset.expand(k, 1)
    return replace(routes, reset=first, document=first.long(), kept=chosen | ~reset)
