"""Matrix memories on a GPU: three rules, one plan. Tensor cores take chunks of C steps; one state goes on.

With G the log-decays summed inside a chunk, D the decays e^{G_i - G_j} between its steps, S the state
before it:

    outer   y = e^G q S + A v
    delta   y = e^G q S + A β r           r = W (v - e^G k S)
    dplr    y = e^G q S + A v + Aa w      w = W (e^{G₋} b S + Lk v)

    the next S is e^{G_C} S + (e^{G_C - G} k)ᵀ times what is written: v, β r, v; for dplr + (e^{G_C - G} a)ᵀ w
    A = tril(q kᵀ D)    Aa = tril(q aᵀ D)    Lk = tril(b kᵀ D₋, -1)
    W inverts I + tril(k kᵀ D, -1) β, for dplr I - tril(b aᵀ D₋, -1); ₋ leaves a step's own decay out

First `pairs` makes the (C, C) matrices, all chunks at once (per head without correction the walk makes A
itself). Then `forward` walks the chunks with S on chip. For the backward, `reverse` walks back with dS and
yields dv, or dx of delta and dplr; `gradients` has the rest, all chunks at once, from the states that the
two walks wrote in half precision.

If batch × heads × value blocks leave the device idle, time is cut into parts: each part is walked from zero
(for delta and dplr from the identity as well, which gives its transition), `join` passes the states
through, and the parts are walked again from their true states. Sums always run in the same order: the same
input, the same bits.

bfloat16 multiplies as bfloat16, float16 as tf32 (as precise, without its narrow range), float32 as three
tf32 products; sums, states and decays are float32. Launch parameters are rules of shape and dtype: nothing
is tuned at run time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunk, walk
from .gradients import gradients

OPS = ("outer", "mlstm", "delta", "dplr")
WIDEST = 256  # keys a head


# Whether the gradients of this very code agreed with the definition on a GPU
# (tests/test_kernels_gpu_matrix.py there)
CONFIRMED = False


def refuses(k: Tensor) -> str | None:
    """Why keys k (B, T, G, K) cannot be taken, or None."""
    if not CONFIRMED:
        return "its gradients are not confirmed on a GPU since `gradients.py` last changed"
    return f"its state holds at most {WIDEST} keys a head, K = {k.shape[3]}" if k.shape[3] > WIDEST else None


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
    lw: Tensor | None = None  # mLSTM: log write weights, ≤ 0
    m: Tensor | None = None  # mLSTM: running maximum
    state: Tensor | None = None
    norm: Tensor | None = None  # mLSTM: the normaliser's state
    reset: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("q", "k", "v", "g", "beta", "a", "b", "u", "lw", "m"):
            x = getattr(self, name)
            setattr(self, name, x if x is None else x.contiguous())
        for name in ("state", "norm"):
            x = getattr(self, name)
            setattr(self, name, x if x is None else x.float().contiguous())
        self.B, self.T, self.H, self.V = self.v.shape
        self.G, self.K = self.q.shape[2:]
        self.decay = 0 if self.g is None else self.g.dim() - 2
        self.seg = None if self.reset is None else self.reset.to(torch.int32).cumsum(1, dtype=torch.int32)
        types = [x.dtype for x in (self.q, self.k, self.v, self.a, self.b) if x is not None]
        bf16 = all(t == torch.bfloat16 for t in types)
        self.store = torch.bfloat16 if bf16 else torch.float32
        self.CT = tl.bfloat16 if bf16 else tl.float32
        self.prec = "tf32x3" if torch.float32 in types else "tf32"
        self.C = length(bf16)
        # narrower tiles than these are not safe: Triton 3.6 miscompiles some of their products on Hopper
        self.least = (64, 32) if bf16 else (16, 16)
        self.BK = max(self.least[0], triton.next_power_of_2(self.K))
        self.chunks = -(-self.T // self.C)
        self.blocks = -(-self.V // self.BV)
        self.G_sum = self.sum_decays() if self.decay == 1 else None

    @property
    def normed(self) -> bool:
        return self.lw is not None

    @property
    def inline(self) -> bool:
        """Whether walks make A themselves."""
        return self.rule == "outer" and self.decay < 2 and self.u is None

    @property
    def BV(self) -> int:
        """Values a program: what registers and shared memory hold beside K keys, fewer where that fills the
        device."""
        most = (
            64
            if self.BK <= 128 and self.CT == tl.bfloat16
            else 32
            if self.BK <= 128 or self.CT == tl.bfloat16
            else 16
        )
        idle = self.B * self.H * self.V < 128 * processors(self.v.device)
        if self.rule == "dplr" or (self.rule == "delta" and idle):
            most = min(most, 32)
        return min(most, max(self.least[1], triton.next_power_of_2(self.V)))

    @property
    def parts(self) -> int:
        """Into how many parts time is cut: two programs a multiprocessor, parts of at least 8 chunks."""
        programs, room = self.B * self.H * self.blocks, processors(self.v.device)
        worth = 3 if self.rule == "outer" else 8  # a transition costs as much again as the state
        return max(1, min(2 * room // programs, self.chunks // 8)) if worth * programs <= room else 1

    def wgmma(self, parts: int = 1) -> bool:
        """Whether kernels may use Hopper's own matrix instructions: only where that was seen to be right on
        the chip.

        Triton 3.6 miscompiles some products for them (wrong numbers, reads outside shared memory); the older
        ones are always right. These are the cases in which every gradient agreed with the definition.
        """
        seen = self.CT == tl.bfloat16 and self.BK <= 128 and not self.normed and self.seg is None
        return seen and parts == 1

    def sum_decays(self) -> Tensor:
        G = torch.empty(self.g.shape, dtype=torch.float32, device=self.g.device)
        BW = min(64, triton.next_power_of_2(self.H))
        grid = (self.chunks, -(-self.H // BW), self.B)
        chunk.running_sum[grid](self.g, G, self.T, self.H, BW, self.C, num_warps=4)
        return G

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.v.device)


def length(bf16: bool) -> int:
    """Steps a chunk."""
    return 64 if bf16 else 32


@contextmanager
def instructions(wgmma: bool) -> Iterator[None]:
    """Inside, a kernel that is compiled uses Hopper's own matrix instructions only if `wgmma`.

    Triton reads the variable when it compiles and keeps it in the key of its cache on disk, but not in that
    of the process: launches that differ in it must differ in a compile-time argument or in `num_stages` too.
    """
    before = os.environ.get("DISABLE_MMA_V3")
    if not wgmma:
        os.environ["DISABLE_MMA_V3"] = "1"
    try:
        yield
    finally:
        if not wgmma:
            os.environ.pop("DISABLE_MMA_V3")
            if before is not None:
                os.environ["DISABLE_MMA_V3"] = before


@cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@dataclass
class Made:
    """What `chunk.pairs` makes of the inputs, and where the walks find q and k; what a rule does not need is
    None."""

    q: Tensor
    k: Tensor
    A: Tensor | None = None
    Aa: Tensor | None = None
    Lk: Tensor | None = None
    W: Tensor | None = None
    k_in: Tensor | None = None
    b_in: Tensor | None = None
    a_out: Tensor | None = None
    ends: Tensor | None = None


def pairs(x: Inputs, known: tuple[Tensor | None, ...] | None = None) -> Made:
    """`known` are the (C, C) matrices (A, Aa, Lk, W) of the forward, if this is its backward."""
    made = Made(x.q, x.k)
    if x.inline:
        return made
    full, delta, dplr = x.decay == 2, x.rule == "delta", x.rule == "dplr"
    matrix = (x.B * x.H, x.chunks, x.C, x.C)
    needed = (True, dplr, dplr, delta or dplr)
    made.A, made.Aa, made.Lk, made.W = known or (x.new(*matrix, dtype=x.store) if n else None for n in needed)
    if known and not full:
        return made
    sequence = (x.B, x.T, x.H, x.K)
    if full:
        made.q, made.k = (x.new(*sequence, dtype=x.store) for _ in range(2))
        made.k_in, made.b_in, made.a_out = (
            x.new(*sequence, dtype=x.store) if n else None for n in (delta, dplr, dplr)
        )
        made.ends = x.new(x.B * x.H, x.chunks, x.K)
    with instructions(x.wgmma()):
        chunk.pairs[(x.chunks, x.B * x.H)](
            x.q, x.k, x.a, x.b, x.u, x.beta, x.g, x.G_sum, x.seg,
            *((None,) * 4 if known else (made.A, made.Aa, made.Lk, made.W)),
            made.q if full else None, made.k_in, made.k if full else None, made.b_in, made.a_out, made.ends,
            x.T, x.H, x.H // x.G, x.K, min(x.BK, 64), x.C, x.rule, x.decay, x.CT, x.prec,
            num_warps=pair_warps(x), num_stages=1,
        )  # fmt: skip
    return made


@dataclass
class Parts:
    """Time cut into `count` parts of `chunks` chunks, and what each does to a state."""

    count: int
    chunks: int
    local: Tensor | None = None  # (B·H, parts, K, width): final states from zero, then transitions
    decay: Tensor | None = None  # (B·H, parts, K)
    norm: Tensor | None = None

    @property
    def width(self) -> int:
        return self.local.shape[-1]


def cut(x: Inputs, made: Made) -> Parts:
    if x.parts == 1:
        return Parts(1, x.chunks)
    chunks = -(-x.chunks // x.parts)
    p = Parts(-(-x.chunks // chunks), chunks)
    known = x.blocks * x.BV  # transitions begin on a block's edge
    p.local = x.new(x.B * x.H, p.count, x.K, x.V if x.rule == "outer" else known + x.K)
    p.decay = x.new(x.B * x.H, p.count, x.K)
    p.norm = x.new(x.B * x.H, p.count, x.K) if x.normed else None
    launch_forward(x, made, p, None, None, local=True, S1=p.local, n1=p.norm)
    return p


def join(x: Inputs, p: Parts, local, nlocal, state, norm, backwards: bool):
    """The state (or its gradient) with which each part is entered."""
    starts = x.new(x.B * x.H, p.count, x.K, x.V)
    nstarts = x.new(x.B * x.H, p.count, x.K) if x.normed else None
    corrected = x.rule != "outer"
    BV = min(32, max(16, triton.next_power_of_2(x.V)))
    with instructions(False):
        walk.join[(-(-x.V // BV), x.B * x.H)](
            local, p.local if corrected else p.decay, nlocal, state, norm, starts, nstarts, p.count,
            local.shape[-1], x.K, x.V, x.BK, BV, x.blocks * x.BV, backwards, corrected, x.normed, p.width,
            num_warps=4,
        )  # fmt: skip
    return starts, nstarts


def launch_forward(x, made, p, S0, n0, *, local=False, y=None, den=None, S1=None, n1=None, keep=None):
    """`walk.forward` over all parts; `keep` is (states, normaliser states, errors) to write, or None."""
    states, nstates, errors = keep or (None, None, None)
    blocks = -(-p.width // x.BV) if local else x.blocks
    with instructions(x.wgmma(p.count)):
        walk.forward[(blocks, p.count, x.B * x.H)](
            made.q, made.k, x.v, made.k_in, made.b_in, made.a_out, made.ends, x.beta, x.G_sum, x.lw, x.m,
            x.seg, made.A, made.Aa, made.Lk, made.W,
            S0, n0, y, den, S1, n1, states, nstates, errors, p.decay, x.T, p.chunks,
            x.H, x.H // made.k.shape[2], x.K, x.V, x.BK, x.BV, x.C, x.rule, x.decay, int(x.u is not None),
            x.normed, local, p.width if local else x.V, x.CT, x.prec,
            num_warps=warps(x), num_stages=stages(x, p),
        )  # fmt: skip


def launch_reverse(
    x, made, p, dy, dden, dS1, dn1, *, local=False, dv=None, dx=None, keep=None, dS0=None, dn0=None
):
    dstates, dnstates = keep or (None, None)
    with instructions(x.wgmma(p.count)):
        walk.reverse[(x.blocks, p.count, x.B * x.H)](
            made.q, made.k, made.k_in, made.b_in, made.a_out, made.ends, x.beta, x.G_sum, x.lw, x.seg,
            made.A, made.Aa, made.Lk, made.W,
            dy, dden, dS1, dn1, dv, dx, dstates, dnstates, dS0, dn0, x.T, p.chunks,
            x.H, x.H // made.k.shape[2], x.K, x.V, x.BK, x.BV, x.C, x.rule, x.decay, int(x.u is not None),
            x.normed, local, x.CT, x.prec, num_warps=warps(x), num_stages=stages(x, p),
        )  # fmt: skip


def warps(x: Inputs) -> int:
    return 8 if x.BK * x.BV > 128 * 64 else 4


def wide(x: Inputs) -> int:
    """Warps of the kernels that hold several tiles of a chunk at once."""
    return 8 if x.rule != "outer" or x.decay == 2 else 4


def pair_warps(x: Inputs) -> int:
    return 8 if x.rule == "dplr" else 4


def gradient_stages(x: Inputs) -> int:
    return 2 if x.normed and x.CT == tl.bfloat16 else 1


def slice_of_keys(x: Inputs) -> int:
    """Keys a program of `gradients`."""
    return min(64, x.BK)


def stages(x: Inputs, p: Parts) -> int:
    """Chunks whose tiles are on their way to a walk at once."""
    return 2 if x.CT == tl.bfloat16 and x.BK <= 128 and p.count == 1 else 1


def start(x: Inputs, p: Parts):
    if p.count == 1:
        return x.state, x.norm
    return join(x, p, p.local, p.norm, x.state, x.norm, False)


def run(x: Inputs, made: Made) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, last state, last normaliser, what y was divided by)."""
    p = cut(x, made)
    S0, n0 = start(x, p)
    y, S1 = torch.empty_like(x.v), x.new(x.B, x.H, x.K, x.V)
    n1 = x.new(x.B, x.H, x.K) if x.normed else None
    den = x.new(x.B, x.T, x.H) if x.normed else None
    launch_forward(x, made, p, S0, n0, y=y, den=den, S1=S1, n1=n1)
    return y, S1, n1, den


