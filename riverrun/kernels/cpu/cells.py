"""Nonlinear cells on a CPU: sequential in time, parallel over groups of batch rows and heads.

A task walks its rows through time together, so that the head's matrix R is read from the cache once a step for all of
them. Forward keeps what each step's gradient needs (`KEPT`). Backward walks the gradient dp of the gates back in time,
and sums dR and dc from it afterwards, as one matrix product over all times.

Inside, gates and rows of R are one axis: p, dp (..., gates · P), R (H, gates · P, P) and its transpose.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import torch
from torch import Tensor

from riverrun.kernels.library import define

from .blocks import same_dtype
from .elementary import compiled, exp, log_sigmoid, sigmoid, tanh
from .threads import FASTMATH, array, parallel, use_threads

ELMAN, LSTM, GRU, SLSTM = range(4)
ROWS = 4  # batch rows a task at most
STRETCH = 64  # steps of dp and h that are summed into dR at a time

product_options = {"fastmath": FASTMATH, "error_model": "numpy", "cache": True}


@numba.njit(**product_options)
def add_product(acc, v, M, rows):
    """acc (rows, n) += v (rows, k) M (k, n), four rows of M at a time; 1, 2 or 4 rows."""
    K, n = M.shape
    last = K // 4 * 4
    for k in range(0, last, 4):
        if rows == 4:
            a0, a1, a2, a3 = v[0, k], v[0, k + 1], v[0, k + 2], v[0, k + 3]
            b0, b1, b2, b3 = v[1, k], v[1, k + 1], v[1, k + 2], v[1, k + 3]
            c0, c1, c2, c3 = v[2, k], v[2, k + 1], v[2, k + 2], v[2, k + 3]
            d0, d1, d2, d3 = v[3, k], v[3, k + 1], v[3, k + 2], v[3, k + 3]
            for j in range(n):
                m0, m1, m2, m3 = M[k, j], M[k + 1, j], M[k + 2, j], M[k + 3, j]
                acc[0, j] += a0 * m0 + a1 * m1 + a2 * m2 + a3 * m3
                acc[1, j] += b0 * m0 + b1 * m1 + b2 * m2 + b3 * m3
                acc[2, j] += c0 * m0 + c1 * m1 + c2 * m2 + c3 * m3
                acc[3, j] += d0 * m0 + d1 * m1 + d2 * m2 + d3 * m3
        else:
            for r in range(rows):
                a0, a1, a2, a3 = v[r, k], v[r, k + 1], v[r, k + 2], v[r, k + 3]
                for j in range(n):
                    acc[r, j] += a0 * M[k, j] + a1 * M[k + 1, j] + a2 * M[k + 2, j] + a3 * M[k + 3, j]
    for k in range(last, K):
        for r in range(rows):
            a0 = v[r, k]
            for j in range(n):
                acc[r, j] += a0 * M[k, j]


@compiled
def _elman(p, st, keep):
    for j in range(st.shape[1]):
        st[0, j] = tanh(p[j])


@compiled
def _elman_backward(y, dst, dp):
    for j in range(dst.shape[1]):
        dp[j] = dst[0, j] * (y[j] * -y[j] + type(y[j])(1))
        dst[0, j] = 0


@compiled
def _lstm(p, st, keep):
    P = st.shape[1]
    for j in range(P):
        i, f, z, o = sigmoid(p[j]), sigmoid(p[P + j]), tanh(p[2 * P + j]), sigmoid(p[3 * P + j])
        s = f * st[1, j] + i * z
        keep[0, j], keep[1, j], keep[2, j], keep[3, j], keep[4, j] = i, f, z, o, s
        st[1, j] = s
        st[0, j] = o * tanh(s)


@compiled
def _lstm_backward(keep, before, dst, dp):
    P = dst.shape[1]
    for j in range(P):
        i, f, z, o, s = keep[0, j], keep[1, j], keep[2, j], keep[3, j], tanh(keep[4, j])
        one = type(s)(1)
        dh = dst[0, j]
        ds = dst[1, j] + dh * o * (one - s * s)
        dp[j] = ds * z * i * (one - i)
        dp[P + j] = ds * before[1, j] * f * (one - f)
        dp[2 * P + j] = ds * i * (one - z * z)
        dp[3 * P + j] = dh * s * o * (one - o)
        dst[0, j] = 0
        dst[1, j] = ds * f


@compiled
def _gru(p, st, keep, x):
    P = st.shape[1]
    for j in range(P):
        r, u, q = sigmoid(p[j]), sigmoid(p[P + j]), p[2 * P + j]
        z = tanh(x[j] + r * q)
        keep[0, j], keep[1, j], keep[2, j], keep[3, j] = r, u, q, z
        st[0, j] = z + u * (st[0, j] - z)


@compiled
def _gru_backward(keep, before, dst, dp, dz):
    """dp is the gradient of R h + c; dz that of x's last gate."""
    P = dst.shape[1]
    for j in range(P):
        r, u, q, z = keep[0, j], keep[1, j], keep[2, j], keep[3, j]
        one = type(r)(1)
        dh = dst[0, j]
        d = dh * (one - u) * (one - z * z)
        dz[j] = d
        dp[j] = d * q * r * (one - r)
        dp[P + j] = dh * (before[0, j] - z) * u * (one - u)
        dp[2 * P + j] = d * r
        dst[0, j] = dh * u


