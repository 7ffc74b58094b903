"""Matrix memories on a GPU: three rules, one plan. Tensor cores take chunks of C steps; one state goes on.

With G the log-decays summed inside a chunk, D the decays e^{G_i - G_j} between its steps, S the state
before it:

    outer   y = e^G q S + A v
    delta   y = e^G q S + A β r           r = W (v - e^G k S)
    dplr    y = e^G q S + A v + Aa w      w = W (e^{G₋} b S + Lk v)

    the next S is e^{G_C} S + (e^{G_C - G} k)ᵀ times what is written: v, β r, v; for dplr + (e^{G_C - G} a)ᵀ w
    A = tril(q kᵀ D)    Aa = tril(q aᵀ D)    Lk = tril(b kᵀ D₋, -1)
    W inverts I + tril(k kᵀ D, -1) β, for dplr I - tril(b aᵀ D₋, -1); ₋ leaves a step's own decay out

First `pairs` makes the (C, C) matrices, all chunks at once (per head without correction the outputs make A
themselves). delta and dplr: `forward` walks the chunks with S on chip; for the backward, `reverse` walks back
with dS and yields dv, or dx of delta and dplr. outer: `accumulate` walks and only writes states, `outputs`
makes y of all chunks at once; for the backward both again, with time and against it. `gradients` has the
rest, all chunks at once, from the states that the two walks wrote in half precision.

If batch × heads × state blocks leave the device idle, time is cut into parts: parts are walked from zero
(for delta and dplr from the identity as well, which gives their transitions), `join` passes the states
through, and the parts are walked again from their true states. Sums always run in the same order: the same
input, the same bits.

bfloat16 multiplies as bfloat16, float16 as tf32 (as precise, without its narrow range), float32 as three
tf32 products; sums, states and decays are float32. Launch parameters are rules of shape and dtype: nothing
is tuned at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import matrices, walk
from .gradients import gradients, weights
from .launch import cdiv, launch, power_of_2
from .outputs import outputs
from .plan import (
    Inputs,
    ahead,
    gradient_registers,
    output_registers,
    output_values,
    pair_registers,
    slice_of_keys,
    slice_of_values,
    sum_stages,
    warps,
)

OPS = ("outer", "mlstm", "delta", "dplr")
WIDEST = 256  # keys a head


def refuses(k: Tensor) -> str | None:
    """Why keys k (B, T, G, K) cannot be taken, or None."""
    return f"its state holds at most {WIDEST} keys a head, K = {k.shape[3]}" if k.shape[3] > WIDEST else None


@dataclass
class Made:
    """What `matrices.py` makes of the inputs, and where the walks find q and k; what a rule does not need
    is None."""

    q: Tensor
    k: Tensor
    group: int  # heads that share a head of q and k
    A: Tensor | None = None
    Aa: Tensor | None = None
    Lk: Tensor | None = None
    W: Tensor | None = None
    b_in: Tensor | None = None
    a_out: Tensor | None = None
    ends: Tensor | None = None
    sums: Tensor | None = None


def pairs(x: Inputs, known: tuple[Tensor | None, ...] | None = None) -> Made:
    """`known` are the (C, C) matrices (A, Aa, Lk, W) of the forward, if this is its backward."""
    made = Made(x.q, x.k, 1 if x.decay == 2 else x.H // x.G)
    if x.inline:
        return made
    full, delta, dplr = x.decay == 2, x.rule == "delta", x.rule == "dplr"
    matrix = (x.B * x.H, x.chunks, x.C, x.C)
    needed = (True, dplr, dplr, delta or dplr)
    made.A, made.Aa, made.Lk, made.W = known or (x.new(*matrix, dtype=x.store) if n else None for n in needed)
    raw, faded = (x.q, x.k, x.a, x.b), (None,) * 4
    if full:
        fade(x, made, known is not None)
        faded = (made.q, made.k, made.b_in, made.a_out)
    for strong in () if known else (False, True) if full else (False,):
        launch(
            matrices.pairs, (x.chunks, x.B * x.H),
            (*raw, *((None,) * 4 if strong else faded), x.u, x.strengths, x.g, x.G_sum, x.seg,
             made.A, made.Aa, made.Lk, made.W, made.ends, x.T),
            (x.H, x.H // x.G, x.K, min(x.BK, 64), x.BK, x.C, x.rule, x.decay, strong, x.CT, x.prec),
            4, 1, x.wgmma, None if strong else pair_registers(x),
        )  # fmt: skip
    return made


def fade(x: Inputs, made: Made, summed: bool) -> None:
    """Multiplies decays per key into what meets the state."""
    delta, dplr, tile = x.rule == "delta", x.rule == "dplr", (x.store, x.B, x.T, x.H, x.K)
    made.q, made.k, made.b_in, made.a_out, made.ends = x.scratch(
        tile, tile, tile if delta or dplr else None, tile if dplr else None,
        (torch.float32, x.B * x.H, x.chunks, x.K),
    )  # fmt: skip
    made.sums = x.new(x.B, x.T, x.H, x.K) if summed else None
    BK = min(x.BK, 64)
    launch(
        matrices.fading, (cdiv(x.K, BK), x.chunks, x.B * x.H),
        (x.q, x.k, x.a, x.b, x.g, made.q, made.k, made.b_in, made.a_out, made.sums, made.ends, x.T),
        (x.H, x.H // x.G, x.K, BK, x.C, x.rule, x.shift), 4,
    )  # fmt: skip


@dataclass
class Parts:
    """Time cut into `count` parts of `chunks` chunks, and what each does to a state of a corrected memory."""

    count: int
    chunks: int
    width: int = 0
    local: Tensor | None = None  # (B·H, parts, K, width): final states from zero, then transitions


def divide(x: Inputs) -> Parts:
    chunks = cdiv(x.chunks, x.parts)
    return Parts(cdiv(x.chunks, chunks), chunks)


def cut(x: Inputs, made: Made) -> Parts:
    p = divide(x)
    if p.count > 1:
        p.width = x.blocks * x.BV + x.K  # transitions begin on a block's edge
        (p.local,) = x.scratch((torch.float32, x.B * x.H, p.count, x.K, p.width))
        launch_forward(x, made, p, None, local=True, S1=p.local)
    return p


def join(x: Inputs, count: int, local, width: int, total, total_width: int, nlocal, start, backwards: bool):
    """The state and normaliser (or their gradients) with which each part is entered; `start`: the first."""
    part = (torch.float32, x.B * x.H, count, x.K)
    starts, nstarts = x.scratch((*part, x.V), None if nlocal is None else part)
    BV = min(32, max(16, power_of_2(x.V)))
    launch(
        walk.join, (cdiv(x.V, BV), x.B * x.H),
        (local, total, nlocal, *start, starts, nstarts, count, width),
        (x.K, x.V, x.BK, BV, x.blocks * x.BV, backwards, x.rule != "outer", total_width), 4, wgmma=False,
    )  # fmt: skip
    return starts, nstarts


def accumulate(x: Inputs, made: Made, dy=None, fed=None, state=None, norm=None, last: bool = True):
    """(states, normalisers) before each chunk and after the last one; with dy their gradients, backwards."""
    back, BH, p = dy is not None, x.B * x.H, divide(x)
    source = made.q if back else made.k
    BK, BV = x.state_tile

    def go(S0, n0, states, nstates, S1, n1, total, local):
        launch(
            walk.accumulate, (x.state_blocks, p.count, BH),
            (source, dy if back else x.v, x.G_sum, x.lw, x.lr, fed, made.ends, x.seg, S0, n0, states, nstates,
             S1, n1, total, x.T, p.chunks),
            (x.H, made.group, x.K, x.V, BK, BV, x.C, x.decay, x.shift, back, local, x.CT, x.prec),
            4, sum_stages(x), x.wgmma,
        )  # fmt: skip

    f32 = torch.float32
    if p.count > 1:
        part = (f32, BH, p.count, x.K)
        local, nlocal, total = x.scratch((*part, x.V), part if x.normed else None, part)
        go(None, None, None, None, local, nlocal, total, True)
        state, norm = join(x, p.count, local, x.V, total, x.K, nlocal, (state, norm), back)
    before = (BH, x.chunks, x.K)
    states, nstates = x.scratch((x.store, *before, x.V), (f32, *before) if x.normed else None)
    S1 = x.new(x.B, x.H, x.K, x.V) if last else None
    n1 = x.new(x.B, x.H, x.K) if last and x.normed else None
    go(state, norm, states, nstates, S1, n1, None, False)
    return states, nstates, S1, n1


def launch_outputs(x: Inputs, made: Made, states, nstates=None, dy=None):
    """(y, what it was divided by), or with dy and the gradients of states (dv, None)."""
    back = dy is not None
    y = torch.empty_like(x.v)
    den = x.new(x.B, x.T, x.H) if x.normed and not back else None
    source, other = (made.k, made.q) if back else (made.q, made.k)
    BV, rows = output_values(x), min(x.C, 64)
    launch(
        outputs, (cdiv(x.V, BV), x.chunks * (x.C // rows), x.B * x.H),
        (source, other, dy if back else x.v, x.G_sum, x.lw, x.lr, x.m, x.seg, made.A, states,
         None if back else nstates, y, den, x.T),
        (x.H, made.group, x.K, x.V, x.BK, BV, x.C, rows, x.decay, x.shift, back, x.CT, x.prec),
        4, 1, x.wgmma, output_registers(x),
    )  # fmt: skip
    return y, den


def launch_forward(x, made, p, S0, *, local=False, y=None, S1=None, keep=(None, None)):
    """`walk.forward` over all parts; `keep` is (states, errors) to write."""
    all = y is not None
    BV = x.BV if local else x.values(all)
    blocks = cdiv(p.width if local else x.V, BV)
    parts = p.count - 1 if local and not x.back else p.count  # only the backward asks for the last transition
    stages, carry = ahead(x, BV, all)
    launch(
        walk.forward, (blocks, parts, x.B * x.H),
        (made.q, made.k, x.v, made.b_in, made.a_out, made.ends, x.strengths, x.G_sum, x.seg,
         made.A, made.Aa, made.Lk, made.W, S0, y, S1, *keep, x.T, p.chunks, p.count),
        (x.H, made.group, x.K, x.V, x.BK, BV, x.C, x.rule, x.decay, local, p.width if local else x.V, carry,
         x.CT, x.prec),
        warps(x), stages, x.wgmma,
    )  # fmt: skip


def launch_reverse(x, made, p, dy, dS1, *, local=False, dv=None, dx=None, dstates=None, dS0=None):
    stages, carry = ahead(x, x.BV, True)
    launch(
        walk.reverse, (x.blocks, p.count - local, x.B * x.H),
        (made.q, made.k, made.b_in, made.a_out, made.ends, x.strengths, x.G_sum, x.seg,
         made.A, made.Aa, made.Lk, made.W, dy, dS1, dv, dx, dstates, dS0, x.T, p.chunks, p.count),
        (x.H, made.group, x.K, x.V, x.BK, x.BV, x.C, x.rule, x.decay, local, carry, x.CT, x.prec),
        warps(x), stages, x.wgmma,
    )  # fmt: skip


def start(x: Inputs, p: Parts) -> Tensor | None:
    if p.count == 1:
        return x.state
    return join(x, p.count, p.local, p.width, p.local, p.width, None, (x.state, None), False)[0]


def run(x: Inputs, made: Made) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(y, last state, last normaliser, what y was divided by)."""
    if x.rule == "outer":
        states, nstates, S1, n1 = accumulate(x, made, state=x.state, norm=x.norm)
        y, den = launch_outputs(x, made, states, nstates)
        return y, S1, n1, den
    p = cut(x, made)
    y, S1 = torch.empty_like(x.v), x.new(x.B, x.H, x.K, x.V)
    launch_forward(x, made, p, start(x, p), y=y, S1=S1)
    return y, S1, None, None


