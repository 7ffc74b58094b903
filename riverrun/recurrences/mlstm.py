"""mLSTM: an outer-product memory with an exponential input gate, normalised, in numbers that never overflow.

    m_t = max(f_t + m_{t-1}, i_t)                       f: log forget gate, ≤ 0    i: log input gate, any size
    S_t = e^{f_t + m_{t-1} - m_t} S_{t-1} + e^{i_t - m_t} k_t v_tᵀ
    n_t = e^{f_t + m_{t-1} - m_t} n_{t-1} + e^{i_t - m_t} k_t
    y_t = S_tᵀ q_t / max(|n_t · q_t|, e^{-m_t})

    q, k: (B, T, G, K)    v, y: (B, T, H, V)    f, i: (B, T, H)
    state: (S (B, H, K, V), n (B, H, K), m (B, H))

m only rescales: S e^m and n e^m do not depend on it, so y does not depend on where m starts (0 here).
Source: Beck et al. 2024 (xLSTM, arXiv:2405.04517) eq. 19-27, stabilised as in eq. 15-17.
"""

import torch
from torch import Tensor

from .fold import Recurrence
from .outer import spread

MLSTMState = tuple[Tensor, Tensor, Tensor]


def step(
    state: MLSTMState, q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor
) -> tuple[MLSTMState, Tensor]:
    S, n, m = state
    q, k = spread(q, v.shape[1]), spread(k, v.shape[1])
    last, m = m, torch.maximum(f + m, i)
    forget, k = (f + last - m).exp()[..., None], (i - m).exp()[..., None] * k
    S, n = forget[..., None] * S + k[..., None] * v[..., None, :], forget * n + k
    weight = torch.maximum((n * q).sum(-1).abs(), least(m))
    return (S, n, m), torch.einsum("bhkv,bhk->bhv", S, q) / weight[..., None]


def least(m: Tensor) -> Tensor:
    """e^{-m}, at most e^60: y is then below e^-60 of S already, and float32 would overflow at e^88."""
    return (-m).clamp(max=60).exp()


def initial(q: Tensor, k: Tensor, v: Tensor, f: Tensor, i: Tensor) -> MLSTMState:
    B, H = v.shape[0], v.shape[2]
    return v.new_zeros(B, H, k.shape[3], v.shape[3]), v.new_zeros(B, H, k.shape[3]), v.new_zeros(B, H)


mlstm = Recurrence(
    "mlstm", step, initial,
    {"q": "B T G K", "k": "B T G K", "v": "B T H V", "f": "B T H", "i": "B T H"},
    y="B T H V", state=("B H K V", "B H K", "B H"), like="v",
)  # fmt: skip
