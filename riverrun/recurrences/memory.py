"""What a test-time memory can be: its network f and its inner loss ℓ, and the choices that make up a rule.

    z    linear: x W_1    mlp: gelu(x W_1) W_2    swiglu: (silu(x W_1) ⊙ x W_3) W_2
    f    z, or x + γ ⊙ layer_norm(z) + β with (γ, β) = norm
    ℓ    with e = f(k) - v    dot: -f(k)·v    l2: |e|²/2    lp: Σ |e_i|^p
         huber: |e|²/2 where |e| ≤ δ, else δ (|e| - δ/2)    l2l1: |e|²/2 where |e| ≤ δ, else δ Σ |e_i|

How weights come from what gradients add up to is `retention`. Sources: Sun et al. 2024 (arXiv:2407.04620)
sec. 2; Behrouz et al. 2025 (arXiv:2504.13173) sec. 5, for p = 3; Zhang et al. 2025 (arXiv:2505.23884) sec. 3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = {
    "linear": {"W1": "I V"},
    "mlp": {"W1": "I E", "W2": "J V"},
    "swiglu": {"W1": "K E", "W2": "E V", "W3": "K E"},
}  # I and J: K and E, or one more
BOUNDED = ("huber", "l2l1")  # losses that take a δ
LOSSES = ("dot", "l2", "lp", *BOUNDED)
RETENTIONS = ("decay", "lq", "softmax", "norm", "muon")
P = 3
Weights = tuple[Tensor, ...]


@dataclass(frozen=True)
class Rule:
    """One way to learn at test time. Raises ValueError for a choice that does not exist."""

    memory: str = "linear"
    loss: str = "l2"
    retain: str = "decay"
    momentum: bool = False
    chunk: int = 1

    def __post_init__(self):
        for what, known in {"memory": tuple(SHAPES), "loss": LOSSES, "retain": RETENTIONS}.items():
            if (given := getattr(self, what)) not in known:
                raise ValueError(f"{what} = '{given}' of a memory's rule; there are {known}")
        if self.chunk < 1:
            raise ValueError(f"chunk = {self.chunk}; it takes at least 1 token")
        if self.by_chunk and self.momentum:
            raise ValueError(f"retain = '{self.retain}' takes no momentum")

    @property
    def shapes(self) -> dict[str, str]:
        return SHAPES[self.memory]

    @property
    def by_chunk(self) -> bool:
        """Whether weights move at the end of a chunk only, so that all its tokens read the same ones."""
        return self.retain in ("norm", "muon")


def net(memory: str, x: Tensor, layer: Callable[[int, Tensor], Tensor], norm: Tensor | None) -> Tensor:
    """f(x) for x (B, H, C, K), where `layer(i, x)` is x times the i-th matrix."""
    if memory == "linear":
        z = layer(0, x)
    elif memory == "mlp":
        z = layer(1, F.gelu(layer(0, x)))
    else:
        z = layer(1, F.silu(layer(0, x)) * layer(2, x))
    if norm is None:
        return z
    return x + norm[0, :, None] * F.layer_norm(z, z.shape[-1:], eps=1e-6) + norm[1, :, None]


def padded(x: Tensor, W: Tensor) -> Tensor:
    """x (..., n), and a one behind it for a W of n + 1 rows, whose last is a bias."""
    extra = W.shape[-2] - x.shape[-1]
    if extra not in (0, 1):
        raise ValueError(
            f"a memory's matrix has {W.shape[-2]} rows for inputs of {x.shape[-1]}; or one more, a bias"
        )
    return F.pad(x, (0, 1), value=1.0) if extra else x


def through(W: Weights) -> Callable[[int, Tensor], Tensor]:
    """Layer i of a memory as it stands."""
    return lambda i, x: padded(x, W[i]) @ W[i]


def inner_loss(rule: Rule, y: Tensor, v: Tensor, bound: Tensor | None) -> Tensor:
    """ℓ for each token of y, v (B, H, C, V) and bound (B, H, C). 1e-6 keeps slopes of lengths finite at 0."""
    if rule.loss == "dot":
        return -(y * v).sum(-1)
    square = (y - v).square()
    if rule.loss == "lp":
        return (square + 1e-6).pow(P / 2).sum(-1)
    if rule.loss == "l2":
        return square.sum(-1) / 2
    length = (square.sum(-1) + 1e-6).sqrt()
    assert bound is not None
    beyond = length - bound / 2 if rule.loss == "huber" else (square + 1e-6).sqrt().sum(-1)
    return torch.where(length <= bound, length.square() / 2, bound * beyond)