def run_backward(x: Inputs, made: Made, dy, dden, dS1, dn1) -> dict[str, Tensor | None]:
    """Gradients by the names of `Inputs`; "weight" is that of β or of the log write weights."""
    if x.rule == "outer":
        states, nstates, _, _ = accumulate(x, made, state=x.state, norm=x.norm, last=False)
        begun = x.state is not None
        dstates, dnstates, dS0, dn0 = accumulate(x, made, dy, dden, dS1, dn1, last=begun)
        others = rest(x, made, dy, None, dden, None, states, nstates, dstates, dnstates)
        del states, nstates  # what holds the most memory goes before more is asked for
        dv, _ = launch_outputs(x, made, dstates, dy=dy)
        return {"v": dv, "state": dS0, "norm": dn0, **others}
    p = cut(x, made)
    each, like_v = (x.store, x.B * x.H, x.chunks, x.K, x.V), (x.store, *x.v.shape)
    states, dstates, errors, dx = x.scratch(each, each, like_v, like_v if x.rule == "dplr" else None)
    launch_forward(x, made, p, start(x, p), keep=(states, errors))
    dv, dS0 = torch.empty_like(x.v), None if x.state is None else torch.empty_like(x.state)
    dx = dv if dx is None else dx
    if p.count > 1:
        (local,) = x.scratch((torch.float32, x.B * x.H, p.count, x.K, x.V))
        launch_reverse(x, made, p, dy, None, local=True, dS0=local)
        dS1, _ = join(x, p.count, local, x.V, p.local, p.width, None, (dS1, None), True)
    launch_reverse(x, made, p, dy, dS1, dv=dv, dx=dx, dstates=dstates, dS0=dS0)
    return {"v": dv, "state": dS0, **rest(x, made, dy, dx, dden, errors, states, None, dstates, None)}


