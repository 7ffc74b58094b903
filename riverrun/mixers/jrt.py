"""JRT-RNN: linear attention that reads the first tokens of a document as a whole, and causally from there on.

    q, k, v, k^e, v^e = W x    φ as in Based    E = Σ_{s ≤ M} φ(k^e_s) [v^e_s, 1]ᵀ
    S_t = S_{t-1} + φ(k_t) [v_t, 1]ᵀ    [a_t, c_t] = (E + S_t)ᵀ φ(q_t)    y = W_o (a_t / c_t)

All t read all of E, those of the prefix, t ≤ M, too: what stands there sees later tokens of the prefix. It
has no next-token loss; the paper masks words there instead, for a quarter of the loss in its code.
Nothing sees later tokens beyond M.
Source: Arora et al. 2024 (arXiv:2407.05483), and its code. The state is E + S, one matrix.
"""

from __future__ import annotations

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.nn import NOT_NEGATIVE, carried, checked, fitting, head_width, heads, pooled, positions, wide
from riverrun.nn.feature import taylor


class JRT(nn.Module):
    """arXiv:2407.05483. State: (E + S (B, H, F, V + 1), position (B)); V = width / H, F as in Based.

    `prefix` M counts from the start of each document. What of it comes in one call is read as a whole, so
    give all of it to the first call; a later part of it does not reach back into outputs already given. The
    state after the prefix, and so all that follows, does not depend on how it came. Unless given it is 0,
    which is causal throughout: in a prefix a loss on the next token would find that token there, and so
    `riverrun train` leaves it out (`LanguageModel.prefix`). The paper reads 1,024 of 2,048 tokens.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        feature_width: int = 16,
        prefix: Annotated[int, NOT_NEGATIVE] = 0,
    ):
        super().__init__()
        head_width(width, num_heads)
        features = num_heads * feature_width
        self.width, self.num_heads, self.prefix = width, num_heads, prefix
        self.sizes = (features, features, width, features, width)
        self.inp = nn.Linear(width, sum(self.sizes), bias=False)  # [q, k, v, k^e, v^e]
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        S, start = carried(self, x, state, reset, 2)
        position, start = positions(x, fitting(self, start, x.shape[0]), reset)
        q, k, v, ke, ve = (heads(p, self.num_heads) for p in self.inp(x).split(self.sizes, -1))
        q, k = taylor(q), taylor(k)
        # sums of many positive terms leave half precision's range; the quotient is taken in a wider one
        v, ve = (F.pad(wide(p), (0, 1), value=1.0) for p in (v, ve))
        ke = taylor(ke) * (position < self.prefix)[..., None, None]
        y, S = ops.outer(q, k, v, state=S, reset=reset)
        y = y + pooled(q, ke, ve, reset)
        y = y[..., :-1] / y[..., -1:].clamp(min=0.5)  # less than 1/2 is rounding
        if reset is not None:  # the state is the last document's
            later = reset.flip(1).cumsum(1).flip(1) - reset.long()  # resets after each token
            ke = ke * (later == 0)[..., None, None]
        S = S + torch.einsum("bthf,bthv->bhfv", wide(ke), ve)
        return self.out(y.flatten(2).to(x.dtype)), (S, start)