def run_backward(x: Inputs, made: Made, dy, dden, dS1, dn1) -> dict[str, Tensor | None]:
    """Gradients by the names of `Inputs`; "weight" is that of β or of the log write weights."""
    p = cut(x, made)
    BH, N = x.B * x.H, x.chunks
    states, dstates = (x.new(BH, N, x.K, x.V, dtype=x.store) for _ in range(2))
    nstates, dnstates = (x.new(BH, N, x.K) if x.normed else None for _ in range(2))
    corrected = x.rule != "outer"
    errors = x.new(*x.v.shape, dtype=x.store) if corrected else None
    launch_forward(x, made, p, *start(x, p), keep=(states, nstates, errors))
    dv = torch.empty_like(x.v)
    dx = torch.empty_like(errors) if x.rule == "dplr" else dv if corrected else None
    dS0, dn0 = x.new(x.B, x.H, x.K, x.V), x.new(x.B, x.H, x.K) if x.normed else None
    if p.count > 1:
        local, nlocal = x.new(BH, p.count, x.K, x.V), x.new(BH, p.count, x.K) if x.normed else None
        launch_reverse(x, made, p, dy, dden, None, None, local=True, dS0=local, dn0=nlocal)
        dS1, dn1 = join(x, p, local, nlocal, dS1, dn1, True)
    launch_reverse(x, made, p, dy, dden, dS1, dn1, dv=dv, dx=dx, keep=(dstates, dnstates), dS0=dS0, dn0=dn0)
    return {
        "v": dv,
        "state": dS0,
        "norm": dn0,
        **rest(x, dy, dx, dden, errors, states, nstates, dstates, dnstates),
    }


