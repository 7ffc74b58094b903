"""What a matrix memory runs on, and its launch parameters: rules of shape, dtype and device, never tuned at
run time. What is launched is in `memory.py`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import chunk
from .launch import cdiv, launch, power_of_2, scratch


@dataclass
class Inputs:
    """What a matrix memory runs on; what its rule does not know is None. `seg` counts resets along time."""

    rule: str
    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor | None = None
    beta: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    u: Tensor | None = None
    lw: Tensor | None = None  # mLSTM: log write weights, ≤ 0 (B, H, T)
    lr: Tensor | None = None  # mLSTM's backward: log of what y was divided by, negative (B, H, T)
    m: Tensor | None = None  # mLSTM: running maximum
    state: Tensor | None = None
    norm: Tensor | None = None  # mLSTM: the normaliser's state
    reset: Tensor | None = None
    back: bool = False  # for the backward

    def __post_init__(self) -> None:
        for name in ("q", "k", "v", "g", "beta", "a", "b", "u", "lw", "lr", "m"):
            x = getattr(self, name)
            if x is not None and not x.is_contiguous():
                setattr(self, name, x.contiguous())
        for name in ("state", "norm"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.float().contiguous())
        self.B, self.T, self.H, self.V = self.v.shape
        self.G, self.K = self.q.shape[2:]
        self.decay = 0 if self.g is None else self.g.dim() - 2
        self.seg = None if self.reset is None else self.reset.to(torch.int32).cumsum(1, dtype=torch.int32)
        types = [x.dtype for x in (self.q, self.k, self.v, self.a, self.b) if x is not None]
        bf16 = all(t == torch.bfloat16 for t in types)
        self.half = bf16
        self.store = torch.bfloat16 if bf16 else torch.float32
        self.CT = tl.bfloat16 if bf16 else tl.float32
        self.prec = "tf32x3" if torch.float32 in types else "tf32"
        self.C = length(bf16, self.inline and not self.back)
        # narrower tiles than these are not safe: Triton 3.6 miscompiles some of their products on Hopper
        self.least = (64, 32) if bf16 else (16, 16)
        self.BK = max(self.least[0], power_of_2(self.K))
        self.chunks = cdiv(self.T, self.C)
        self.blocks = cdiv(self.V, self.BV)
        self.G_sum, self.strengths = self.by_chunk()

    @property
    def normed(self) -> bool:
        return self.lw is not None

    @property
    def inline(self) -> bool:
        """Whether outputs make A themselves."""
        return self.rule == "outer" and self.decay < 2 and self.u is None

    @property
    def shift(self) -> int:
        return int(self.u is not None)

    @cached_property
    def BV(self) -> int:
        """Values of a state that a walk holds."""
        return self.values(True)

    def values(self, all: bool) -> int:
        """What registers and shared memory hold beside K keys, fewer where every program still has a
        multiprocessor for itself; `all` as in `ahead`."""
        most = 64 if self.BK <= 128 and self.half else 32 if self.BK <= 128 or self.half else 16
        few = self.B * self.H * self.V * self.parts <= 32 * processors(self.v.device)
        if self.rule != "outer" and (few or ahead(self, most, all)[0] < 2):
            most = min(most, 32)
        return min(most, max(self.least[1], power_of_2(self.V)))

    @property
    def state_tile(self) -> tuple[int, int]:
        """Keys and values of a state that a program of `walk.accumulate` holds."""
        return min(64, self.BK), min(64, max(self.least[1], power_of_2(self.V)))

    @property
    def state_blocks(self) -> int:
        """Programs of `walk.accumulate` over which a state is spread."""
        BK, BV = self.state_tile
        return cdiv(self.K, BK) * cdiv(self.V, BV)

    @cached_property
    def parts(self) -> int:
        """Into how many parts time is cut."""
        room = processors(self.v.device)
        if self.rule == "outer":  # two programs a multiprocessor
            programs, worth, least = self.B * self.H * self.state_blocks, 2, 64
            return max(1, min(2 * room // programs, self.chunks // least)) if worth * programs <= room else 1
        if self.BK > 128:  # a transition has no room on the chip
            return 1
        # every part is walked twice, so that two of them are no gain
        programs = self.B * self.H * cdiv(self.V, 64 if self.half else 32)
        parts = min(room // programs, self.chunks // 16)
        return parts if parts > 2 else 1

    @property
    def wgmma(self) -> bool:
        """Whether kernels may use Hopper's own matrix instructions: only where that was seen to be right on
        the chip.

        Triton 3.6 miscompiles some products for them (wrong numbers, reads outside shared memory); the older
        ones are always right. These are the cases in which every gradient agreed with the definition. Rows of
        an odd width cannot be copied ahead of time, and walks that do not copy ahead read outside memory.
        """
        return self.half and self.BK <= 128 and self.K % 8 == 0 and self.V % 8 == 0

    def by_chunk(self) -> list[Any]:
        """Decays per head, summed inside each chunk, and β, of each chunk side by side."""
        g, rows = self.g if self.decay == 1 else None, (torch.float32, self.B * self.H, self.chunks, self.C)
        G, strengths = self.scratch(*(None if x is None else rows for x in (g, self.beta)))
        if G is not None or strengths is not None:
            BH = min(16, power_of_2(self.H))
            grid = (self.chunks, cdiv(self.H, BH), self.B)
            launch(chunk.by_chunk, grid, (g, self.beta, G, strengths, self.T), (self.H, BH, self.C), 4)
        return [G, strengths]

    def scratch(self, *wanted):
        return scratch(self.v.device, *wanted)

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)


def length(bf16: bool, long: bool) -> int:
    """Steps a chunk. Where outputs make A themselves, long chunks are few states to write and read."""
    return 32 if not bf16 else 128 if long else 64


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def warps(x: Inputs) -> int:
    return 8 if x.BK * x.BV > 128 * 64 else 4


def output_values(x: Inputs) -> int:
    """Values a program of `outputs`."""
    most = 128 if x.half and x.BK <= 128 else 32
    return min(most, max(x.least[1], power_of_2(x.V)))


def pair_registers(x: Inputs) -> int | None:
    """Registers a thread of `pairs`: three programs a multiprocessor, to wait for one another's inverses."""
    return 168 if x.rule == "delta" and x.half else None


