"""Decayed outer-product memory: keys write values into a matrix, queries read it.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_tᵀ        y_t = S_tᵀ q_t
    with a bonus u:                               y_t = (S_{t-1} + (u ⊙ k_t) v_tᵀ)ᵀ q_t

    q, k: (B, T, G, K)    v, y: (B, T, H, V)    u: (H, K)    S: (B, H, K, V)
    g: none, (B, T, H) or (B, T, H, K), ≤ 0

No g is linear attention, a constant g per head RetNet, g per head Mamba-2, g per key GLA; with a bonus
RWKV-6.
Sources: Katharopoulos et al. 2020 (arXiv:2006.16236) eq. 18-20; Yang et al. 2024 (GLA, arXiv:2312.06635) eq.
3; Peng et al. 2024 (RWKV-6, arXiv:2404.05892) eq. 19.
"""

import torch
from torch import Tensor

from .fold import Recurrence


def spread(x: Tensor, heads: int) -> Tensor:
    """Repeat the groups of x (..., G, K) so that every head has its own: (..., H, K)."""
    return x if x.shape[-2] == heads else x.repeat_interleave(heads // x.shape[-2], -2)


def decay(S: Tensor, g: Tensor | None) -> Tensor:
    """diag(e^g) S for g (B, H), (B, H, K) or None."""
    return S if g is None else g.exp().view(*g.shape, *[1] * (S.dim() - g.dim())) * S


def step(
    S: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, u: Tensor | None
) -> tuple[Tensor, Tensor]:
    q, k = spread(q, v.shape[1]), spread(k, v.shape[1])
    read = S if u is None else S + (u * k)[..., None] * v[..., None, :]
    S = decay(S, g) + k[..., None] * v[..., None, :]
    return S, torch.einsum("bhkv,bhk->bhv", S if u is None else read, q)


def initial(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor | None) -> Tensor:
    return v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])


outer = Recurrence(
    "outer", step, initial,
    {"q": "B T G K", "k": "B T G K", "v": "B T H V", "g": "B T H | B T H K ?", "u": "H K ?"},
    y="B T H V", state="B H K V", like="v",
)  # fmt: skip
