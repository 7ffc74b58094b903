"""What a state space mixer may do past the length of its training, where its state gets fuller than it knows.

With p the position in the document and L the training length; none of these changes a bit while p < L.

    forget, insert    g_t → forget · g_t,  what is written → insert · it                         for p ≥ L
    limit             after each `every` steps, S → S · min(1, limit / |S|) for each head        for p ≥ L
    window r          y_t reads S_t - e^{g_t + ... + g_{t-r+1}} S_{t-r}, which is what the last r steps wrote
    filter            dt_t → 0, S_t = S_{t-1}, where dt_t < τ(p) in a global channel             for p ≥ L

A channel is global if over L steps it keeps more than `global_above` of its state, e^{Σ g}. τ(p) is the step
size above which the steps of a text p long come to no more than all those of a text L long, so that the state
decays as it did in training. `with measuring(model): model(text)`, a text of length L, tells what steps and
decays are usual; without it no channel is global.

Sources: Chen et al. 2024 (Stuffed Mamba, arXiv:2410.07145), three remedies for the collapse of a state in its
first version, known here by summaries, not by equations, nor by the authors' repository, which does not have
them; `every` = 1 is the paper's. Ye et al. 2025
(LongMamba, arXiv:2504.16053) and its code, for the filter: it knows how long a prompt is and filters all with
τ of that length; a stream does not know, and takes τ of each token's own position.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from riverrun import ops
from riverrun.state import State, describe

from .check import NOT_NEGATIVE, checked, fitting
from .rotary import positions
from .shape import wide

QUANTILES = 256  # means of as many equal parts of the sorted step sizes, for each channel


class Beyond(nn.Module):
    """The switches of one mixer, for `channels` step sizes a token. State: (S, position (B)), and with a
    window also S_{t-r} and the last r inputs (B, r, G·N + H·P + H)."""

    usual: Tensor
    decay: Tensor

    @checked
    def __init__(
        self,
        channels: int,
        length: int,
        forget: float = 1.0,
        insert: Annotated[float, NOT_NEGATIVE] = 1.0,
        limit: float | None = None,
        every: int = 64,
        window: int | None = None,
        filter: bool = False,
        global_above: float = 1e-3,
    ):
        super().__init__()
        if window is not None and window < length:
            raise ValueError(
                f"length = {length}, window = {window}: a window is at least as long as the training"
            )
        if forget < 1 or insert > 1:
            raise ValueError(f"forget = {forget} must be at least 1, insert = {insert} in 0..1")
        if limit is not None and window is not None:
            raise ValueError(f"limit = {limit}: a window, {window}, takes none")
        self.width, self.length, self.forget, self.insert = channels, length, forget, insert
        self.limit, self.every, self.window, self.global_above = limit, every, window, global_above
        self.filter = filter
        if filter:
            self.register_buffer("usual", torch.zeros(channels, QUANTILES))  # in falling order
            self.register_buffer("decay", torch.zeros(channels))  # e^{Σ g} over a training length

    def forward(
        self, dt: Tensor, rate: Tensor, start: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(dt, factor of what is written, positions, the next) for dt (B, T, channels), rate (channels)."""
        position, after = positions(dt, fitting(self, start, dt.shape[0]), reset)
        late = (position >= self.length)[..., None]
        if self.filter:
            drop = (self.decay > self.global_above) & (dt < self.threshold(position))
            dt = torch.where(late & drop, 0, dt)
        written = torch.where(late, self.insert / self.forget, 1.0).to(dt.dtype)
        return torch.where(late, self.forget * dt, dt), written, position, after

    def threshold(self, position: Tensor) -> Tensor:
        """τ (B, T, channels)."""
        total = self.usual.cumsum(-1)
        allowed = self.length / (position.flatten() + 1).clamp(min=self.length)
        wanted = total[:, -1:] * allowed.to(total.dtype)
        last = torch.searchsorted(total, wanted).clamp(max=QUANTILES - 1)
        return self.usual.gather(1, last).T.unflatten(0, position.shape)

    def outer(
        self, C: Tensor, B: Tensor, u: Tensor, dt: Tensor, rate: Tensor, state: State, reset: Tensor | None
    ) -> tuple[Tensor, State]:
        """`ops.outer(C, B, dt u, -rate dt)` with these switches."""
        S, start, *more = self.parts(state)
        dt, written, position, after = self(dt, rate, start, reset)
        g, u = -rate * dt, ((dt * written)[..., None] * u).to(u.dtype)
        if self.limit is not None:
            y, S = self.limited((C, B, u, g), position, S, reset, self.limit)
            return y, (S, after)
        y, S = ops.outer(C, B, u, g, state=S, reset=reset)
        if self.window is None:
            return y, (S, after)
        past = fitting(self, more[1], len(g), self.window, B[0, 0].numel() + u[0, 0].numel() + g.shape[2])
        old, kept = self.forgotten(C, B, u, g, more[0], past, reset)
        return y - old, (S, after, *kept)

    def selective(
        self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, low: Any, state: State, reset: Any
    ) -> tuple[Tensor, State]:
        """`ops.selective` with all but limit and window; a channel's rate is its slowest."""
        if self.limit is not None or self.window is not None:
            raise ValueError("limit and window are for mixers with matrix states, such as mamba2")
        h, start = self.parts(state)
        h = fitting(self, h, len(u), *A.shape)
        dt, written, _, after = self(dt, -A.amax(-1), start, reset)
        y, h = ops.selective((u * written).to(u.dtype), dt, A, B, C, low, state=h, reset=reset)
        return y, (h, after)

    def parts(self, state: State) -> tuple:
        count = 2 if self.window is None else 4
        if state is None:
            return (None,) * count
        if not isinstance(state, tuple) or len(state) != count:
            raise ValueError(
                f"the state is {describe(state)}; past its training length this mixer carries {count} parts: "
                "a state continues only the mixer that made it"
            )
        return state

    def limited(
        self, args: tuple[Tensor, ...], position: Tensor, S: State, reset: Tensor | None, limit: float
    ) -> tuple[Tensor, State]:
        """Up to each step that ends `every` of them in some row, and the state of that row brought down."""
        due = (position >= self.length) & ((position + 1) % self.every == 0)
        T = position.shape[1]
        ends = [1] if T == 1 else [int(t) + 1 for t in due.any(0).nonzero()]  # a step can be recorded
        ys, begin = [], 0
        for end in ends if ends and ends[-1] == T else [*ends, T]:
            here = slice(begin, end)
            marks = None if reset is None else reset[:, here]
            y, S = ops.outer(*(a[:, here] for a in args), state=S, reset=marks)
            scale = (limit / S.norm(dim=(-2, -1)).clamp(min=1e-30)).clamp(max=1)
            S = torch.where(due[:, end - 1, None, None, None], scale[..., None, None] * S, S)
            ys.append(y)
            begin = end
        return torch.cat(ys, 1), S

    def forgotten(
        self, C: Tensor, B: Tensor, u: Tensor, g: Tensor, S: State, past: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[State, Tensor]]:
        """What C reads of e^{Σ g} S_{t-r}, and the state that this needs."""
        r, T = self.window or 0, g.shape[1]
        inputs = torch.cat([wide(B).flatten(2), wide(u).flatten(2), g], -1)
        past = inputs.new_zeros(len(g), r, inputs.shape[2]) if past is None else past
        every = torch.cat([past, inputs], 1)
        total = every[..., -g.shape[2] :].double().cumsum(1)
        fade = (total[:, r:] - total[:, :T]).clamp(max=0).exp().to(g.dtype)
        before, kept = every[:, :T], every[:, T:]
        if reset is not None:  # what another document wrote is not in S
            document = torch.cat([past.new_zeros(past.shape[:2]), reset.cumsum(1)], 1)
            before = before.masked_fill((document[:, :T] != document[:, r:])[..., None], 0)
            kept = kept.masked_fill((document[:, T:] != document[:, -1:])[..., None], 0)
        b, w, h = before.split([B.shape[2] * B.shape[3], u.shape[2] * u.shape[3], g.shape[2]], -1)
        b, w = b.view(B.shape).to(B.dtype), w.view(u.shape).to(u.dtype)
        y, S = ops.outer(C, b, w, h, state=S, reset=reset)
        return (fade[..., None] * y).to(y.dtype), (S, kept)

    @torch.no_grad()
    def measure(self, dt: Tensor, rate: Tensor) -> None:
        """Take step sizes (B, T, channels) of texts of the training length as what is usual."""
        if dt.shape[1] != self.length:
            raise ValueError(
                f"the text has {dt.shape[1]} tokens; give one as long as the training, {self.length}"
            )
        ordered = dt.flatten(0, 1).sort(0, descending=True).values
        parts = ordered.tensor_split(min(QUANTILES, len(ordered)))
        means = torch.stack([p.mean(0) for p in parts], 1)
        self.usual.zero_()[:, : means.shape[1]] = means
        self.decay.copy_((-rate * dt.sum(1)).exp().mean(0))


def switches(channels: int, settings: dict[str, Any] | None) -> Beyond | None:
    """The switches that a mixer's `beyond` names, None for none. Raises ValueError for one there is not."""
    if settings is None:
        return None
    if "length" not in settings:
        raise ValueError(f"beyond = {settings} names no training length; give beyond={{'length': 2048, ...}}")
    return Beyond(channels, **settings)


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Inside, a call of `model` with texts of the training length tells its filters what is usual."""

    def note(beyond: Beyond, given: tuple[Tensor, ...]) -> None:
        beyond.measure(*given[:2])

    found = [m for m in model.modules() if isinstance(m, Beyond) and m.filter]
    hooks = [m.register_forward_pre_hook(note) for m in found]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