@compiled
def _slstm(p, st, keep):
    P = st.shape[1]
    for j in range(P):
        f, z, o = p[P + j], tanh(p[2 * P + j]), sigmoid(p[3 * P + j])
        one, zero = type(z)(1), type(z)(0)
        kept = log_sigmoid(f) + st[3, j]
        ahead = kept - p[j]  # of the old maximum, over the new candidate
        small = exp(-abs(ahead))
        forget, write = (one if ahead >= zero else small), (small if ahead >= zero else one)
        st[3, j] = max(kept, p[j])
        s, n = forget * st[1, j] + write * z, forget * st[2, j] + write
        keep[0, j], keep[1, j], keep[2, j], keep[3, j] = ahead, sigmoid(-f), z, o
        keep[4, j], keep[5, j] = s, n
        st[1, j], st[2, j], st[0, j] = s, n, o * s / n


@compiled
def _slstm_backward(keep, before, dst, dp):
    P = dst.shape[1]
    for j in range(P):
        ahead, g, z, o, s, n = keep[0, j], keep[1, j], keep[2, j], keep[3, j], keep[4, j], keep[5, j]
        one, zero = type(z)(1), type(z)(0)
        small = exp(-abs(ahead))
        forget, write = (one if ahead >= zero else small), (small if ahead >= zero else one)
        dh = dst[0, j] / n
        ds, dn = dst[1, j] + dh * o, dst[2, j] - dh * o * s / n
        dkept, di = (ds * before[1, j] + dn * before[2, j]) * forget, (ds * z + dn) * write
        dm = dst[3, j] - dkept - di
        share = (one if ahead > zero else zero) if ahead != zero else type(z)(0.5)
        dkept, di = dkept + share * dm, di + (one - share) * dm
        dp[j] = di
        dp[P + j] = dkept * g
        dp[2 * P + j] = ds * write * (one - z * z)
        dp[3 * P + j] = dh * s * o * (one - o)
        dst[0, j], dst[1, j], dst[2, j], dst[3, j] = 0, ds * forget, dn * forget, dkept


@parallel
def _forward(kind, x, Rt, c, state, initial, reset, rows, y, kept):
    """x (B, T, G, H, P), Rt (H, P, G · P), c (G, H, P), kept (B, T, K, H, P) or empty; state (S, B, H, P) enters as the
    first and leaves as the last; initial (S) is what a reset puts there."""
    batch, T, G, H, P = x.shape
    groups = (batch + rows - 1) // rows
    S = state.shape[0]
    for task in numba.prange(H * groups):
        head, lo = task // groups, task % groups * rows
        count = min(rows, batch - lo)
        st, h = np.empty((count, S, P), x.dtype), np.zeros((rows, P), x.dtype)
        p = np.zeros((rows, G * P), x.dtype)
        unkept = np.empty((kept.shape[2], P), x.dtype)
        for r in range(count):
            for s in range(S):
                for j in range(P):
                    st[r, s, j] = state[s, lo + r, head, j]
        for t in range(T):
            for r in range(count):
                if reset.shape[0] and reset[lo + r, t]:
                    for s in range(S):
                        for j in range(P):
                            st[r, s, j] = initial[s]
                for j in range(P):
                    h[r, j] = st[r, 0, j]
                for g in range(G):
                    if kind == GRU and g == 2:
                        for j in range(P):
                            p[r, 2 * P + j] = c[2, head, j]
                    else:
                        for j in range(P):
                            p[r, g * P + j] = x[lo + r, t, g, head, j] + c[g, head, j]
            add_product(p, h, Rt[head], rows)
            for r in range(count):
                keep = kept[lo + r, t, :, head] if kept.shape[0] else unkept
                if kind == ELMAN:
                    _elman(p[r], st[r], keep)
                elif kind == LSTM:
                    _lstm(p[r], st[r], keep)
                elif kind == GRU:
                    _gru(p[r], st[r], keep, x[lo + r, t, 2, head])
                else:
                    _slstm(p[r], st[r], keep)
                for j in range(P):
                    y[lo + r, t, head, j] = st[r, 0, j]
        for r in range(count):
            for s in range(S):
                for j in range(P):
                    state[s, lo + r, head, j] = st[r, s, j]


