"""How the weights of a test-time memory come from A, what its gradients have added up to.

    decay: W = A    lq: W = A / |A|_q^{q-2}    softmax: W = softmax of A over the inputs of each unit
    norm, muon: y_t = f(W_c; q_t), A is zero at the start of a chunk, and its end is what moves W:
         W ← n(W + A) or n(W + orthogonal(A)), where n gives each unit's weights the length they began with

For c = 1, W ← c softmax(α log W - η ∇) is the softmax of A: it does not see what log W adds to all entries.
Sources: Behrouz et al. 2025 (Miras, arXiv:2504.13173) sec. 5, where q = 4; Zhang et al. 2025 (LaCT,
arXiv:2505.23884) sec. 3, with the Newton-Schulz coefficients of its code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import Rule, Weights

NEWTON_SCHULZ = (
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip


def weights(rule: Rule, A: Weights) -> Weights:
    """r(A)."""
    if rule.retain == "lq":
        return tuple(a / size(a) for a in A)
    return tuple(a.softmax(-2) for a in A) if rule.retain == "softmax" else A


def size(A: Tensor) -> Tensor:
    """|A|_q^{q-2} for q = 4, of matrices (..., in, out)."""
    return (A.square().square().sum((-2, -1), keepdim=True) + 1e-6).sqrt()


def begin(rule: Rule, A: Weights):
    """The state before the first token, from the initial A, (B, H, in, out) each."""
    Z = tuple(torch.zeros_like(a) for a in A) if rule.momentum else ()
    start = (A, tuple(torch.zeros_like(a) for a in A)) if rule.by_chunk else (weights(rule, A), A)
    return *start, Z, A[0].new_zeros(len(A[0]))


def settle(rule: Rule, W: Weights, A: Weights, initial: Weights) -> tuple[Weights, Weights]:
    """W_c and A after the last token of a chunk."""
    if not rule.by_chunk:
        return weights(rule, A), A
    moved = (w + (orthogonal(a) if rule.retain == "muon" else a) for w, a in zip(W, A, strict=True))
    return tuple(
        F.normalize(w, dim=-2, eps=1e-5) * i.norm(dim=-2, keepdim=True)
        for w, i in zip(moved, initial, strict=True)
    ), tuple(torch.zeros_like(a) for a in A)


def orthogonal(G: Tensor) -> Tensor:
    """G (..., in, out) with all its singular values near one, by five Newton-Schulz steps."""
    if G.shape[-2] > G.shape[-1]:  # the smaller of the two Gram matrices
        return orthogonal(G.mT).mT
    X = G / (G.square().sum((-2, -1), keepdim=True) + 1e-14).sqrt()
    for a, b, c in NEWTON_SCHULZ:
        gram = X @ X.mT
        X = a * X + (b * gram + c * gram @ gram) @ X
    return X