def launch_weights(x: Inputs, value, w, dy, dx, dden):
    """(Pq, Px, Pa, Pw, own, own_a) of `gradients.weights`, None what the rule does not need."""
    corrected, dplr = x.rule != "outer", x.rule == "dplr"
    matrix, row = (x.store, x.B * x.H, x.chunks, x.C, x.C), (torch.float32, x.B, x.T, x.H)
    wanted = (True, corrected, dplr, dplr)
    apart = row if dplr or x.shift else None
    P = x.scratch(*(matrix if n else None for n in wanted), apart, row if dplr else None)
    launch(
        weights, (x.chunks, x.B * x.H), (value, w, dy, dx, x.G_sum, x.lw, x.lr, x.seg, dden, *P, x.T),
        (x.H, x.V, slice_of_values(x), x.C, x.rule, x.decay, x.shift, x.CT, x.prec), 4, 1, x.wgmma,
    )  # fmt: skip
    return P


def rest(x, made, dy, dx, dden, errors, states, nstates, dstates, dnstates) -> dict[str, Tensor | None]:
    """All gradients but those of v and the state."""
    BK = slice_of_keys(x)
    blocks, heads = cdiv(x.K, BK), (x.B, x.T, x.H)
    dq, dk = (x.new(*heads, x.K, dtype=t.dtype) for t in (x.q, x.k))
    da, db = (None if t is None else torch.empty_like(t) for t in (x.a, x.b))
    dg = None if x.decay == 0 else torch.empty_like(x.g) if blocks == 1 else x.new(blocks, *heads)
    if x.decay == 2:  # each program reads its sums before it writes its gradients in their place
        dg = made.sums if x.g.dtype == torch.float32 else torch.empty_like(x.g)
    weight = x.beta if x.rule == "delta" else x.lw
    dweight = None
    if weight is not None:
        dweight = x.new(*heads, dtype=weight.dtype) if blocks == 1 else x.new(blocks, *heads)
    du = None if x.u is None else x.new(x.B, x.H, x.chunks, x.K)
    w = errors if x.rule == "dplr" else None
    value = errors if x.rule == "delta" else x.v
    P = launch_weights(x, value, w, dy, dx, dden)
    BV, faded = slice_of_values(x), (made.q, made.k, made.b_in, made.a_out)
    for strong in (False, True) if x.decay == 2 else (False,):
        launch(
            gradients, (blocks, x.chunks, x.B * x.H),
            (x.q, x.k, x.a, x.b, *((None,) * 4 if strong or x.decay < 2 else faded), x.u,
             x.strengths, x.g, x.G_sum, x.lw, x.lr, x.seg, made.sums, made.ends, value, w, dy, dx, dden,
             states, nstates, dstates, dnstates, *P, dq, dk, da, db, dg, dweight, du, x.B, x.T),
            (x.H, x.H // x.G, x.K, x.V, BK, BV, x.C, x.rule, x.decay, strong, x.CT, x.prec),
            4, 1, x.wgmma, gradient_registers(x),
        )  # fmt: skip
    if x.G != x.H:
        dq, dk = (d.view(x.B, x.T, x.G, -1, x.K).sum(3) for d in (dq, dk))
    return {
        "q": dq, "k": dk, "a": da, "b": db,
        "g": dg if x.decay != 1 or blocks == 1 else dg.sum(0).to(x.g.dtype),
        "weight": dweight if weight is None or blocks == 1 else dweight.sum(0).to(weight.dtype),
        "u": None if du is None else du.sum((0, 2)).to(x.u.dtype),
    }  # fmt: skip
