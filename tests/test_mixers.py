"""Mixers whose golden numbers are their own equation: written out a second time, step by step, in float64,
with nothing from riverrun but the parameters. And what mixers must refuse.
"""

import math
from functools import cache

import pytest
import torch
from equations_both import BOTH
from equations_delta import DELTA
from equations_fastweight import lact, miras, titans, ttt
from equations_outer import OUTER

from riverrun import state as states
from riverrun.mixers import MIXERS, build
from riverrun.testing.laws import instance
from riverrun.testing.tolerance import close

WIDTH, STEPS = 16, 23


def silu(u):
    return u / (1 + torch.exp(-u))


def sigmoid(u):
    return 1 / (1 + torch.exp(-u))


def rms(u, weight, eps=1e-6):
    return weight * u / torch.sqrt((u * u).mean() + eps)


def turned(u, position, base=10_000.0):
    """The pairs (u_i, u_{i + K/2}) as complex numbers, times e^{i p base^{-2i/K}}."""
    half = len(u) // 2
    rate = torch.tensor([base ** (-2 * i / len(u)) for i in range(half)], dtype=torch.float64)
    z = torch.complex(u[:half], u[half:]) * torch.polar(torch.ones_like(rate), position * rate)
    return torch.cat([z.real, z.imag])


def linear_attention(m, x):
    """Katharopoulos et al. 2020 eq. 8-9: all pairs, no state."""
    W, H, K = m.inp.weight, m.num_heads, WIDTH // m.num_heads
    q, k, v = (x @ W.T).view(STEPS, 3, H, K).unbind(1)
    q, k = torch.where(q > 0, q + 1, torch.exp(q)), torch.where(k > 0, k + 1, torch.exp(k))
    ys = torch.zeros(STEPS, H, K)
    for t in range(STEPS):
        for h in range(H):
            weight = k[: t + 1, h] @ q[t, h]
            ys[t, h] = weight @ v[: t + 1, h] / (weight.sum() + m.eps)
    return ys.flatten(1) @ m.out.weight.T


def retnet(m, x):
    """Sun et al. 2023 eq. 5: all pairs, γ^{t - s} and relative positions."""
    H, K = m.num_heads, WIDTH // m.num_heads
    q, k, v, z = (x @ m.inp.weight.T).split([WIDTH, WIDTH, 2 * WIDTH, 2 * WIDTH], 1)
    q, k, v, z = q.view(STEPS, H, K), k.view(STEPS, H, K), v.view(STEPS, H, 2 * K), z.view(STEPS, H, 2 * K)
    ys = torch.zeros(STEPS, H, 2 * K)
    for t in range(STEPS):
        for h in range(H):
            gamma = 1 - 2.0 ** (-5 - h)
            for s in range(t + 1):
                weight = turned(q[t, h], torch.tensor(t - s)) @ k[s, h] / math.sqrt(K)
                ys[t, h] += gamma ** (t - s) * weight * v[s, h]
            ys[t, h] = rms(ys[t, h], m.norm.weight) * silu(z[t, h])
    return ys.flatten(1) @ m.out.weight.T


def gla(m, x):
    """Yang et al. 2024 eq. 3: the recurrence."""
    H, V, K = m.num_heads, WIDTH // m.num_heads, m.key_width
    q, k, v, z, low = (x @ m.inp.weight.T).split(list(m.sizes), 1)
    gate = sigmoid(low @ m.decay.weight.T + m.decay.bias) ** (1 / 16)
    ys = torch.zeros(STEPS, H, V)
    for h in range(H):
        S, key, value = torch.zeros(K, V), slice(h * K, (h + 1) * K), slice(h * V, (h + 1) * V)
        for t in range(STEPS):
            S = gate[t, key, None] * S + torch.outer(k[t, key], v[t, value])
            ys[t, h] = rms(q[t, key] @ S / math.sqrt(K), m.norm.weight) * silu(z[t, value])
    return ys.flatten(1) @ m.out.weight.T


def hgrn2(m, x):
    """Qin et al. 2024 sec. 3: the recurrence, with 1 - f for the key."""
    H, K = m.num_heads, WIDTH // m.num_heads
    q, f, i = (x @ m.inp.weight.T).view(STEPS, 3, H, K).unbind(1)
    f = m.lower_bound + (1 - m.lower_bound) * sigmoid(f)
    ys = torch.zeros(STEPS, H, K)
    for h in range(H):
        S = torch.zeros(K, K)
        for t in range(STEPS):
            S = torch.diag(f[t, h]) @ S + torch.outer(1 - f[t, h], i[t, h])
            ys[t, h] = S.T @ silu(q[t, h])
    return torch.stack([rms(y, m.norm.weight) for y in ys.flatten(1)]) @ m.out.weight.T