@parallel
def _backward(kind, R, state, initial, reset, rows, y, kept, dy, dstate, dp, dx):
    """R (H, G · P, P), state (S, B, H, P) the first, dp the gradient of R h + c, dx that of x where it differs (GRU).
    dstate (S, B, H, P) enters as the gradient of the last state and leaves as that of the first."""
    batch, T, G, H, P = dp.shape
    groups = (batch + rows - 1) // rows
    S = state.shape[0]
    for task in numba.prange(H * groups):
        head, lo = task // groups, task % groups * rows
        count = min(rows, batch - lo)
        dst, dh = np.empty((count, S, P), y.dtype), np.zeros((rows, P), y.dtype)
        d, before = np.zeros((rows, G * P), y.dtype), np.empty((S, P), y.dtype)
        for r in range(count):
            for s in range(S):
                for j in range(P):
                    dst[r, s, j] = dstate[s, lo + r, head, j]
        for t in range(T - 1, -1, -1):
            for r in range(count):
                i = lo + r
                cut = reset.shape[0] > 0 and reset[i, t]
                for j in range(P):
                    dst[r, 0, j] += dy[i, t, head, j]
                for s in range(S):  # of the state before this step, what the gradients read
                    for j in range(P):
                        if cut:
                            before[s, j] = initial[s]
                        elif t == 0:
                            before[s, j] = state[s, i, head, j]
                        elif s == 0:
                            before[s, j] = y[i, t - 1, head, j]
                        elif s < 3:
                            before[s, j] = kept[i, t - 1, 3 + s, head, j]
                keep = kept[i, t, :, head]
                if kind == ELMAN:
                    _elman_backward(y[i, t, head], dst[r], d[r])
                elif kind == LSTM:
                    _lstm_backward(keep, before, dst[r], d[r])
                elif kind == GRU:
                    _gru_backward(keep, before, dst[r], d[r], dx[i, t, 2, head])
                else:
                    _slstm_backward(keep, before, dst[r], d[r])
                for g in range(G):
                    for j in range(P):
                        dp[i, t, g, head, j] = d[r, g * P + j]
                        if kind == GRU and g < 2:
                            dx[i, t, g, head, j] = d[r, g * P + j]
                for j in range(P):
                    dh[r, j] = dst[r, 0, j]
            add_product(dh, d, R[head], rows)
            for r in range(count):
                cut = reset.shape[0] > 0 and reset[lo + r, t]
                for s in range(S):
                    for j in range(P):
                        if cut:
                            dst[r, s, j] = 0
                        elif s == 0:
                            dst[r, s, j] = dh[r, j]
        for r in range(count):
            for s in range(S):
                for j in range(P):
                    dstate[s, lo + r, head, j] = dst[r, s, j]


