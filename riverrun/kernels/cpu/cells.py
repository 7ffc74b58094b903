"""Nonlinear cells on a CPU: sequential in time, parallel over groups of batch rows and heads.

A task walks its rows through time together, so that the head's matrix R is read from the cache once a step
for all of them. Forward keeps what each step's gradient needs (`keep`). Backward walks the gradient dp of the
gates back in time, and sums dR and dc from it afterwards, as one matrix product over all times.

For products the gates and rows of R are one axis: p, dp (..., G · P) and, for each head, R (G · P, P) or its
transpose.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import block_size, kernel, same_dtype, spread
from .elementary import compiled, exp, log_sigmoid, sigmoid, tanh
from .product import add_product, packed, padded, width
from .team import divided
from .threads import array

ELMAN, LSTM, GRU, SLSTM = range(4)
SHORT = 8  # rows times steps up to which R is read as it lies: packing it would take longer
STRETCH = 64  # steps of dp and h that are summed into dR at a time


# The steps below take one row's gates p (gates, P), states st (states, P) and what is kept (kept, P). Their
# loops index vectors, not rows of matrices: only then does the compiler see that neighbours are neighbours,
# and use vectors.


@compiled
def _elman(p, st):
    a, h = p[0], st[0]
    for j in range(h.shape[0]):
        h[j] = tanh(a[j])


@compiled
def _elman_backward(y, dst, dp):
    dh, da = dst[0], dp[0]
    for j in range(y.shape[0]):
        da[j] = dh[j] * (type(y[j])(1) - y[j] * y[j])
        dh[j] = 0


@compiled
def _lstm(p, st, keep):
    pi, pf, pz, po, h, s = p[0], p[1], p[2], p[3], st[0], st[1]
    ki, kf, kz, ko, ks = keep[0], keep[1], keep[2], keep[3], keep[4]
    for j in range(h.shape[0]):
        i, f, z, o = sigmoid(pi[j]), sigmoid(pf[j]), tanh(pz[j]), sigmoid(po[j])
        s[j] = f * s[j] + i * z
        h[j] = o * tanh(s[j])
        ki[j], kf[j], kz[j], ko[j], ks[j] = i, f, z, o, s[j]


@compiled
def _lstm_backward(keep, before, dst, dp):
    ki, kf, kz, ko, ks = keep[0], keep[1], keep[2], keep[3], keep[4]
    di, df, dz, do, dh, ds, s0 = dp[0], dp[1], dp[2], dp[3], dst[0], dst[1], before[1]
    for j in range(dh.shape[0]):
        i, f, z, o, s = ki[j], kf[j], kz[j], ko[j], tanh(ks[j])
        one = type(s)(1)
        d = ds[j] + dh[j] * o * (one - s * s)
        di[j] = d * z * i * (one - i)
        df[j] = d * s0[j] * f * (one - f)
        dz[j] = d * i * (one - z * z)
        do[j] = dh[j] * s * o * (one - o)
        dh[j] = 0
        ds[j] = d * f


@compiled
def _gru(p, st, keep, x):
    pr, pu, pz, h = p[0], p[1], p[2], st[0]
    kr, ku, kq, kz = keep[0], keep[1], keep[2], keep[3]
    for j in range(h.shape[0]):
        r, u, q = sigmoid(pr[j]), sigmoid(pu[j]), pz[j]
        z = tanh(x[j] + r * q)
        h[j] = z + u * (h[j] - z)
        kr[j], ku[j], kq[j], kz[j] = r, u, q, z


@compiled
def _gru_backward(keep, before, dst, dp, dx):
    """dp is the gradient of R h + c; dx that of x's last gate."""
    kr, ku, kq, kz, h0 = keep[0], keep[1], keep[2], keep[3], before[0]
    dr, du, dq, dh = dp[0], dp[1], dp[2], dst[0]
    for j in range(dh.shape[0]):
        r, u, z = kr[j], ku[j], kz[j]
        one = type(r)(1)
        d = dh[j] * (one - u) * (one - z * z)
        dx[j] = d
        dr[j] = d * kq[j] * r * (one - r)
        du[j] = dh[j] * (h0[j] - z) * u * (one - u)
        dq[j] = d * r
        dh[j] = dh[j] * u


