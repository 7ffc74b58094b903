"""What one layer can keep count of, shown by weights set by hand: parity, modulo three, products in a group.

Eigenvalues of -1 and products of reflections are what it takes: Grazzi et al. 2025 (arXiv:2411.12537), Siems
et al. 2025 (arXiv:2502.10297).
"""

import pytest
import torch

from riverrun.mixers import build
from riverrun.testing.tolerance import close, error

OPEN, SHUT = 40.0, -40.0  # pre-activations at which float64's sigmoid and softplus have reached their ends
LONG = 1e5  # a key so long that the 1e-6 inside its norm is lost in rounding


def bits(T=300):
    return torch.randint(2, (1, T), generator=torch.Generator().manual_seed(3)).double()


def blank(name, **args):
    """A mixer of width 8 with negative eigenvalues and all parameters zero; inputs are (bit, 1, 0, ...)."""
    mixer = build(name, 8, negative_eigenvalues=True, **args).double().requires_grad_(False)
    for p in mixer.parameters():
        p.zero_()
    if hasattr(mixer, "conv"):
        mixer.conv.weight[:, -1] = 1  # the step itself
    mixer.out.weight[0, 0] = 1
    return mixer


def seen(b, width=8):
    x = torch.zeros(*b.shape, width, dtype=torch.float64)
    x[..., 0], x[..., 1] = b, 1
    return x


def deltanet_parity():
    """s = s - 2 (s - 1/2) on a one, else s = s."""
    m = blank("deltanet", num_heads=1)
    m.inp.weight[0, 1] = m.inp.weight[8, 1] = LONG  # q and k: e_0 after their norm
    m.inp.weight[16, 1] = 1
    m.inp.weight[24, :2] = torch.tensor([OPEN - SHUT, SHUT])
    m.norm.weight[:] = 1
    return m


def gated_deltanet_parity():
    m = blank("gated_deltanet", num_heads=1)
    m.inp.weight[0, 1] = m.inp.weight[8, 1] = LONG
    m.inp.weight[16, 1] = m.inp.weight[24, 1] = 1
    m.inp.weight[32, :2] = torch.tensor([OPEN - SHUT, SHUT])
    m.dt_bias[:] = SHUT  # forgets nothing
    m.norm.weight[:] = 1
    return m


def mamba_parity():
    """h = -h + dt u B on a one, where exp(-dt) is nothing; else h = h, where dt is nothing."""
    m = blank("mamba", num_states=1, rank=1)
    for row, source in ((0, 1), (1, 0), (16, 1)):  # u_0, u_1 and the gate of channel 0
        m.inp.weight[row, source] = 1
    m.scan.conv.weight[:, -1] = 1
    # δ by the bit, B and C by the one
    m.scan.dt_bc.weight[0, 1] = m.scan.dt_bc.weight[1, 0] = m.scan.dt_bc.weight[2, 0] = 1
    m.scan.dt.weight[0, 0], m.scan.dt.bias[0] = 3 * OPEN, SHUT
    return m


def rwkv7_parity():
    """Along the key, the transition is w - c a: its least w less c on a one, else one."""
    m = blank("rwkv7", num_heads=1, decay_rank=1, rate_rank=1, gate_rank=1)
    m.r.weight[0, 1] = m.k.weight[0, 1] = m.v.weight[0, 1] = 1
    for gate, slope in ((m.decay, torch.tanh(torch.ones(()))), (m.rate, 1)):
        gate.inp.weight[0, 0] = 1
        gate.out.weight[:, 0], gate.out.bias[:] = (OPEN - SHUT) / slope, SHUT
    m.removal[:] = LONG
    m.replacement[:] = m.norm.weight[:] = m.gate.out.weight[:] = 1
    return m


PARITY = {
    f.__name__.removesuffix("_parity"): f
    for f in (deltanet_parity, gated_deltanet_parity, mamba_parity, rwkv7_parity)
}


@pytest.mark.parametrize("name", PARITY)
def test_one_layer_counts_modulo_two(name):
    """y is zero after an even number of ones and the same for every odd one, after 1 as after 150."""
    b = bits()
    y = PARITY[name]()(seen(b))[0][..., 0]
    odd = b.cumsum(1) % 2
    assert y.abs().max() > 0.01
    # each step may be off by some roundings, 300 of them by 1e-13, and the norm of an empty state enlarges
    # that a thousandfold: its eps is 1e-6
    close(y, odd * y.abs().max() * y.sum().sign(), name, bound=1e-6)


