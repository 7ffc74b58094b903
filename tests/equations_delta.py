"""Mixers of the delta family and their kin, written out token after token and head after head; for
`test_mixers`."""

import math

import torch


def sigmoid(u):
    return 1 / (1 + torch.exp(-u))


def turned(u, position, base=10_000.0):
    """The pairs (u_i, u_{i + K/2}) as complex numbers, times e^{i p base^{-2i/K}}."""
    half = len(u) // 2
    rate = torch.tensor([base ** (-2 * i / len(u)) for i in range(half)], dtype=torch.float64)
    z = torch.complex(u[:half], u[half:]) * torch.polar(torch.ones_like(rate), position * rate)
    return torch.cat([z.real, z.imag])


def liger(m, x):
    """Lan et al. 2025: softmax over pairs in the window, and the recurrence."""
    T, H, G, K = len(x), m.num_heads, m.num_key_heads, x.shape[1] // m.num_heads
    q, k, v = (x @ m.inp.weight.T).split([H * K, G * K, G * K], 1)
    q, k, v = q.view(T, H, K), k.view(T, G, K), v.view(T, G, K)
    ys = torch.zeros(T, H, K)
    for h in range(H):
        S, g = torch.zeros(K, K), h // (H // G)
        for t in range(T):
            seen = range(max(0, t - m.window + 1), t + 1)
            score = [turned(q[t, h], torch.tensor(t - s)) @ k[s, g] / math.sqrt(K) for s in seen]
            near = torch.softmax(torch.stack(score), 0) @ v[seen.start : t + 1, g]
            mean = torch.cat([part.mean().expand(m.pool) for part in k[t, g].split(m.pool)])
            S = sigmoid(mean)[:, None] ** (1 / 16) * S + torch.outer(k[t, g].softmax(0), v[t, g])
            ys[t, h] = m.blend[0] * near + m.blend[1] * S.T @ q[t, h].softmax(0)
    return ys.flatten(1) @ m.out.weight.T


DELTA = [liger]
