"""DeltaNet: linear attention that corrects what a key reads towards the new value, instead of adding to it.

    q, k, v = silu(conv(W x))    q, k scaled to |q| = K^{-1/2}, |k| = 1    β = σ(W_b x)
    S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ    y = W_o norm(S_tᵀ q_t)

Source: Yang et al. 2024 (arXiv:2406.06484) sec. 2.2.
"""

from __future__ import annotations

from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import RMSNorm, ShortConv, carried, checked, head_width, heads, parts, unit
from riverrun.nn.signed import write_strength


class DeltaNet(nn.Module):
    """arXiv:2406.06484. State: (S (B, H, K, K), conv (B, window - 1, 3·width)), K = width / H.

    `negative_eigenvalues`: β = 2 σ(W_b x), see `riverrun.nn.signed`.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        window: int = 4,
        negative_eigenvalues: bool = False,
        eps: float = 1e-6,
    ):
        super().__init__()
        K = head_width(width, num_heads)
        self.width, self.num_heads, self.key_width = width, num_heads, K
        self.negative_eigenvalues = negative_eigenvalues
        self.inp = nn.Linear(width, 3 * width + num_heads, bias=False)  # [q, k, v, b]
        self.conv = ShortConv(3 * width, window)
        self.norm = RMSNorm(K, eps)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, past = carried(self, x, state, reset, 2)
        qkv, b = parts(self.inp, x, [3 * self.width, self.num_heads])
        qkv, past = self.conv(qkv, past, reset)
        q, k, v = (heads(p, self.num_heads) for p in qkv.chunk(3, -1))
        beta = write_strength(b, self.negative_eigenvalues)
        y, S = ops.delta(unit(q) * self.key_width**-0.5, unit(k), v, beta, state=S, reset=reset)
        return self.out(self.norm(y).flatten(2)), (S, past)
