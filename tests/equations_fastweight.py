"""Mixers that learn at test time, written out token after token and head after head; for `test_mixers`."""

import math

import torch
import torch.nn.functional as F

P = 3


def unit(u):
    return u / torch.sqrt((u * u).sum() + 1e-6)


def rms(u, weight, eps=1e-6):
    return weight * u / torch.sqrt((u * u).mean() + eps)


def silu(u):
    return u / (1 + torch.exp(-u))


def sigmoid(u):
    return 1 / (1 + torch.exp(-u))


def convolved(m, u):
    taps = m.conv.weight.shape[1]
    padded = torch.cat([torch.zeros(taps - 1, u.shape[1]), u])
    return sum(padded[j : j + len(u)] * m.conv.weight[:, j] for j in range(taps))


def gelu(u):
    return u * (1 + torch.erf(u / math.sqrt(2))) / 2


def residual(x, z, norm):
    z = (z - z.mean()) / torch.sqrt(z.var(unbiased=False) + 1e-6)
    return x + norm[0] * z + norm[1]


def perceptron(norm):
    return lambda W, x: residual(x, gelu(x @ W[0]) @ W[1], norm)


def square(f, v):
    return ((f - v) ** 2).sum() / 2


def slopes(f, loss, W, k, v):
    with torch.enable_grad():
        W = [w.detach().requires_grad_() for w in W]
        return torch.autograd.grad(loss(f(W, k), v), W)


def learned(f, loss, W, tokens, chunk, made=lambda A: A):
    """f(W_t; q_t) for tokens (q, k, v, η, decay, momentum), every sum of every matrix in full."""
    A, Z, ys = W, [torch.zeros_like(w) for w in W], []
    for t, (q, k, v, eta, keep, momentum) in enumerate(tokens):
        if t % chunk == 0:
            start = made(A)
        Z = [momentum * z - eta * u for z, u in zip(Z, slopes(f, loss, start, k, v), strict=True)]
        A = [keep * a + z for a, z in zip(A, Z, strict=True)]
        ys.append(f(made(A), q))
    return torch.stack(ys)


def ttt(m, x):
    """Sun et al. 2024 (2407.04620) sec. 2 with a linear model and its bias."""
    H, T = m.num_heads, len(x)
    q, k, v = convolved(m, x @ m.inp.weight.T).view(T, 3, H, -1).unbind(1)
    eta = m.base * sigmoid(x @ m.rate.weight.T + m.rate.bias)
    ys = []
    for h in range(H):
        norm, W = m.memory.norm[:, h], [m.memory.W1[h, :-1], m.memory.W1[h, -1]]
        tokens = [(unit(q[t, h]), unit(k[t, h]), v[t, h], eta[t, h], 1, 0) for t in range(T)]
        y = learned(lambda W, x, norm=norm: residual(x, x @ W[0] + W[1], norm), square, W, tokens, 8)
        ys.append(torch.stack([rms(u, m.norm.weight) for u in y]))
    return torch.cat(ys, 1) @ m.out.weight.T


def miras(m, x):
    """Behrouz et al. 2025 (2504.13173), Moneta: |e|³ and division by |A|_4²."""
    H, T, D = m.num_heads, *x.shape
    p = x @ m.inp.weight.T
    q, k, v = silu(convolved(m, p[:, : 3 * D])).view(T, 3, H, -1).unbind(1)
    gate = sigmoid(x @ m.gate.weight.T + m.gate.bias)
    eta, keep, z = m.base * gate[:, :H], gate[:, H:], p[:, 3 * D :].view(T, H, -1)

    def cubes(f, v):
        return (((f - v) ** 2 + 1e-6) ** 1.5).sum()

    def made(A):
        return [a / torch.sqrt((a**4).sum() + 1e-6) for a in A]

    ys = []
    for h in range(H):
        tokens = [(unit(q[t, h]), unit(k[t, h]), v[t, h], eta[t, h], keep[t, h], 0) for t in range(T)]
        W = [m.memory.W1[h], m.memory.W2[h]]
        y = learned(perceptron(m.memory.norm[:, h]), cubes, W, tokens, 8, made)
        ys.append(torch.stack([rms(u, m.norm.weight) for u in y]) * silu(z[:, h]))
    return torch.cat(ys, 1) @ m.out.weight.T


def turned(u, position):
    half = len(u) // 2
    rate = torch.tensor([10_000.0 ** (-2 * i / len(u)) for i in range(half)], dtype=torch.float64)
    z = torch.complex(u[:half], u[half:]) * torch.polar(torch.ones_like(rate), position * rate)
    return torch.cat([z.real, z.imag])


