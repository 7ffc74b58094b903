"""A memory that is a small network, whose weights take a gradient step on an inner loss at every token.

    u_t = ∇ ℓ(f(W_c; k_t), v_t)               W_c: the weights at the start of t's chunk
    Z_t = e^{m_t} Z_{t-1} - η_t u_t           without momentum Z_t = -η_t u_t
    A_t = e^{g_t} A_{t-1} + Z_t    W_t = r(A_t)    y_t = f(W_t; q_t)

A chunk is `rule.chunk` tokens counted from the start of the document. All its gradients are taken at one W_c,
in this definition and in every faster form alike; chunk = 1 takes each at W_{t-1}. `memory` has f and ℓ,
`retention` r.

    q, k: (B, T, H, K)    v, y: (B, T, H, V)    η: (B, T, H), or one per matrix (B, T, H, ·)
    g, m: (B, T, H), ≤ 0; g may be None    δ, called bound, for huber, l2l1: (B, T, H)
    W_i: (H, in, out), A to begin with; one row more than its input has entries is a bias. norm: (2, H, V)
    state: (W_c, A, Z, tokens so far in the chunk (B)), the first three a matrix (B, H, in, out) for each W_i

linear, l2, chunk 1 is DeltaNet with β = η; with g it is Gated DeltaNet with η = β e^g and e^{-g} v for v;
with dot it is linear attention.
Sources: Sun et al. 2024 (TTT, arXiv:2407.04620) sec. 2; Behrouz et al. 2025 (Titans, arXiv:2501.00663) sec. 3
and (Miras, arXiv:2504.13173) sec. 5; Zhang et al. 2025 (LaCT, arXiv:2505.23884) sec. 3.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .fold import Recurrence
from .memory import BOUNDED, Rule, Weights, inner_loss, net, through
from .retention import begin, settle, weights

FastState = tuple[Weights, Weights, Weights, Tensor]


def named(rule: Rule, args: tuple[Any, ...]) -> tuple[Weights, dict[str, Any]]:
    """The initial weights, and every other argument by its name."""
    found = dict(zip(axes(rule), args, strict=True))
    return tuple(found.pop(name) for name in rule.shapes), found


def step(rule: Rule, state: FastState, *args: Tensor | None) -> tuple[FastState, Tensor]:
    initial, a = named(rule, args)
    W, A, Z, used = *state[:3], state[3].detach()  # a count has no slope
    q, k, v = (a[name][:, :, None] for name in "qkv")
    bound = a["bound"][:, :, None] if "bound" in a else None

    def loss(*W: Tensor) -> Tensor:
        return inner_loss(rule, net(rule.memory, k, through(W), a["norm"]), v, bound).sum()

    slopes = torch.func.grad(loss, argnums=tuple(range(len(W))))(*W)
    rate = a["lr"] if a["lr"].dim() == 3 else a["lr"][..., None].expand(*a["lr"].shape, len(W))
    Z = tuple(
        -rate[..., i, None, None] * u + (a["m"].exp()[..., None, None] * Z[i] if rule.momentum else 0)
        for i, u in enumerate(slopes)
    )
    keep = 1 if a.get("g") is None else a["g"].exp()[..., None, None]
    A = tuple(keep * x + z for x, z in zip(A, Z, strict=True))
    y = net(rule.memory, q, through(W if rule.by_chunk else weights(rule, A)), a["norm"])
    full = (used + 1 == rule.chunk)[:, None, None, None]
    done = settle(rule, W, A, initial)
    W, A = (tuple(torch.where(full, n, o) for n, o in zip(*pair, strict=True)) for pair in zip(done, (W, A)))
    return (W, A, Z if rule.momentum else (), (used + 1) % rule.chunk), y[:, :, 0]


def initial(rule: Rule, *args: Tensor | None) -> FastState:
    start, a = named(rule, args)
    return begin(rule, tuple(w.expand(len(a["v"]), *w.shape) for w in start))


def axes(rule: Rule) -> dict[str, str]:
    """The arguments of a rule: those of every rule, and those that only some have a use for."""
    found = {"q": "B T H K", "k": "B T H K", "v": "B T H V", **{n: f"H {s}" for n, s in rule.shapes.items()}}
    found["lr"] = f"B T H | B T H {len(rule.shapes)}"
    found |= {} if rule.by_chunk else {"g": "B T H ?"}
    found |= {"m": "B T H"} if rule.momentum else {}
    found |= {"bound": "B T H"} if rule.loss in BOUNDED else {}
    return found | {"norm": "2 H V ?"}


def fastweight(rule: Rule) -> Recurrence:
    W = tuple(f"B H {shape}" for shape in rule.shapes.values())
    state = (W, W, W if rule.momentum else (), "B")
    return Recurrence(
        "fastweight", partial(step, rule), partial(initial, rule), axes(rule), "B T H V", state, like="v"
    )
