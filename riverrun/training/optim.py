"""AdamW with weight decay by the parameter's role. Loshchilov & Hutter 2019 (arXiv:1711.05101).

Matrices decay: two axes or more, and called `weight`, and not an embedding. Norms, biases, rates, step
sizes and embeddings do not. A parameter may say its role itself: `parameter.decays = True` or False.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class OptimConfig:
    """AdamW's settings, and the bound on the gradient's norm."""

    lr: float = 3e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0  # norm of all gradients together; 0 leaves them as they are

    def __post_init__(self) -> None:
        if self.lr <= 0 or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas) or self.clip < 0:
            raise ValueError(
                f"optim: lr = {self.lr} must be positive, betas = {self.betas} two numbers in 0..1, "
                f"clip = {self.clip} not negative"
            )


def decaying(model: nn.Module) -> dict[str, bool]:
    """For each parameter's name whether weight decay applies to it."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    roles = {}
    for name, p in model.named_parameters():
        matrix = p.dim() >= 2 and name.endswith("weight") and id(p) not in embeddings
        roles[name] = getattr(p, "decays", matrix)
    return roles


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """The optimizer of a model's parameters, fused into one loop where the device has it."""
    decays = decaying(model)
    groups = [
        {
            "params": [p for name, p in model.named_parameters() if decays[name] == wanted],
            "weight_decay": config.weight_decay if wanted else 0.0,
        }
        for wanted in (True, False)
    ]
    first, second = config.betas
    return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second), eps=config.eps, fused=True)


def clip(model: nn.Module, bound: float) -> Tensor:
    """The norm of all gradients together, before it is brought down to `bound`; 0 leaves it."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(grads)
    if bound:
        nn.utils.clip_grads_with_norm_(model.parameters(), bound, norm)
    return norm


def moments(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimizer's memory by the names of parameters, for a checkpoint."""
    return {
        f"{name}/{key}": value
        for name, p in model.named_parameters()
        for key, value in optimizer.state.get(p, {}).items()
    }


def restore(optimizer: torch.optim.Optimizer, model: nn.Module, values: dict[str, Tensor]) -> None:
    """The inverse of `moments`. Raises ValueError when they are another model's."""
    parameters = dict(model.named_parameters())
    for key, value in values.items():
        name, _, what = key.rpartition("/")
        p = parameters.get(name)
        if p is None or (value.dim() and value.shape != p.shape):
            raise ValueError(f"the optimizer's memory '{key}' does not belong to this model")
        optimizer.state[p][what] = value.to(p.device) if value.dim() else value