@pytest.mark.parametrize("name", PARITY)
def test_without_the_switch_nothing_flips(name):
    """The same weights, with eigenvalues in [0, 1] (rwkv7: down to -0.455), forget the count."""
    b, m = bits(), PARITY[name]()
    if name == "rwkv7":
        m.strength = 1
    (m.scan if name == "mamba" else m).negative_eigenvalues = False
    y = m(seen(b))[0][..., 0]
    assert error(y, b.cumsum(1) % 2 * y.abs().max() * y.sum().sign()) > 0.3


def test_rwkv7_reaches_minus_one_and_no_further():
    """diag(w) - c (a ⊙ κ) κᵀ: c = 1 + min w keeps eigenvalues in [-1, 1] and reaches -1, c = 2 leaves it."""
    g = torch.Generator().manual_seed(0)
    c = build("rwkv7", 8, num_heads=1, negative_eigenvalues=True).strength
    least = c - 1
    w = least + (1 - least) * torch.rand(200, 6, generator=g, dtype=torch.float64)
    a, kappa = (torch.randn(200, 6, generator=g, dtype=torch.float64) for _ in range(2))
    w[:50], a = least, a.sigmoid()
    a[:50], kappa = 1, kappa / kappa.norm(dim=-1, keepdim=True)

    def eigenvalues(c):
        found = torch.linalg.eigvals(torch.diag_embed(w) - c * (a * kappa)[..., None] * kappa[:, None])
        assert found.imag.abs().max() < 1e-9  # similar to a symmetric matrix
        return found.real

    assert abs(eigenvalues(c).min() + 1) < 1e-12 and eigenvalues(c).max() <= 1
    assert eigenvalues(2).min() < -1.4 and eigenvalues(1).min() > -0.5


def product(layout, **args):
    """A blank `deltaproduct`, its projection by names: (name, step, head, channel) -> {input: weight}."""
    m = blank("deltaproduct", gated=False, **args)
    H, n, K = m.num_heads, m.num_steps, m.key_width
    V = m.inner[2] // (n * H)
    start = {"q": 0, "k": H * K, "v": H * K * (n + 1), "b": m.sizes[0]}
    size = {"q": K, "k": K, "v": V, "b": 1}
    for (name, step, head, channel), weights in layout.items():
        row = start[name] + (step * H + head) * size[name] + channel
        for source, weight in weights.items():
            m.inp.weight[row, source] = weight
    m.norm.weight[:] = 1
    return m


def test_two_reflections_count_modulo_three():
    """They turn by twice the angle between their keys: 60 degrees apart, one layer counts modulo three.

    Inputs are one-hot: 0 begins by writing at 45 degrees, 1 adds one, 2 adds two, 3 adds none. The signs of
    the two coordinates tell 45, 165 and 285 degrees apart.
    """
    a, b = (LONG, 0.0), (LONG / 2, LONG * 0.75**0.5)
    layout = {("v", 0, h, 0): {0: LONG} for h in range(2)}
    for h in range(2):
        layout[("q", 0, h, h)] = {0: LONG, 1: LONG, 2: LONG, 3: LONG}
        for c in range(2):
            layout[("k", 0, h, c)] = {0: LONG, 1: a[c], 2: b[c]}
            layout[("k", 1, h, c)] = {1: b[c], 2: a[c]}
        layout[("b", 0, h, 0)] = {1: OPEN, 2: OPEN, 3: SHUT}  # σ(0) = 1/2 writes all of v at first
        layout[("b", 1, h, 0)] = {0: SHUT, 1: OPEN, 2: OPEN, 3: SHUT}
    m = product(layout, num_heads=2)
    m.out.weight.zero_()
    m.out.weight[0, 0] = m.out.weight[1, 4] = 1
    digits = torch.randint(3, (1, 200), generator=torch.Generator().manual_seed(5))
    x = torch.nn.functional.one_hot(torch.tensor([3, 1, 2])[digits], 8).double()
    x[:, 0] = torch.eye(8, dtype=torch.float64)[0]
    signs = m(x)[0][0, 1:, :2].sign()
    expected = torch.tensor([[1, 1], [-1, 1], [1, -1]])[digits[0, 1:].cumsum(0) % 3]
    assert torch.equal(signs, expected.double())


