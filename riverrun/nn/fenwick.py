"""A binary tree of decayed outer-product memories: what is near is kept finely, what is far coarsely."""

from __future__ import annotations

import torch
from torch import Tensor

from riverrun import ops
from riverrun.recurrences.outer import spread


def fenwick(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, weight: Tensor, position: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y_t = Σ_{s ≤ t} λ_t[l] e^{g_{s+1} + … + g_t} (q_tᵀk_s) v_s, l = bits of (position_t XOR position_s).

    q, k: (B, T, G, K)    v, y: (B, T, H, V)    g: (B, T, H)    weight λ: (B, T, H, L)
    position: (B, T), from the start of each document    state: (B, L - 1, H, K, V)

    Level 0 is the token itself. Level l ≥ 1 cuts a document into blocks of 2^{l-1} tokens; those of even
    number write, those of odd number read the block before: the op `outer`, one (batch, level) a sequence,
    cleared where an even block begins. So each level's memory is one matrix, and the tree starts again after
    2^{L-1} tokens. Source: Guo et al. 2025 (arXiv:2506.04761), and its code.
    """
    (B, T, H, L), device = weight.shape, v.device
    # before there is a state, levels whose first block is not yet full all hold the same
    count = L - 1 if state is not None else min(L - 1, (T - 1).bit_length() + 1)
    level = torch.arange(count, device=device)[:, None]
    reads = (position[:, None] >> level & 1).bool()  # (B, count, T)
    begins = position[:, None] & ((2 << level) - 1) == 0

    def tall(x: Tensor) -> Tensor:
        return x[:, None].expand(-1, count, *x.shape[1:]).flatten(0, 1)

    y, S = ops.outer(
        tall(q), tall(k) * ~reads.flatten(0, 1)[..., None, None], tall(v), tall(g),
        state=None if state is None else state.flatten(0, 1), reset=begins.flatten(0, 1),
    )  # fmt: skip
    far = weight[..., 1 : count + 1] * reads.permute(0, 2, 1)[:, :, None]
    own = spread((q * k).sum(-1, keepdim=True), H) * weight[..., :1] * v
    S = S.unflatten(0, (B, count))
    S = torch.cat([S, S[:, -1:].expand(-1, L - 1 - count, *S.shape[2:])], 1)
    return own + torch.einsum("bcthv,bthc->bthv", y.unflatten(0, (B, count)), far.to(y.dtype)), S
