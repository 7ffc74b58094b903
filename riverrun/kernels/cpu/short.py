"""The matrix memories over a few steps, as in decoding: step by step, each state read once and written once.

The equations are those of block.py. With d = e^g, both reads are taken from the state before the step, so
that only its update follows them:

    delta   r_v = Σ_k d k S     x = β (v - r)    y = Σ_k d q S + (q · k) x
    dplr    r_v = Σ_k b S       x = v            y = Σ_k d q S + (q · k) v + (q · a) r
    outer                       x = v            y = Σ_k d q S + (q · k) v,  bonus: Σ_k q S + (q · u k) v
    mlstm, see normaliser.py    x = w v          as outer, divided; norm is None for the others
"""

from __future__ import annotations

import numpy as np

from .block import DELTA, DPLR
from .blocks import kernel
from .elementary import exp
from .normaliser import floor, gate
from .team import divided

STEPS = 4  # up to this many; a block's products and transposes pay for more


@kernel
def forward(first, step, mode, q, k, v, g, beta, u, a, b, reset, S0, S, y, norm=None):
    """S (B, H, K, V) becomes the state after S0 and T steps. What is absent has a last axis of 0."""
    if divided(first, step):
        return
    (B, T, H, V), K, D = v.shape, q.shape[3], g.shape[3]
    bonus = u.shape[1] > 0
    for task in range(first, B * H, step):
        i, h = task // H, task % H
        read, error = np.empty(V, v.dtype), np.empty(V, v.dtype)
        decay, weight = np.ones(K, v.dtype), v.dtype.type(1)
        after = S[i, h]
        if norm is not None:
            n, m = norm.n_last[i, h, 0], norm.m[i, h]
            n[:] = norm.n[i, h, 0]
        for t in range(T):
            cut = reset.shape[1] > 0 and reset[i, t]
            before = after if t or cut else S0[i, h]
            if cut:
                after[:] = 0
            q_t, k_t = q[i, t, h * q.shape[2] // H], k[i, t, h * k.shape[2] // H]
            v_t, y_t = v[i, t, h], y[i, t, h]
            r_t = b[i, t, h] if mode == DPLR else k_t
            if norm is None:
                for key in range(K if D else 0):
                    decay[key] = exp(g[i, t, h, key if D > 1 else 0])
            if norm is not None:
                if cut:
                    n[:], m = 0, v.dtype.type(0)
                forget, weight, m = gate(g, norm.i, i, t, h, m)
                decay[:], weight = exp(forget), exp(weight)
            read[:] = 0
            y_t[:] = 0
            own = other = 0 * decay[0]
            for key in range(K):
                row = before[key]
                to_y = q_t[key] if bonus else q_t[key] * decay[key]
                own += q_t[key] * k_t[key] * (u[h, key] if bonus else decay.dtype.type(1))
                for c in range(V):
                    y_t[c] += to_y * row[c]
                if mode:
                    to_r = r_t[key] if mode == DPLR else r_t[key] * decay[key]
                    for c in range(V):
                        read[c] += to_r * row[c]
            for c in range(V):
                error[c] = beta[i, t, h, 0] * (v_t[c] - read[c]) if mode == DELTA else weight * v_t[c]
            for c in range(V):
                y_t[c] += own * error[c]
            if norm is not None:
                total = own * weight
                for key in range(K):
                    total += q_t[key] * decay[key] * n[key]
                    n[key] = decay[key] * n[key] + weight * k_t[key]
                norm.tops[i, t, h], norm.sums[i, t, h] = m, total
                total = max(abs(total), floor(norm.tops[i, t], h))
                for c in range(V):
                    y_t[c] /= total
            if mode == DPLR:
                a_t = a[i, t, h]
                for key in range(K):
                    other += q_t[key] * a_t[key]
                for c in range(V):
                    y_t[c] += other * read[c]
            for key in range(K):
                row, to = before[key], after[key]
                if mode == DPLR:
                    for c in range(V):
                        to[c] = decay[key] * row[c] + k_t[key] * error[c] + a[i, t, h, key] * read[c]
                else:
                    for c in range(V):
                        to[c] = decay[key] * row[c] + k_t[key] * error[c]
        if norm is not None:
            norm.m_last[i, h] = m
