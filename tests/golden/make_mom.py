"""Golden numbers of a mixture of memories: the layer of flash-linear-attention, in float32 on the CPU.

Its kernels need a GPU; in their place stand, below, the library's own plain function for the gated delta
rule, and the short convolution and the gated norm in PyTorch. Routing, sorting and the rest are the layer's;
that it sorts tokens by memory must not change their order, which PyTorch's sort promises when asked only.

python tests/golden/make_mom.py    # pip install flash-linear-attention==0.6.0 triton==3.6.0, torch 2.13.0
"""

from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from fla.layers import mom
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

from riverrun.testing import golden

WIDTH, STEPS, HEADS, MEMORIES = 16, 70, 2, 4


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def pieces(x, ends):
    """x (1, n, ...) cut at `ends`, or whole rows for none."""
    return [x] if ends is None else list(x.split(ends.diff().tolist(), 1))


def delta_rule(q, k, v, g, beta, cu_seqlens, **others):
    assert others["initial_state"] is None and others["use_qk_l2norm_in_kernel"]
    args = (pieces(x, cu_seqlens) for x in (unit(q), unit(k), v, beta, g))
    return torch.cat(
        [naive_recurrent_gated_delta_rule(*some)[0] for some in zip(*args, strict=True)], 1
    ), None


def convolution(layer):
    def forward(x, cache, output_final_state, cu_seqlens):
        def one(part):
            padded = F.pad(part.mT, (layer.kernel_size[0] - 1, 0))
            return F.silu(F.conv1d(padded, layer.weight, groups=layer.weight.shape[0])).mT

        return torch.cat([one(part) for part in pieces(x, cu_seqlens)], 1), None

    return forward


def main() -> None:
    torch.manual_seed(0)
    sort = torch.Tensor.argsort
    torch.Tensor.argsort = lambda x, **how: sort(x, **{"stable": True, **how})
    mom.chunk_gated_delta_rule = mom.fused_recurrent_gated_delta_rule = delta_rule
    layer = mom.MomAttention(
        hidden_size=WIDTH, head_dim=WIDTH // HEADS, num_heads=HEADS, expand_v=1, num_memories=MEMORIES,
        topk=2, shared_mem=True, layer_idx=0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.randn_like(p) * WIDTH**-0.5)
            elif "norm" in name:
                p.copy_(1 + 0.3 * torch.randn_like(p))
    for conv in (layer.q_conv1d, layer.k_conv1d, layer.v_conv1d):
        conv.forward = convolution(conv)
    norm = layer.o_norm
    norm.forward = lambda x, gate: F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) * F.silu(gate)
    x = torch.randn(2, STEPS, WIDTH)
    with torch.no_grad():
        y = layer(x)[0]
    args = dict(num_heads=HEADS, num_memories=MEMORIES, chosen=2, eps=1e-5)
    path, package = Path(__file__).parent / "mom.safetensors", "flash-linear-attention"
    golden.save(path, x, y, dict(layer.named_parameters()), {}, args, package, version(package))


if __name__ == "__main__":
    main()
