"""Mixers whose tokens meet few of many memories, once more: one token, one memory, one head after another, in
float64, with nothing from riverrun but the parameters.
"""

import math

import torch


def silu(u):
    return u / (1 + torch.exp(-u))


def sigmoid(u):
    return 1 / (1 + torch.exp(-u))


def rms(u, weight, eps=1e-6):
    return weight * u / torch.sqrt((u * u).mean() + eps)


def unit(u):
    return u / torch.sqrt((u * u).sum() + 1e-6)


def probabilities(logits):
    return torch.exp(logits) / torch.exp(logits).sum()


def positive(u):
    return torch.where(u > 0, u + 1, torch.exp(u))


def likeliest(p, k):
    return sorted(range(len(p)), key=lambda m: -p[m])[:k]


class Memory:
    """One memory of a mixture: what it is told of a token, and what the token then reads in it."""

    def __init__(self, m, W):
        self.m, self.W, self.seen = m, W, []
        self.S = None

    def __call__(self, q, x):
        m, H = self.m, self.m.num_heads
        p = x @ self.W
        k, v, gates = p[: m.sizes[0]], p[m.sizes[0] : m.sizes[0] + m.width], p[m.sizes[0] + m.width :]
        if m.rule == "gated_delta":
            self.seen.append(torch.cat([q, k, v]))
            window = m.conv.weight.shape[1]
            past = [torch.zeros_like(self.seen[0])] * (window - 1) + self.seen
            qkv = silu(sum(past[-window:][j] * m.conv.weight[:, j] for j in range(window)))
            q, k, v = qkv.split([m.sizes[0], m.sizes[0], m.width])
        q, k, v = q.view(H, -1), k.view(H, -1), v.view(H, -1)
        if m.rule == "linear":
            v = torch.cat([v, torch.ones(H, 1)], 1)
        if self.S is None:
            self.S = torch.zeros(H, k.shape[1], v.shape[1])
        K, ys = k.shape[1], []
        for h in range(H):
            S = self.S[h]
            if m.rule == "linear":
                S, read = S + torch.outer(positive(k[h]), v[h]), positive(q[h])
            elif m.rule == "gla":
                gate = sigmoid(gates @ m.decay.weight.T + m.decay.bias).view(H, K)[h] ** (1 / 16)
                S, read = gate[:, None] * S + torch.outer(k[h], v[h]), q[h] / math.sqrt(K)
            else:
                beta, a = sigmoid(gates[h]), gates[H + h]
                S = torch.exp(-torch.exp(m.log_rate[h]) * torch.log1p(torch.exp(a + m.dt_bias[h]))) * S
                S = S + torch.outer(unit(k[h]), beta * (v[h] - S.T @ unit(k[h])))
                read = unit(q[h]) / math.sqrt(K)
            self.S[h] = S
            ys.append(read @ S)
        return torch.stack(ys)


def mom(m, x):
    """Du et al. 2025 (arXiv:2502.13685)."""
    H, size = m.num_heads, m.num_heads * m.key_width
    memories = [Memory(m, W) for W in m.write.weight]
    shared = None if m.shared is None else Memory(m, m.shared.weight.T)
    outs = []
    for token in x:
        projected = token @ m.inp.weight.T
        q, z = projected[:size], projected[size:].view(H, -1)
        p = probabilities(token @ m.router.weight.T)
        chosen = likeliest(p, m.router.chosen)
        y = sum(p[i] / p[chosen].sum() * memories[i](q, token) for i in chosen)
        if shared is not None:
            y = y + shared(q, token)
        if m.rule == "linear":
            y = y[:, :-1] / (y[:, -1:] + m.eps)
        else:
            y = torch.stack([rms(y[h], m.norm.weight) * silu(z[h]) for h in range(H)])
        outs.append(y.flatten() @ m.out.weight.T)
    return torch.stack(outs)


def sse(m, x):
    """Pan et al. 2025 (arXiv:2507.16577), with the two decays and gates of the authors' layer."""
    H, N = m.num_heads, m.num_partitions
    K = m.width // H
    S, parts, outs = torch.zeros(H, K, K), torch.zeros(N, H, K, K), []
    for token in x:
        q, k, v, low_q, low_k, low_z, low, lows = (token @ m.inp.weight.T).split(list(m.sizes))
        q2, k2 = q + low_q @ m.query.weight.T, k + low_k @ m.key.weight.T
        v, z = silu(v).view(H, K), (low_z @ m.gate.weight.T).view(H, K)
        f = sigmoid(low @ m.decay.weight.T + m.decay.bias).view(H, K) ** (1 / 16)
        f2 = sigmoid(lows @ m.decays.weight.T + m.decays.bias).view(H, K) ** (1 / 16)
        e = probabilities(token @ m.router.weight.T)
        y = torch.zeros(H, K)
        for h in range(H):
            mine = slice(h * K, (h + 1) * K)
            S[h] = f[h][:, None] * S[h] + torch.outer(probabilities(k[mine]), v[h])
            y[h] = silu(q[mine]) @ S[h] / math.sqrt(K)
            for i in likeliest(e, m.writers):
                write = e[i] * torch.outer(probabilities(k2[mine]), v[h])
                parts[i, h] = f2[h][:, None] * parts[i, h] + write
            for i in likeliest(e, m.readers):
                y[h] += e[i] * silu(q2[mine]) @ parts[i, h] / math.sqrt(K)
            y[h] = rms(y[h], m.norm.weight) * silu(z[h])
        outs.append(y.flatten() @ m.out.weight.T)
    return torch.stack(outs)
