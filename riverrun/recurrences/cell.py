"""Nonlinear recurrences, h_t = f(h_{t-1}, x_t), with a recurrent matrix R that is block-diagonal by heads.

    p_t = x_t + R h_{t-1} + c, one vector a gate        H = 1 is the ordinary full matrix
    x: (B, T, gates, H, P)    R: (gates, H, P out, P in)    c: (gates, H, P)
    y: (B, T, H, P)    h: (B, H, P)

    elman   h = tanh(p)
    lstm    i, f, z, o = p:    s = σ(f) ⊙ s + σ(i) ⊙ tanh(z)    h = σ(o) ⊙ tanh(s)
            state (h, s)
    gru     r, u, z = x:       ρ = σ(r + R_r h + c_r)    υ = σ(u + R_u h + c_u)
                               h = υ ⊙ h + (1 - υ) ⊙ tanh(z + ρ ⊙ (R_z h + c_z))
    slstm   i, f, z, o = p:    φ = log σ(f) + m₋₁    m = max(φ, i)    s = e^{φ-m} s + e^{i-m} tanh(z)
                               n = e^{φ-m} n + e^{i-m}    h = σ(o) ⊙ s / n
            state (h, s, n, m), m starts at -∞

Gate order is that of `torch.nn.LSTM` and `torch.nn.GRU`, whose c for the GRU's candidate stands inside ρ as
here.
Sources: Elman 1990; Hochreiter & Schmidhuber 1997 with Gers 2000; Cho et al. 2014 (arXiv:1406.1078) as in
PyTorch; Beck et al. 2024 (xLSTM, arXiv:2405.04517) eq. 8-17.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .fold import Recurrence


def read(R: Tensor, h: Tensor, c: Tensor | None) -> Tensor:
    """R h + c for every gate and head: (B, gates, H, P)."""
    p = torch.einsum("ghpk,bhk->bghp", R, h)
    return p if c is None else p + c


def elman(state: tuple[Tensor], x: Tensor, R: Tensor, c: Tensor | None):
    h = torch.tanh(x + read(R, state[0], c))[:, 0]
    return (h,), h


def lstm(state: tuple[Tensor, Tensor], x: Tensor, R: Tensor, c: Tensor | None):
    h, s = state
    i, f, z, o = (x + read(R, h, c)).unbind(1)
    s = f.sigmoid() * s + i.sigmoid() * z.tanh()
    h = o.sigmoid() * s.tanh()
    return (h, s), h


def gru(state: tuple[Tensor], x: Tensor, R: Tensor, c: Tensor | None):
    (h,) = state
    p = read(R, h, c)
    r, u = (x[:, 0] + p[:, 0]).sigmoid(), (x[:, 1] + p[:, 1]).sigmoid()
    h = u * h + (1 - u) * (x[:, 2] + r * p[:, 2]).tanh()
    return (h,), h


def slstm(state: tuple[Tensor, Tensor, Tensor, Tensor], x: Tensor, R: Tensor, c: Tensor | None):
    h, s, n, m = state
    i, f, z, o = (x + read(R, h, c)).unbind(1)
    kept = F.logsigmoid(f) + m
    m = torch.maximum(kept, i)
    forget, write = (kept - m).exp(), (i - m).exp()
    s, n = forget * s + write * z.tanh(), forget * n + write
    h = o.sigmoid() * s / n
    return (h, s, n, m), h


def _recurrence(name: str, step, gates: int, start: tuple[float, ...]) -> Recurrence:
    def initial(x: Tensor, R: Tensor, c: Tensor | None):
        return tuple(x.new_full((x.shape[0], *x.shape[3:]), value) for value in start)

    args = {"x": f"B T {gates} H P", "R": f"{gates} H P P", "c": f"{gates} H P ?"}
    return Recurrence(name, step, initial, args, y="B T H P", state=("B H P",) * len(start), like="x")


ELMAN, LSTM = _recurrence("elman", elman, 1, (0.0,)), _recurrence("lstm", lstm, 4, (0.0, 0.0))
GRU, SLSTM = _recurrence("gru", gru, 3, (0.0,)), _recurrence("slstm", slstm, 4, (0.0, 0.0, 0.0, -torch.inf))
