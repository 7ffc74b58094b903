"""EfficientViM's hidden state mixer: channels are mixed on N weighted sums over all tokens, not on tokens.

    [B, C, δ] = conv(W x)    a = softmax of δ over the tokens    h_n = Σ_t a_tn B_tn x_t
    [u, z] = W_h h    h' = W_o (u ⊙ silu(z) + D u)    y_t = Σ_n C_tn h'_n

So a token costs O(N D) and only the N states cost O(D²) each. The convolution looks around every token, in a
picture in both dimensions.
Its authors' models classify by Σ_i w_i W_i mean_n norm(h'), w a softmax of learned weights, over the hidden
states of each stage's last block, `hidden`, and the tokens of the last one (their multi-stage fusion).
Source: Lee et al. 2024 (arXiv:2411.15241); the layout of its code, but for a constant that it adds to δ and
that softmax cancels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun.nn import LocalConv, checked, each_document, whole, wide


class EfficientViM(nn.Module):
    """arXiv:2411.15241. State: none, it sees both ways. Hidden states are gated at width expand · width.

    `columns`: how many tokens make a row of a picture; None for sequences.
    """

    @checked
    def __init__(
        self,
        width: int,
        num_states: int = 64,
        expand: int = 1,
        window: int = 3,
        columns: int | None = None,
    ):
        super().__init__()
        self.width, self.columns = width, columns
        self.inp = nn.Linear(width, 3 * num_states, bias=False)  # [B, C, δ]
        self.conv = LocalConv(3 * num_states, (window, window), bias=False)
        self.mix = nn.Linear(width, 2 * expand * width, bias=False)  # [u, z], of hidden states
        self.skip = nn.Parameter(torch.ones(1))
        self.out = nn.Linear(expand * width, width, bias=False)  # of hidden states

    def forward(
        self, x: Tensor, state: None = None, reset: Tensor | None = None, columns: int | None = None
    ) -> tuple[Tensor, None]:
        whole(self, x, state, reset)

        def read(document: Tensor) -> Tensor:
            h, C = self.hidden(document, columns)
            return C @ h

        return each_document(read, x, reset), None

    def hidden(self, x: Tensor, columns: int | None = None) -> tuple[Tensor, Tensor]:
        """The hidden states h' (B, N, D) of x (B, T, D), a document a row, and C (B, T, N), to read them."""
        B, C, delta = self.conv(self.inp(x), columns or self.columns).chunk(3, -1)
        weight = wide(delta).softmax(1).to(x.dtype) * B
        u, z = self.mix(weight.mT @ x).chunk(2, -1)
        return self.out(u * F.silu(z) + self.skip * u), C
