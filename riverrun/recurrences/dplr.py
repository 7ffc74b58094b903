"""Diagonal-plus-rank-one transition: the delta rule with what is removed and what is written set apart.

    S_t = (diag(e^{g_t}) + a_t b_tᵀ) S_{t-1} + k_t v_tᵀ        y_t = S_tᵀ q_t

    q, k, a, b: (B, T, H, K)    g: (B, T, H, K), ≤ 0    v, y: (B, T, H, V)    S: (B, H, K, V)

a = -β k, b = e^g ⊙ k and β k written for k is the delta rule; RWKV-7 takes a = -(α ⊙ κ), b = κ with |κ| = 1.
Sources: Yang et al. 2024 (arXiv:2406.06484) sec. 6; Peng et al. 2025 (RWKV-7, arXiv:2503.14456) eq. 17.
"""

import torch
from torch import Tensor

from .fold import Recurrence


def step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    removed = torch.einsum("bhkv,bhk->bhv", S, b)
    S = g.exp()[..., None] * S + a[..., None] * removed[..., None, :] + k[..., None] * v[..., None, :]
    return S, torch.einsum("bhkv,bhk->bhv", S, q)


def initial(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Tensor:
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])


dplr = Recurrence(
    "dplr", step, initial,
    {"q": "B T H K", "k": "B T H K", "v": "B T H V", "g": "B T H K", "a": "B T H K", "b": "B T H K"},
    y="B T H V", state="B H K V", like="v",
)  # fmt: skip