def test_mamba3_counts_modulo_two():
    """What the first token wrote is turned by half a turn at every one: its sign is the parity."""
    m = build("mamba3", 8, num_heads=2, num_states=4).double().requires_grad_(False)
    for p in m.parameters():
        p.zero_()
    starts = torch.tensor([0, *m.sizes]).cumsum(0)
    m.inp.weight[starts[0], 1] = m.inp.weight[starts[1], 2] = 1  # z is open, u is written by the first
    m.inp.weight[starts[4] : starts[5], 1] = 0.5413248546129181  # dt = softplus of this = 1
    m.inp.weight[starts[7], 0] = OPEN  # ω
    m.biases[..., :2] = 1  # k and q: only the pair that turns
    m.out.weight[0, 0] = 1
    b = bits()
    x = seen(b)
    x[:, 0, 0], x[:, 0, 2] = 0, 1
    y = m(x)[0][0, :, 0]
    assert torch.equal(y.sign(), 1 - 2 * (x[0, :, 0].cumsum(0) % 2))


def silu_inverse(y):
    """u > -1.2 with silu(u) = y, by Newton's method."""
    u = 2 * y
    for _ in range(20):
        s = u.sigmoid()
        u = u - (u * s - y) / (s + u * s * (1 - s))
    return u


def about(axis, angle):
    """Two unit vectors whose reflections, the first first, turn three dimensions about `axis`."""
    axis = torch.tensor(axis, dtype=torch.float64)
    axis = axis / axis.norm()
    first = torch.linalg.cross(axis, torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64))
    first = first / first.norm()
    return first, torch.cos(angle / 2) * first + torch.sin(angle / 2) * torch.linalg.cross(axis, first)


def exchanged(*pairs):
    """The transpositions of five things, each as a reflection."""
    eye = torch.eye(5, dtype=torch.float64)
    return [(eye[i] - eye[j]) / 2**0.5 for i, j in pairs]


FIFTH, THIRD = 2 * torch.pi / torch.tensor([5.0, 3.0], dtype=torch.float64)


GROUPS = {  # generators as reflections, and how many elements they generate
    "S3": ([exchanged((0, 1)), exchanged((0, 1), (1, 2))], 6),
    "A5": ([about((0.0, 1.0, (1 + 5**0.5) / 2), FIFTH), about((1.0, 1.0, 1.0), THIRD)], 60),
    "S5": ([exchanged((0, 1)), exchanged((0, 1), (1, 2), (2, 3), (3, 4))], 120),
}


def generated(matrices):
    found = [torch.eye(len(matrices[0]), dtype=torch.float64)]
    for element in found:
        for m in matrices:
            new = m @ element
            if all((new - old).abs().max() > 1e-6 for old in found):
                found.append(new)
    return torch.stack(found)


@pytest.mark.parametrize("group, n", [("S3", 2), ("A5", 2), ("S5", 4)])
def test_a_layer_multiplies_a_group_out(group, n):
    """A5 takes two reflections a token, S5 four: the memory is the product of 60 tokens, no other element."""
    generators, size = GROUPS[group]
    K = len(generators[0][0])
    matrices, layout = [], {("b", step, 0, 0): {0: SHUT, 1: SHUT} for step in range(n)}
    for source, keys in enumerate(generators):
        matrix = torch.eye(K, dtype=torch.float64)
        for step, key in enumerate(keys):
            matrix = matrix - 2 * key[:, None] * (key @ matrix)
            layout["b", step, 0, 0][source] = OPEN
            for channel, weight in enumerate(silu_inverse(0.2 * key)):
                layout.setdefault(("k", step, 0, channel), {})[source] = weight
        matrices.append(matrix)
    m = product(layout, num_heads=1, num_steps=n, key_width=K, value_width=K)
    word = torch.randint(2, (60,), generator=torch.Generator().manual_seed(4))
    start = torch.eye(K, dtype=torch.float64)[None, None], torch.zeros(1, 3, m.sizes[0], dtype=torch.float64)
    S = m(torch.nn.functional.one_hot(word, 8).double()[None], start)[1][0][0, 0]
    expected = torch.eye(K, dtype=torch.float64)
    for token in word:
        expected = matrices[token] @ expected
    elements = generated(matrices)
    assert len(elements) == size
    distance = (elements - S).abs().amax((1, 2))
    nearest = distance.argmin()
    # the 1e-6 in the keys' norm turns a strength of 2 into 2 - 5e-5, up to 240 times
    assert distance[nearest] < 0.02 < 0.1 < distance.topk(2, largest=False).values[1]
    assert (elements[nearest] - expected).abs().max() < 1e-6
