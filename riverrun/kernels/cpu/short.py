"""The matrix memories over a few steps, as in decoding: step by step, each state read once and written once.

The equations are those of block.py. With d = e^g, both reads are taken from the state before the step, so
that only its update follows them:

    delta   r_v = Σ_k d k S     x = β (v - r)    y = Σ_k d q S + (q · k) x
    dplr    r_v = Σ_k b S       x = v            y = Σ_k d q S + (q · k) v + (q · a) r
    outer                       x = v            y = Σ_k d q S + (q · k) v,  bonus: Σ_k q S + (q · u k) v
"""

from __future__ import annotations

import numpy as np

from .block import DELTA, DPLR
from .blocks import kernel
from .elementary import exp

STEPS = 4  # up to this many; a block's products and transposes pay for more


@kernel
def forward(first, step, mode, q, k, v, g, beta, u, a, b, reset, S0, S, y):
    """S (B, H, K, V) becomes the state after S0 and T steps. What is absent has a last axis of 0."""
    (B, T, H, V), K, D = v.shape, q.shape[3], g.shape[3]
    bonus = u.shape[1] > 0
    for task in range(first, B * H, step):
        i, h = task // H, task % H
        read, error = np.empty(V, v.dtype), np.empty(V, v.dtype)
        decay = np.ones(K, v.dtype)
        after = S[i, h]
        for t in range(T):
            cut = reset.shape[1] > 0 and reset[i, t]
            before = after if t or cut else S0[i, h]
            if cut:
                after[:] = 0
            q_t, k_t = q[i, t, h * q.shape[2] // H], k[i, t, h * k.shape[2] // H]
            v_t, y_t = v[i, t, h], y[i, t, h]
            r_t = b[i, t, h] if mode == DPLR else k_t
            for n in range(K if D else 0):
                decay[n] = exp(g[i, t, h, n if D > 1 else 0])
            read[:] = 0
            y_t[:] = 0
            own = other = 0 * decay[0]
            for n in range(K):
                row = before[n]
                to_y = q_t[n] if bonus else q_t[n] * decay[n]
                own += q_t[n] * k_t[n] * (u[h, n] if bonus else decay.dtype.type(1))
                for c in range(V):
                    y_t[c] += to_y * row[c]
                if mode:
                    to_r = r_t[n] if mode == DPLR else r_t[n] * decay[n]
                    for c in range(V):
                        read[c] += to_r * row[c]
            for c in range(V):
                error[c] = beta[i, t, h, 0] * (v_t[c] - read[c]) if mode == DELTA else v_t[c]
            for c in range(V):
                y_t[c] += own * error[c]
            if mode == DPLR:
                a_t = a[i, t, h]
                for n in range(K):
                    other += q_t[n] * a_t[n]
                for c in range(V):
                    y_t[c] += other * read[c]
            for n in range(K):
                row, to = before[n], after[n]
                if mode == DPLR:
                    for c in range(V):
                        to[c] = decay[n] * row[c] + k_t[n] * error[c] + a[i, t, h, n] * read[c]
                else:
                    for c in range(V):
                        to[c] = decay[n] * row[c] + k_t[n] * error[c]
