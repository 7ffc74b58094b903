"""TTT: the state is a model, and every token a training example for it.

    q, k, v = conv(W x), q and k of length one    η = base · σ(W_l x + c)
    W_t = W_{t-1} - η_t ∇|f(k_t) - v_t|²/2        y = W_o norm(f_t(q_t))
    f(x) = x + layer_norm(z), z = x W_1 + b_1 (linear) or gelu(x W_1 + b_1) W_2 + b_2 (mlp)

Gradients are taken at the start of each chunk of tokens. The authors' code leaves q and k as long as they are
and divides η by the head's width instead, and by the token's place in its chunk.
Source: Sun et al. 2024 (arXiv:2407.04620) sec. 2, with base 1 for linear and 0.1 for mlp as there.
"""

from __future__ import annotations

from torch import Tensor, nn

from riverrun.nn import RMSNorm, ShortConv, carried, checked, head_width, heads, unit, wide
from riverrun.nn.memory import Memory
from riverrun.recurrences.memory import Rule
from riverrun.state import State


class TTT(nn.Module):
    """arXiv:2407.04620. State: ((W, A, (), count), conv (B, window - 1, 3·width)) with W and A of (B, H, in,
    out) a matrix: (K + 1, K) if `memory` is "linear", (K + 1, E) and (E + 1, K) if "mlp"; E = expand · K.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        memory: str = "linear",
        chunk: int = 16,
        expand: int = 4,
        base: float | None = None,
        window: int = 4,
        eps: float = 1e-6,
    ):
        super().__init__()
        K = head_width(width, num_heads)
        self.width, self.num_heads = width, num_heads
        self.base = base or (1.0 if memory == "linear" else 0.1)
        self.inp = nn.Linear(width, 3 * width, bias=False)  # [q, k, v]
        self.rate = nn.Linear(width, num_heads)
        self.conv = ShortConv(3 * width, window, activation=False)
        self.memory = Memory(Rule(memory, chunk=chunk), num_heads, K, expand, bias=True)
        self.norm = RMSNorm(K, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[State, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Tensor]]:
        learned, past = carried(self, x, state, reset, 2)
        qkv, past = self.conv(self.inp(x), past, reset)
        q, k, v = (heads(p, self.num_heads) for p in qkv.chunk(3, -1))
        gates = {"lr": self.base * wide(self.rate(x)).sigmoid()}
        y, learned = self.memory(unit(q), unit(k), v, gates, learned, reset)
        return self.out(self.norm(y).flatten(2)), (learned, past)