def output_registers(x: Inputs) -> int | None:
    """Registers a thread of `outputs`: three programs a multiprocessor."""
    return 168 if x.half and x.BK <= 128 else None


def gradient_registers(x: Inputs) -> int | None:
    """Registers a thread of `gradients`: three programs a multiprocessor where that spills little."""
    return 168 if x.half and (x.normed or (x.rule == "delta" and x.decay == 0)) else None


def slice_of_keys(x: Inputs) -> int:
    """Keys a program of `gradients`."""
    return min(64, x.BK)


def slice_of_values(x: Inputs) -> int:
    """Values that `gradients` takes at once."""
    most = 128 if x.half else 64
    return min(most, max(x.least[0], power_of_2(x.V)))


SHARED = 226 * 1024  # bytes of shared memory that tiles of a program may take


def ahead(x: Inputs, BV: int, all: bool) -> tuple[int, bool]:
    """Chunks of which a walk of BV values has tiles at once, `all` tiles or those that states need; and
    whether its values are not among them but carried, in registers.

    Triton asks for tiles when it is done with a chunk. With two stages that is the next one, for which the
    walk then waits; with three the one after it. Values that are carried are waited for by the first fence
    before a product, so only those are that leave room for a stage or, with decays per head, keep registers
    from spilling.
    """
    if not x.half or x.BK > 128:
        return 1, False
    keys, pairs = (4, 4) if x.rule == "dplr" else (3 if x.decay == 2 else 2, 2)
    if not all:
        keys, pairs = keys - 1, pairs // 2

    def fit(copied: int) -> int:
        chunk = 2 * x.C * (keys * x.BK + pairs * x.C + copied) + (4 * x.BK if x.decay == 2 else 0)
        state = 2 * BV * (x.BK + (1 if copied else 2) * x.C)
        return min(3 if x.wgmma else 2, (SHARED - state) // chunk)

    carry = fit(0) > fit(BV) or (all and x.decay == 1 and x.BK > 64)
    return fit(0 if carry else BV), carry


def sum_stages(x: Inputs) -> int:
    return 3 if x.half else 2
