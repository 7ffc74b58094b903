"""Delta-rule memory: forget a little, then correct what the key reads towards the new value.

    S' = diag(e^{g_t}) S_{t-1}      S_t = S' + β_t k_t (v_t - S'ᵀ k_t)ᵀ      y_t = S_tᵀ q_t

    q, k: (B, T, G, K)    v, y: (B, T, H, V)    β: (B, T, H)    S: (B, H, K, V)
    g: none, (B, T, H) or (B, T, H, K), ≤ 0

With |k| = 1, β = 1 replaces what k held, and β up to 2 reflects it: the eigenvalue of the transition along k
is 1 - β. No g is DeltaNet, g per head Gated DeltaNet, g per key Kimi Delta Attention.
Sources: Schlag et al. 2021 (arXiv:2102.11174) eq. 23; Yang et al. 2025 (arXiv:2412.06464) eq. 10.
"""

import torch
from torch import Tensor

from .fold import Recurrence
from .outer import decay, spread


def step(S: Tensor, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    q, k = spread(q, v.shape[1]), spread(k, v.shape[1])
    S = decay(S, g)
    error = v - torch.einsum("bhkv,bhk->bhv", S, k)
    S = S + (beta[..., None] * k)[..., None] * error[..., None, :]
    return S, torch.einsum("bhkv,bhk->bhv", S, q)


def initial(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])


delta = Recurrence(
    "delta", step, initial,
    {"q": "B T G K", "k": "B T G K", "v": "B T H V", "beta": "B T H", "g": "B T H | B T H K ?"},
    y="B T H V", state="B H K V", like="v",
)  # fmt: skip