def deltanet(m, x):
    """Yang et al. 2024 (2406.06484): the recurrence by its transition matrix."""
    H, K = m.num_heads, WIDTH // m.num_heads
    p = x @ m.inp.weight.T
    qkv, beta = p[:, : 3 * WIDTH], (1 + m.negative_eigenvalues) * sigmoid(p[:, 3 * WIDTH :])
    padded = torch.cat([torch.zeros(3, 3 * WIDTH), qkv])
    qkv = silu(sum(padded[j : j + STEPS] * m.conv.weight[:, j] for j in range(4)))
    q, k, v = qkv.view(STEPS, 3, H, K).unbind(1)
    ys = torch.zeros(STEPS, H, K)
    for h in range(H):
        S = torch.zeros(K, K)
        for t in range(STEPS):
            key = k[t, h] / torch.sqrt((k[t, h] ** 2).sum() + 1e-6)
            query = q[t, h] / torch.sqrt((q[t, h] ** 2).sum() + 1e-6) / math.sqrt(K)
            S = (torch.eye(K) - beta[t, h] * torch.outer(key, key)) @ S + beta[t, h] * torch.outer(
                key, v[t, h]
            )
            ys[t, h] = rms(S.T @ query, m.norm.weight)
    return ys.flatten(1) @ m.out.weight.T


def s5(m, x):
    """Smith et al. 2023 eq. 2 and 6 by the exponential of [[A, B], [0, 0]], all conjugates included."""
    N = len(m.log_rate)
    rate = torch.complex(-m.log_rate.exp(), m.frequency) * m.log_step.exp()
    B = torch.complex(*m.inp.weight.view(2, N, WIDTH).unbind()) * m.log_step.exp()[:, None]
    C = torch.complex(m.read.weight[:, :N], m.read.weight[:, N:])
    rate, B, C = torch.cat([rate, rate.conj()]), torch.cat([B, B.conj()]), torch.cat([C, C.conj()], 1)
    system = torch.zeros(2 * N + WIDTH, 2 * N + WIDTH, dtype=torch.complex128)
    system[: 2 * N, : 2 * N], system[: 2 * N, 2 * N :] = torch.diag(rate), B
    step = torch.linalg.matrix_exp(system)[: 2 * N]
    h, ys = torch.zeros(2 * N, dtype=torch.complex128), []
    for t in range(STEPS):
        h = step @ torch.cat([h, x[t].to(h.dtype)])
        s = C @ h
        assert s.imag.abs().max() < 1e-12
        u = s.real + m.skip * x[t]
        u = u * (1 + torch.erf(u / math.sqrt(2))) / 2
        ys.append(u * sigmoid(m.gate.weight @ u + m.gate.bias))
    return torch.stack(ys)


def slstm(m, x):
    """Beck et al. 2024 eq. 8-14, not stabilised."""
    H, P = m.num_heads, WIDTH // m.num_heads
    p = (x @ m.inp.weight.T).view(STEPS, 4, H, P)
    h, s, n, ys = torch.zeros(H, P), torch.zeros(H, P), torch.zeros(H, P), []
    for t in range(STEPS):
        i, f, z, o = (
            p[t] + torch.stack([torch.stack([m.R[g, j] @ h[j] for j in range(H)]) for g in range(4)]) + m.c
        )
        s = sigmoid(f) * s + torch.exp(i) * torch.tanh(z)
        n = sigmoid(f) * n + torch.exp(i)
        h = sigmoid(o) * s / n
        normed = (h - h.mean(1, keepdim=True)) / torch.sqrt(h.var(1, unbiased=False, keepdim=True) + 1e-6)
        ys.append(m.out.weight @ (normed.flatten() * m.norm.weight))
    return torch.stack(ys)


def attention(m, x, window=STEPS):
    """Vaswani et al. 2017 eq. 1, one pair after another."""
    H, G, K = m.num_heads, m.num_key_heads, WIDTH // m.num_heads
    q, k, v = (x @ m.inp.weight.T).split([WIDTH, G * K, G * K], 1)
    q, k, v = q.view(STEPS, H, K), k.view(STEPS, G, K), v.view(STEPS, G, K)
    ys = torch.zeros(STEPS, H, K)
    for t in range(STEPS):
        for h in range(H):
            g, seen = h // (H // G), range(max(0, t - window + 1), t + 1)
            score = [turned(q[t, h], torch.tensor(t - s)) @ k[s, g] / math.sqrt(K) for s in seen]
            weight = torch.softmax(torch.stack(score), 0)
            ys[t, h] = weight @ v[seen.start : t + 1, g]
    return ys.flatten(1) @ m.out.weight.T


