"""Outer-product mixers without golden numbers, token after token and head after head; for `test_mixers`."""

import torch


def silu(u):
    return u / (1 + torch.exp(-u))


def sigmoid(u):
    return 1 / (1 + torch.exp(-u))


def rms(u, weight, eps=1e-6):
    return weight * u / torch.sqrt((u * u).mean() + eps)


def jrt(m, x):
    """Arora et al. 2024 (2407.05483): all pairs, 1 + s + s²/2 for the exponential."""
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


def lightnet_grid(m, x):
    """Qin et al. 2024 (2405.21022) on rows of five: softmax over all tokens, and each pair's distance."""
    H, T, C = m.num_heads, len(x), m.sizes[0]
    sums = torch.zeros_like(x)
    for axis, stride in ((0, C), (1, 1)):
        keep, weight = sigmoid(m.tpe.decay[axis]), m.tpe.weight[axis]
        for t in range(T):
            for s in range(t % C if axis == 0 else t - t % C, t + 1, stride):
                sums[t] += weight * keep ** ((t - s) // stride) * x[s]
    x = x + sums
    q, k, v = (u.view(T, H, -1) for u in (x @ m.inp.weight.T).split(m.parts, 1))
    K, q = k.shape[-1], silu(q)
    weight = torch.exp(k) / torch.exp(k).sum(0)
    each = (K + 1) // 2
    rate = [10_000.0 ** (-2 * (i % each) / each) for i in range(K)]
    ys = torch.zeros_like(v)
    for t in range(T):
        for s in range(T):
            gaps = [t // C - s // C] * each + [t % C - s % C] * (K - each)
            turn = torch.cos(torch.tensor([g * r for g, r in zip(gaps, rate, strict=True)]))
            ys[t] += (q[t] * weight[s] * turn).sum(-1, keepdim=True) / K**0.5 * v[s]
    gate = silu(x @ m.gate.inp.weight.T @ m.gate.out.weight.T)
    normed = torch.stack([rms(y, m.norm.weight) for y in ys.flatten(1)])
    return (normed * gate) @ m.out.weight.T


OUTER = [jrt, lightnet_grid]