@compiled
def _slstm(p, st, keep):
    pi, pf, pz, po, h, s, n, m = p[0], p[1], p[2], p[3], st[0], st[1], st[2], st[3]
    ka, kf, kz, ko, ks, kn = keep[0], keep[1], keep[2], keep[3], keep[4], keep[5]
    for j in range(h.shape[0]):
        z, o, one = tanh(pz[j]), sigmoid(po[j]), type(pz[j])(1)
        kept = log_sigmoid(pf[j]) + m[j]
        ahead = kept - pi[j]  # the old maximum's lead over the new candidate; of e^{φ-m} and e^{i-m} one is 1
        small = exp(-abs(ahead))
        forget, write = (one if ahead >= 0 else small), (small if ahead >= 0 else one)
        m[j] = max(kept, pi[j])
        s[j] = forget * s[j] + write * z
        n[j] = forget * n[j] + write
        h[j] = o * s[j] / n[j]
        ka[j], kf[j], kz[j], ko[j], ks[j], kn[j] = ahead, sigmoid(-pf[j]), z, o, s[j], n[j]


@compiled
def _slstm_backward(keep, before, dst, dp):
    ka, kf, kz, ko, ks, kn = keep[0], keep[1], keep[2], keep[3], keep[4], keep[5]
    di, df, dz, do, s0, n0 = dp[0], dp[1], dp[2], dp[3], before[1], before[2]
    dh, ds, dn, dm = dst[0], dst[1], dst[2], dst[3]
    for j in range(dh.shape[0]):
        ahead, z, o, s, one = ka[j], kz[j], ko[j], ks[j], type(ka[j])(1)
        small = exp(-abs(ahead))
        forget, write = (one if ahead >= 0 else small), (small if ahead >= 0 else one)
        d = dh[j] / kn[j]
        to_s = ds[j] + d * o
        to_n = dn[j] - d * o * s / kn[j]
        kept, new = (to_s * s0[j] + to_n * n0[j]) * forget, (to_s * z + to_n) * write
        top = dm[j] - kept - new  # to the larger of the two; equals share it, as torch.maximum has it
        share = type(z)(0.5) if ahead == 0 else (one if ahead > 0 else type(z)(0))
        kept = kept + share * top
        di[j] = new + (one - share) * top
        df[j] = kept * kf[j]
        dz[j] = to_s * write * (one - z * z)
        do[j] = d * s * o * (one - o)
        dh[j] = 0
        ds[j] = to_s * forget
        dn[j] = to_n * forget
        dm[j] = kept


@kernel
def _add_direct(p, h, R, head):
    """p (rows, ...) += R[:, head] h, for R (G, H, P, P) as it lies."""
    G, _, P, _ = R.shape
    for g in range(G):
        for j in range(P):
            row = R[g, head, j]
            for r in range(p.shape[0]):
                h_r, total = h[r], 0 * p[r, 0]
                for k in range(P):
                    total += row[k] * h_r[k]
                p[r, g * P + j] += total


@kernel
def _forward(first, step, kind, x, direct, R, c, state, initial, reset, rows, y, kept):
    """x (B, T, G, H, P), R packed (H, P, G · P) or, if `direct`, (G, H, P, P), c (G, H, P), kept (B, T, H, K,
    P) or empty; state (S, B, H, P) enters as the first and leaves as the last; initial (S) is what a reset
    puts there."""
    if divided(first, step):
        return
    batch, T, G, H, P = x.shape
    groups = (batch + rows - 1) // rows
    S = state.shape[0]
    for task in range(first, H * groups, step):
        head, lo = task // groups, task % groups * rows
        count = min(rows, batch - lo)
        st, h = np.empty((count, S, P), x.dtype), np.zeros((rows, P), x.dtype)
        p = np.zeros((rows, G * P if direct else R.shape[1] * R.shape[3]), x.dtype)
        spare = np.empty(kept.shape[3:], x.dtype)
        for r in range(count):
            for s in range(S):
                st[r, s] = state[s, lo + r, head]
        for t in range(T):
            for r in range(count):
                if reset.shape[0] and reset[lo + r, t]:
                    for s in range(S):
                        st[r, s] = initial[s]
                h[r] = st[r, 0]
                for g in range(G):
                    p_g, x_g, c_g = p[r, g * P : g * P + P], x[lo + r, t, g, head], c[g, head]
                    if kind == GRU and g == 2:
                        p_g[:] = c_g
                    else:
                        for j in range(P):
                            p_g[j] = x_g[j] + c_g[j]
            if direct:
                _add_direct(p, h, R, head)
            else:
                add_product(p, h, R[head])
            for r in range(count):
                keep = kept[lo + r, t, head] if kept.shape[0] else spare
                gates = p[r, : G * P].reshape(G, P)
                if kind == ELMAN:
                    _elman(gates, st[r])
                elif kind == LSTM:
                    _lstm(gates, st[r], keep)
                elif kind == GRU:
                    _gru(gates, st[r], keep, x[lo + r, t, 2, head])
                else:
                    _slstm(gates, st[r], keep)
                y[lo + r, t, head] = st[r, 0]
        for r in range(count):
            for s in range(S):
                state[s, lo + r, head] = st[r, s]