def sliding_window(m, x):
    return attention(m, x, m.window)


EQUATIONS = [linear_attention, retnet, gla, hgrn2, deltanet, s5, slstm, attention, sliding_window]
EQUATIONS += [lact, miras, titans, ttt]
EQUATIONS += BOTH
EQUATIONS += DELTA
EQUATIONS += OUTER


def small(name):
    """A mixer in float64 with parameters away from their first values."""
    return instance(lambda: build(name, WIDTH, **MIXERS[name].small))


@pytest.mark.parametrize("equation", EQUATIONS, ids=lambda e: e.__name__)
def test_equation(equation, float64):
    mixer, x = (
        small(equation.__name__),
        torch.randn(2, STEPS, WIDTH, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        close(mixer(x)[0][1], equation(mixer, x[1]), equation.__name__)


def test_every_row_without_golden_numbers_has_its_equation():
    assert {e.__name__ for e in EQUATIONS} == {
        name for name, row in MIXERS.items() if not row.golden.endswith(".safetensors")
    }


# what a mixer must refuse


@pytest.mark.parametrize("name", MIXERS)
def test_refusals(name):
    mixer, x = build(name, WIDTH, **MIXERS[name].small), torch.randn(2, 3, WIDTH)
    _, state = mixer(x)
    with pytest.raises(ValueError, match=r"\(2, 0, 16\); accepted is \(B, T, 16\)"):
        mixer(x[:, :0])
    with pytest.raises(ValueError, match=r"\(2, 3, 10\); accepted is \(B, T, 16\)"):
        mixer(x[..., :10])
    with pytest.raises(ValueError, match="accepted is"):
        mixer(x[0])
    with pytest.raises(TypeError, match=r"float64.*float32"):
        mixer(x.double())
    with pytest.raises(TypeError, match="int64"):
        mixer(x.long())
    with pytest.raises(ValueError, match=r"bool of shape \(B, T\) = \(2, 3\)"):
        mixer(x, None, torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="int64"):
        mixer(x, None, torch.zeros(2, 3, dtype=torch.long))
    wrongs = [(None, None), (state, state, state, state, state), torch.zeros(2)]
    for wrong in wrongs if state is None else [*wrongs, states.select(state, [0])]:
        with pytest.raises(ValueError, match="state"):
            mixer(x, wrong)


@cache
def state_of(name):
    """A state that the mixer called `name` returns after 3 steps of 2 sequences."""
    return build(name, WIDTH, **MIXERS[name].small)(torch.ones(2, 3, WIDTH))[1]


@pytest.mark.parametrize("name", MIXERS)
def test_the_state_of_another_mixer_is_refused(name):
    x, own, mine = torch.ones(2, 3, WIDTH), build(name, WIDTH, **MIXERS[name].small), state_of(name)
    for other in MIXERS:
        state = state_of(other)
        # what attention sees differs from what a window sees, not what is held
        window_as_cache = (name, other) == ("attention", "sliding_window")
        same = state is None or states.describe(state) == states.describe(mine)
        if not same and not window_as_cache:
            with pytest.raises(ValueError, match="state"):
                own(x, state)


@pytest.mark.parametrize("name", [n for n, row in MIXERS.items() if "num_heads" in row.small])
def test_heads_that_do_not_divide(name):
    with pytest.raises(
        ValueError, match=r"num_heads = 7 does not divide the width \d+; accepted are \[1, 2, 4"
    ):
        build(name, WIDTH, num_heads=7)


@pytest.mark.parametrize("name", ["attention", "sliding_window", "retnet"])
def test_heads_that_cannot_be_turned(name):
    with pytest.raises(ValueError, match="heads of width 3"):
        build(name, 12, num_heads=4)


@pytest.mark.parametrize(
    "name, args, match",
    [
        ("attention", dict(num_heads=4, num_key_heads=3), "num_key_heads = 3 does not divide num_heads 4"),
        ("mamba2", dict(num_groups=3), "num_groups = 3 does not divide num_heads 8"),
        ("hgrn2", dict(lower_bound=1.0), "at least 0 and less than 1"),
        ("sliding_window", dict(num_heads=2, window=1), "≥ 2 steps"),
        ("mamba", dict(states=3), "did you mean 'num_states'"),
    ],
)
def test_arguments_that_mean_nothing(name, args, match):
    with pytest.raises(ValueError, match=match):
        build(name, WIDTH, **args)
