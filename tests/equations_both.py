"""Mixers that see both ways, as the matrices and sums of their papers: float64, one token after another, with
nothing from riverrun but the parameters.
"""

import torch


def silu(u):
    return u / (1 + torch.exp(-u))


def softplus(u):
    return torch.log1p(torch.exp(u))


def around(conv, x, columns):
    """A convolution over the neighbours of every token of x (T, D), from its definition."""
    T, (height, width) = x.shape[0], conv.window
    y = torch.zeros_like(x) if conv.bias is None else conv.bias.repeat(T, 1)
    for t in range(T):
        for i in range(height):
            for j in range(width):
                r, s = t // columns + i - height // 2, t % columns + j - width // 2
                if r >= 0 and 0 <= s < columns and r * columns + s < T:
                    y[t] += conv.weight[:, i, j] * x[r * columns + s]
    return y


def selective(m, u):
    """Gu & Dao 2023, algorithm 2, on u (T, E), one channel and one state at a time."""
    T, (E, N) = len(u), m.log_rate.shape
    padded = torch.cat([torch.zeros(m.conv.weight.shape[1] - 1, E), u])
    u = silu(
        m.conv.bias + sum(padded[j : j + T] * m.conv.weight[:, j] for j in range(m.conv.weight.shape[1]))
    )
    delta, B, C = (u @ m.dt_bc.weight.T).split(m.sizes, -1)
    dt = softplus(delta @ m.dt.weight.T + m.dt.bias)
    y = m.skip * u
    for e in range(E):
        for n in range(N):
            h = torch.zeros(())
            for t in range(T):
                h = torch.exp(-dt[t, e] * torch.exp(m.log_rate[e, n])) * h + dt[t, e] * B[t, n] * u[t, e]
                y[t, e] += C[t, n] * h
    return y


def mambamixer(m, x):
    """Behrouz et al. 2024: over the tokens; then over the channels of each token, from both ends."""
    u, z = (x @ m.inp.weight.T).chunk(2, -1)
    tokens = (selective(m.scan, u) * silu(z)) @ m.out.weight.T
    channels = torch.zeros_like(tokens)
    for t in range(len(x)):
        u, z = (tokens[t].view(-1, m.channel_width) @ m.channel_inp.weight.T).chunk(2, -1)
        both = selective(m.forwards, u) + selective(m.backwards, u.flip(0)).flip(0)
        channels[t] = ((both * silu(z)) @ m.channel_out.weight.T).flatten()
    return m.average.weight[0] * tokens + m.average.weight[1] * channels


def hydra_matrices(m, x):
    """Hwang et al. 2024: each head's quasiseparable matrix (H, T, T), the values and the gate."""
    T, H, G = len(x), m.num_heads, m.num_groups
    z, u, dt = (x @ m.inp.weight.T).split(m.sizes, -1)
    u, *maps = silu(around(m.conv, u, T)).split(m.inner, -1)
    B, C, B_back, C_back = (p.view(T, G, -1).repeat_interleave(H // G, 1) for p in maps)
    dt = softplus(dt + torch.cat([m.dt_bias, m.dt_bias])).view(T, 2, H)
    a = torch.exp(-torch.exp(m.log_rate) * dt)
    M = torch.zeros(H, T, T)
    for h in range(H):
        for i in range(T):
            M[h, i, i] = m.skip.weight[h] @ u[i] + m.skip.bias[h]
            for j in range(i):  # one step late: what the forward pass said at i - 1
                M[h, i, j] = C[i - 1, h] @ B[j, h] * dt[j, 0, h] * a[j + 1 : i, 0, h].prod()
            for j in range(i + 1, T):  # what the backward pass said at i + 1
                M[h, i, j] = C_back[i + 1, h] @ B_back[j, h] * dt[j, 1, h] * a[i + 1 : j, 1, h].prod()
    return M, u.view(T, H, -1), z


def hydra(m, x):
    M, v, z = hydra_matrices(m, x)
    y = torch.einsum("hij,jhp->ihp", M, v).flatten(1)
    y = m.norm.weight * y / torch.sqrt(y.square().mean(-1, keepdim=True) + m.norm.eps)
    return (y * silu(z)) @ m.out.weight.T


def vssd(m, x):
    """Shi et al. 2024: all pairs; what s writes for t does not depend on what lies between."""
    T, H, G = len(x), m.num_heads, m.num_groups
    z, u, dt = (x @ m.inp.weight.T).split(m.sizes, -1)
    u, B, C = silu(around(m.conv, u, m.columns)).split(m.inner, -1)
    u, B, C = u.view(T, H, -1), B.view(T, G, -1), C.view(T, G, -1)
    weight = torch.exp(m.log_rate) * softplus(dt + m.dt_bias)
    y = torch.zeros_like(u)
    for t in range(T):
        for h in range(H):
            g = h // (H // G)
            y[t, h] = m.skip[h] * u[t, h]
            for s in range(T):
                y[t, h] += weight[s, h] * (C[t, g] @ B[s, g]) * u[s, h]
    y = y.flatten(1)
    y = (y - y.mean(-1, keepdim=True)) / torch.sqrt(y.var(-1, unbiased=False, keepdim=True) + m.norm.eps)
    return ((m.norm.weight * y + m.norm.bias) * z) @ m.out.weight.T


BOTH = [mambamixer]  # the others have golden numbers