@kernel
def _backward(first, step, kind, R, state, initial, reset, rows, y, kept, dy, dstate, dp, dx):
    """R packed (H, G · P, P), state (S, B, H, P) the first, dp the gradient of R h + c, dx that of x where it
    differs (GRU). dstate (S, B, H, P) enters as the gradient of the last state and leaves as that of the
    first."""
    if divided(first, step):
        return
    batch, T, G, H, P = dp.shape
    groups = (batch + rows - 1) // rows
    S = state.shape[0]
    for task in range(first, H * groups, step):
        head, lo = task // groups, task % groups * rows
        count = min(rows, batch - lo)
        dst, before = np.empty((count, S, P), y.dtype), np.empty((S, P), y.dtype)
        dh, d = np.zeros((rows, R.shape[1] * R.shape[3]), y.dtype), np.zeros((rows, G * P), y.dtype)
        for r in range(count):
            for s in range(S):
                dst[r, s] = dstate[s, lo + r, head]
        for t in range(T - 1, -1, -1):
            for r in range(count):
                i = lo + r
                dh_r, dy_r, gates = dst[r, 0], dy[i, t, head], d[r].reshape(G, P)
                for j in range(P):
                    dh_r[j] += dy_r[j]
                for s in range(min(S, 3)):  # h, s and n before this step, which the gradients read
                    if reset.shape[0] and reset[i, t]:
                        before[s] = initial[s]
                    elif t == 0:
                        before[s] = state[s, i, head]
                    elif s == 0:
                        before[s] = y[i, t - 1, head]
                    else:
                        before[s] = kept[i, t - 1, head, 3 + s]
                if kind == ELMAN:
                    _elman_backward(y[i, t, head], dst[r], gates)
                elif kind == LSTM:
                    _lstm_backward(kept[i, t, head], before, dst[r], gates)
                elif kind == GRU:
                    _gru_backward(kept[i, t, head], before, dst[r], gates, dx[i, t, 2, head])
                    dx[i, t, 0, head] = gates[0]
                    dx[i, t, 1, head] = gates[1]
                else:
                    _slstm_backward(kept[i, t, head], before, dst[r], gates)
                for g in range(G):
                    dp[i, t, g, head] = gates[g]
                dh[r, :P] = dst[r, 0]
            add_product(dh, d, R[head])
            for r in range(count):
                if reset.shape[0] and reset[lo + r, t]:
                    dst[r] = 0
                else:
                    dst[r, 0] = dh[r, :P]
        for r in range(count):
            for s in range(S):
                dstate[s, lo + r, head] = dst[r, s]