def rest(x: Inputs, dy, dx, dden, errors, states, nstates, dstates, dnstates) -> dict[str, Tensor | None]:
    """All gradients but those of v and the state."""
    BK = slice_of_keys(x)
    blocks, heads = -(-x.K // BK), (x.B, x.T, x.H)
    dq, dk = (x.new(*heads, x.K, dtype=t.dtype) for t in (x.q, x.k))
    da, db = (None if t is None else torch.empty_like(t) for t in (x.a, x.b))
    dg = None if x.decay == 0 else torch.empty_like(x.g) if x.decay == 2 else x.new(blocks, *heads)
    dweight = x.new(blocks, *heads) if x.rule == "delta" or x.normed else None
    du = None if x.u is None else x.new(x.B, x.H, x.chunks, x.K)
    with instructions(x.wgmma()):
        gradients[(x.chunks, blocks, x.B * x.H)](
            x.q, x.k, x.a, x.b, x.u, x.beta, x.g, x.G_sum, x.lw, x.seg,
            errors if x.rule == "delta" else x.v, errors, dy, dx, dden, states, nstates, dstates, dnstates,
            dq, dk, da, db, dg, dweight, du, x.B, x.T,
            x.H, x.H // x.G, x.K, x.V, BK, min(64, max(x.least[0], triton.next_power_of_2(x.V))), x.C, x.rule,
            x.decay, x.normed, x.CT, x.prec, num_warps=wide(x), num_stages=gradient_stages(x),
        )  # fmt: skip
    if x.G != x.H:
        dq, dk = (d.view(x.B, x.T, x.G, -1, x.K).sum(3) for d in (dq, dk))
    return {
        "q": dq, "k": dk, "a": da, "b": db,
        "g": dg if x.decay != 1 else dg.sum(0).to(x.g.dtype),
        "weight": None if dweight is None else dweight.sum(0),
        "u": None if du is None else du.sum((0, 2)).to(x.u.dtype),
    }  # fmt: skip
