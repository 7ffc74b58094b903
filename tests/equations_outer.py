"""Outer-product mixers without golden numbers, token after token and head after head; for `test_mixers`."""

import torch


def jrt(m, x):
    """Arora et al. 2024 (2407.05483) eq. 5: all pairs, 1 + s + s²/2 for the exponential."""
    H, T = m.num_heads, len(x)
    q, k, v, ke, ve = ((x @ m.inp.weight.T).split(m.sizes, 1)[i].view(T, H, -1) for i in range(5))
    d = q.shape[-1]
    ys = torch.zeros(T, H, v.shape[-1])
    for t in range(T):
        for h in range(H):
            keys = [*k[: t + 1, h], *ke[: m.prefix, h]]
            s = torch.stack([q[t, h] @ key for key in keys]) / d**0.5
            weight = 1 + s + s**2 / 2
            ys[t, h] = weight @ torch.cat([v[: t + 1, h], ve[: m.prefix, h]]) / weight.sum()
    return ys.flatten(1) @ m.out.weight.T


OUTER = [jrt]