@parallel
def _matrix_backward(dp, y, h0, reset, dR, dc):
    """dR (H, G · P, P) = Σ_bt dp hᵀ and dc (H, G · P) = Σ_bt dp, with h the state before each step; four rows a task."""
    batch, T, G, H, P = dp.shape
    groups = (G * P + 3) // 4
    for task in numba.prange(H * groups):
        head, lo = task // groups, task % groups * 4
        count = min(4, G * P - lo)
        acc, v, h = np.zeros((4, P), y.dtype), np.zeros((4, STRETCH), y.dtype), np.zeros((STRETCH, P), y.dtype)
        sums = np.zeros(4, y.dtype)
        for i in range(batch):
            for start in range(0, T, STRETCH):
                steps = min(STRETCH, T - start)
                for k in range(steps):
                    t = start + k
                    cut = reset.shape[0] > 0 and reset[i, t]
                    for r in range(count):
                        g, j = (lo + r) // P, (lo + r) % P
                        v[r, k] = dp[i, t, g, head, j]
                        sums[r] += v[r, k]
                    for j in range(P):
                        h[k, j] = 0 * h0[i, head, j] if cut else (y[i, t - 1, head, j] if t else h0[i, head, j])
                add_product(acc, v, h[:steps], 4)
        for r in range(count):
            dc[head, lo + r] = sums[r]
            for j in range(P):
                dR[head, lo + r, j] = acc[r, j]


def _rows(batch: int, heads: int) -> int:
    """Batch rows a task: many share one reading of R, few leave tasks for every thread."""
    return 4 if batch * heads >= 16 else 2 if batch * heads >= 4 else 1


def _first(x: Tensor, states: tuple[Tensor | None, ...], start: tuple[float, ...]) -> Tensor:
    """The states before the first step as one tensor (S, B, H, P)."""
    batch, _, _, H, P = x.shape
    if states[0] is None:
        return torch.tensor(start, dtype=x.dtype).view(-1, 1, 1, 1).repeat(1, batch, H, P)
    return torch.stack(states)


def _define(name: str, kind: int, keeps: int, start: tuple[float, ...]) -> Callable:
    """The operator of one cell: `keeps` values a unit and step are saved, `start` is what a reset puts the states to."""
    S = len(start)

    def run(x, R, c, *rest):
        use_threads()
        *states, reset, save = rest
        batch, T, G, H, P = x.shape
        state = _first(x, states, start)
        Rt = R.permute(1, 3, 0, 2).reshape(H, P, G * P).contiguous()
        c = x.new_zeros(G, H, P) if c is None else c.contiguous()
        y, kept = x.new_empty(batch, T, H, P), x.new_empty(batch if save else 0, T, keeps, H, P)
        reset = None if reset is None else reset.contiguous()
        initial = np.array(start, array(state).dtype)
        inputs = (kind, *(array(z) for z in (x.contiguous(), Rt, c, state)), initial, array(reset))
        _forward(*inputs, _rows(batch, H), array(y), array(kept))
        return y, *(s.clone() for s in state), kept

    def run_backward(x, R, c, *rest):
        use_threads()
        states, (reset, y), rest = rest[:S], rest[S : S + 2], rest[S + 2 + S :]
        kept, dy, dlast = rest[0], rest[1], rest[2:]
        batch, T, G, H, P = x.shape
        first = _first(x, states, start)
        rows = R.permute(1, 0, 2, 3).reshape(H, G * P, P).contiguous()
        dy = torch.zeros_like(y) if dy is None else dy.contiguous()
        dstate = torch.stack([y.new_zeros(batch, H, P) if d is None else d for d in dlast])
        dp = x.new_empty(x.shape)
        dx = torch.empty_like(dp) if kind == GRU else dp
        initial, cuts = np.array(start, array(y).dtype), array(None if reset is None else reset.contiguous())
        inputs = (kind, array(rows), array(first), initial, cuts, _rows(batch, H), array(y), array(kept))
        _backward(*inputs, *(array(z) for z in (dy, dstate, dp, dx)))
        dR, dc = torch.empty_like(rows), y.new_empty(H, G * P)
        _matrix_backward(array(dp), array(y), array(first[0]), cuts, array(dR), array(dc))
        dR = dR.view(H, G, P, P).transpose(0, 1).contiguous()
        dc = None if c is None else dc.view(H, G, P).transpose(0, 1).contiguous()
        dstates = [None if states[0] is None else d.clone() for d in dstate]
        return dx, dR, dc, *dstates, None

    def fake(x, R, c, *rest):
        batch, T, _, H, P = x.shape
        states = [x.new_empty(batch, H, P) for _ in range(S)]
        return x.new_empty(batch, T, H, P), *states, x.new_empty(batch if rest[-1] else 0, T, keeps, H, P)

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
