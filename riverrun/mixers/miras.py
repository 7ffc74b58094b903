"""Miras: a memory by four choices, network, inner loss, retention and optimiser, and three named settings.

    q, k, v = silu(conv(W x)), q and k of length one    η = base · σ(W_l x + c)    e^g = σ(W_g x + c)
    A_t = e^{g_t} A_{t-1} - η_t ∇ℓ(f(k_t), v_t)    W_t = r(A_t)    y = W_o (norm(f(W_t; q_t)) ⊙ silu(W_z x))
    f(x) = x + layer_norm(gelu(x W_1) W_2)

    moneta   ℓ = Σ |f(k) - v|³                  W = A / |A|_4²
    yaad     ℓ = Huber(|f(k) - v|), δ = softplus(W_d x + c)    W = A
    memora   ℓ = |f(k) - v|² / 2                W = softmax(A)

Any of the four choices can be made otherwise; loss="l2l1" is the form of Yaad's loss in eq. 26, whose slope
jumps where |f(k) - v| = δ. Gradients are taken at the start of each chunk; r is applied at every token, where
the authors apply it at the ends of chunks.
Source: Behrouz et al. 2025 (arXiv:2504.13173) sec. 5, eq. 24 (Moneta), 26 (Yaad) and 27 (Memora), as others
have copied them out.
"""

from __future__ import annotations

from torch import Tensor, nn

from riverrun.nn import GatedRMSNorm, ShortConv, carried, checked, head_width, heads, unit
from riverrun.nn.memory import Memory, gate_map, gates
from riverrun.recurrences.memory import Rule
from riverrun.state import State

VARIANTS = {"moneta": ("lp", "lq"), "yaad": ("huber", "decay"), "memora": ("l2", "softmax")}


class Miras(nn.Module):
    """arXiv:2504.13173. State: ((W, A, Z, count), conv (B, window - 1, 3·width)), each of the first three two
    matrices (B, H, K, E) and (B, H, E, K) for an mlp, E = expand · K; Z is empty without momentum.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        variant: str = "moneta",
        memory: str = "mlp",
        loss: str | None = None,
        retain: str | None = None,
        momentum: bool = False,
        residual: bool = True,
        chunk: int = 16,
        expand: int = 4,
        base: float = 0.1,
        window: int = 4,
        eps: float = 1e-6,
    ):
        super().__init__()
        K = head_width(width, num_heads)
        if variant not in VARIANTS:
            raise ValueError(f"no variant '{variant}' of Miras; there are {sorted(VARIANTS)}")
        usual = VARIANTS[variant]
        rule = Rule(memory, loss or usual[0], retain or usual[1], momentum, chunk)
        if rule.by_chunk:
            raise ValueError(f"retain = '{retain}' is LaCT's; Miras takes 'decay', 'lq' or 'softmax'")
        self.width, self.num_heads, self.base = width, num_heads, base
        self.inp = nn.Linear(width, 4 * width, bias=False)  # [q, k, v, z]
        self.gate = gate_map(rule, width, num_heads)  # [η, g, m, δ]
        self.conv = ShortConv(3 * width, window)
        self.memory = Memory(rule, num_heads, K, expand, residual)
        self.norm = GatedRMSNorm(width, K, eps, shared=True)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[State, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[State, Tensor]]:
        learned, past = carried(self, x, state, reset, 2)
        qkv, z = self.inp(x).split([3 * self.width, self.width], -1)
        qkv, past = self.conv(qkv, past, reset)
        q, k, v = (heads(p, self.num_heads) for p in qkv.chunk(3, -1))
        found = gates(self.memory.rule, self.gate(x), self.base)
        y, learned = self.memory(unit(q), unit(k), v, found, learned, reset)
        return self.out(self.norm(y.flatten(2), z)), (learned, past)