def seen(q, ks, vs, always):
    """One softmax over learned keys and a list of (position, key), read by the last of them."""
    K = len(q)
    n = len(ks)
    score = [q @ a / math.sqrt(K) for a in always[0]]
    score += [q @ turned(k, torch.tensor(float(i - n + 1))) / math.sqrt(K) for i, k in enumerate(ks)]
    return torch.softmax(torch.stack(score), 0) @ torch.stack([*always[1], *vs])


def titans(m, x):
    """Behrouz et al. 2025 (2501.00663), memory as context: eq. 21-25, one segment of 8 after another."""
    H, T, D, C = m.num_heads, *x.shape, 8
    query = silu(x @ m.query.weight.T).view(T, H, -1)
    f = [perceptron(m.memory.norm[:, h]) for h in range(H)]
    A = [[m.memory.W1[h], m.memory.W2[h]] for h in range(H)]
    Z = [[torch.zeros_like(w) for w in W] for W in A]
    inputs, outs = torch.zeros(3, 3 * D), []
    for t in range(T):
        if t % C == 0:
            start, context = A, []
        h_t = torch.cat([f[h](start[h], unit(query[t, h])) for h in range(H)])
        context += [(m.inp.weight @ u).view(3, H, -1) for u in (h_t, x[t])]
        y = torch.cat([
            seen(context[-1][0, h], [c[1, h] for c in context], [c[2, h] for c in context],
                 (m.always[h], m.always[H + h]))
            for h in range(H)
        ])  # fmt: skip
        inputs = torch.cat([inputs, (m.learner.weight @ y)[None]])
        q, k, v = silu((inputs[-4:] * m.conv.weight.T).sum(0)).view(3, H, -1)
        theta, keep, momentum = sigmoid(m.gate.weight @ y + m.gate.bias).view(3, H)
        read = []
        for h in range(H):
            u = slopes(f[h], square, start[h], unit(k[h]), v[h])
            Z[h] = [momentum[h] * z - m.base * theta[h] * s for z, s in zip(Z[h], u, strict=True)]
            A = [*A[:h], [keep[h] * a + z for a, z in zip(A[h], Z[h], strict=True)], *A[h + 1 :]]
            read.append(f[h](A[h], unit(q[h])))
        outs.append(rms(y, m.norm.weight) * silu(rms(torch.cat(read), m.inner_norm.weight)))
    return torch.stack(outs) @ m.out.weight.T


def lact(m, x):
    """Zhang et al. 2025 (2505.23884) sec. 3: two chunks of 8 are learned, a window of 8 is attended."""
    H, M, T, D = m.num_heads, m.num_memories, *x.shape
    qkv = x @ m.inp.weight.T
    q, k, v = qkv.view(T, 3, H, -1).unbind(1)
    nothing = (q.new_zeros(0, q.shape[-1]), q.new_zeros(0, q.shape[-1]))
    last = [slice(max(0, t - 7), t + 1) for t in range(T)]
    near = torch.stack([
        torch.cat([seen(q[t, h], list(k[last[t], h]), list(v[last[t], h]), nothing) for h in range(H)])
        for t in range(T)
    ])  # fmt: skip
    qk = silu(qkv[:, : 2 * D] * m.stretch[0] + m.stretch[1])
    q, k, v = (u.reshape(T, M, -1) for u in (qk[:, :D], qk[:, D:], silu(qkv[:, 2 * D :])))
    gate = x @ m.gate.weight.T + m.gate.bias
    eta, scale = F.softplus(gate[:, : 3 * M]).view(T, M, 3), silu(gate[:, 3 * M :])
    far = torch.zeros(T, M, D // M)
    for h in range(M):
        W = first = [m.memory.W1[h], m.memory.W2[h], m.memory.W3[h]]

        def f(W, x):
            return (silu(x @ W[0]) * (x @ W[2])) @ W[1]

        for c in range(0, T, 8):
            far[c : c + 8, h] = torch.stack([rms(f(W, unit(u)), m.norm.weight) for u in q[c : c + 8, h]])
            if c + 8 > T:
                break
            step = [torch.zeros_like(w) for w in W]
            for t in range(c, c + 8):
                found = slopes(f, lambda y, v: -(y @ v), W, unit(k[t, h]), v[t, h])
                step = [s - eta[t, h, i] * u for i, (s, u) in enumerate(zip(step, found, strict=True))]
            W = [w + polar(s) for w, s in zip(W, step, strict=True)]
            W = [w / w.norm(dim=0) * o.norm(dim=0) for w, o in zip(W, first, strict=True)]
    return (near + (far * scale[:, :, None]).flatten(1)) @ m.out.weight.T


def polar(G):
    """Five odd polynomials of the singular values, by the decomposition itself."""
    U, s, V = torch.linalg.svd(G, full_matrices=False)
    s = s / torch.sqrt((s * s).sum() + 1e-14)
    for a, b, c in (
        (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
    ):  # fmt: skip
        s = a * s + b * s**3 + c * s**5
    return U @ torch.diag(s) @ V