@kernel
def _matrix_backward(first, step, dp, h, size, dR, dc):
    """dR (H, G · P, P) = Σ_bt dp hᵀ and dc (H, G · P) = Σ_bt dp, with the h before each step packed as (B, T
    / STRETCH, H, tiles, STRETCH, WIDTH). A task sums `size` rows of dR, a multiple of four, in the order of
    time."""
    if divided(first, step):
        return
    batch, T, G, H, P = dp.shape
    groups = (G * P + size - 1) // size
    for task in range(first, H * groups, step):
        head, lo = task // groups, task % groups * size
        fours = (min(size, G * P - lo) + 3) // 4
        acc = np.zeros((fours, 4, h.shape[3] * h.shape[5]), dp.dtype)
        v, sums = np.empty((4, STRETCH), dp.dtype), np.zeros(4 * fours, dp.dtype)
        for i in range(batch):
            for chunk in range(h.shape[1]):
                for four in range(fours):
                    for r in range(4):
                        row = min(lo + 4 * four + r, G * P - 1)
                        g, j = row // P, row % P
                        for k in range(STRETCH):
                            t = chunk * STRETCH + k
                            v[r, k] = dp[i, t, g, head, j] if t < T else 0
                            sums[4 * four + r] += v[r, k]
                    add_product(acc[four], v, h[i, chunk, head])
        for r in range(min(size, G * P - lo)):
            dc[head, lo + r] = sums[r]
            dR[head, lo + r] = acc[r // 4, r % 4, :P]


def _rows(batch: int, heads: int) -> int:
    """Batch rows a task: many share one reading of R, few leave tasks for every thread."""
    return 4 if batch * heads >= 16 else 2 if batch * heads >= 4 else 1


def _first(x: Tensor, states: tuple[Tensor | None, ...], start: tuple[float, ...]) -> Tensor:
    """The states before the first step as one tensor (S, B, H, P)."""
    batch, _, _, H, P = x.shape
    if states[0] is None:
        return torch.tensor(start, dtype=x.dtype).view(-1, 1, 1, 1).repeat(1, batch, H, P)
    return torch.stack(states)


def _before(y: Tensor, h0: Tensor, reset: Tensor | None) -> Tensor:
    """The h that each step read, packed in stretches of time for `_matrix_backward`."""
    batch, T, H, P = y.shape
    h = torch.cat([h0[:, None], y[:, :-1]], 1)
    if reset is not None:
        h = h.masked_fill(reset[..., None, None], 0)
    columns = padded(P, y.dtype)
    h = F.pad(h, (0, columns - P, 0, 0, 0, -T % STRETCH))
    h = h.view(batch, -1, STRETCH, H, columns // width(y.dtype), width(y.dtype))
    return h.permute(0, 1, 3, 4, 2, 5).contiguous()


def _define(name: str, kind: int, keeps: int, start: tuple[float, ...]) -> Callable:
    """The operator of one cell: `keeps` values a unit and step are saved, `start` is what a reset puts the
    states to."""
    S = len(start)

    def run(x, R, c, *rest):
        *states, reset, save = rest
        batch, T, G, H, P = x.shape
        state = _first(x, states, start)
        c = x.new_zeros(G, H, P) if c is None else c.contiguous()
        y, kept = x.new_empty(batch, T, H, P), x.new_empty(batch if save else 0, T, H, keeps, P)
        reset = None if reset is None else reset.contiguous()
        initial = np.array(start, array(state).dtype)
        direct = batch * T <= SHORT
        matrix = R.contiguous() if direct else packed(R.permute(1, 3, 0, 2).reshape(H, P, G * P))
        rows, work = _rows(batch, H), x.numel() * P
        inputs = (kind, x.contiguous(), direct, matrix, c, state, initial, reset, rows)
        spread(_forward, H * -(-batch // rows), work, *inputs, y, kept)
        return y, *(s.clone() for s in state), kept

    def run_backward(x, R, c, *rest):
        states, (reset, y), rest = rest[:S], rest[S : S + 2], rest[S + 2 + S :]
        kept, dy, dlast = rest[0], rest[1], rest[2:]
        batch, _, G, H, P = x.shape
        first = _first(x, states, start)
        dy = torch.zeros_like(y) if dy is None else dy.contiguous()
        dstate = torch.stack([y.new_zeros(batch, H, P) if d is None else d for d in dlast])
        dp = x.new_empty(x.shape)
        dx = torch.empty_like(dp) if kind == GRU else dp
        initial, cuts = np.array(start, array(y).dtype), None if reset is None else reset.contiguous()
        matrix = packed(R.transpose(0, 1).reshape(H, G * P, P))
        rows, work = _rows(batch, H), x.numel() * P
        inputs = (kind, matrix, first, initial, cuts, rows, y, kept)
        spread(_backward, H * -(-batch // rows), work, *inputs, dy, dstate, dp, dx)
        dR, dc = y.new_empty(H, G * P, P), y.new_empty(H, G * P)
        size = block_size(G * P, H, 32)
        spread(_matrix_backward, H * -(-(G * P) // size), work, dp, _before(y, first[0], reset), size, dR, dc)
        dR = dR.view(H, G, P, P).transpose(0, 1).contiguous()
        dc = None if c is None else dc.view(H, G, P).transpose(0, 1).contiguous()
        dstates = [None if states[0] is None else d.clone() for d in dstate]
        return dx, dR, dc, *dstates, None

    def fake(x, R, c, *rest):
        batch, T, _, H, P = x.shape
        states = [x.new_empty(batch, H, P) for _ in range(S)]
        return x.new_empty(batch, T, H, P), *states, x.new_empty(batch if rest[-1] else 0, T, H, keeps, P)

    states = ", ".join(f"Tensor? s{i}" for i in range(S))
    schema = f"Tensor x, Tensor R, Tensor? c, {states}, Tensor? reset"
    op = define(f"{name}_cpu", schema, 1 + S, 1, "cpu", run, run_backward, fake)

    def cell(x: Tensor, R: Tensor, c: Tensor | None, state=None, reset: Tensor | None = None):
        y, *last = op(*same_dtype(x, R, c, *(state or [None] * S)), reset)
        return y, tuple(last)

    return cell


elman = _define("elman", ELMAN, 0, (0.0,))
lstm = _define("lstm", LSTM, 5, (0.0, 0.0))
gru = _define("gru", GRU, 4, (0.0,))
slstm = _define("slstm", SLSTM, 6, (0.0, 0.0, 0.0, -float("inf")))
