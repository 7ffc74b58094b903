"""The language models of gpu_lm.py: ours, and those they are compared with.

`made(stack, side, depth)` gives a model in bfloat16 on the GPU and `loss(tokens)`, the mean over its next
tokens; `side` is "riverrun" or one of the stack's `PEERS`. Peers have the sizes of ours: width, depth,
vocabulary, tied embeddings, and feed-forward layers of as many weights.

    gla, gated_deltanet, rwkv7    fla's own models, with its fused norms, convolutions and cross entropy
    hybrid                        fla's Gated DeltaNet, every fourth layer attention: fla's needs flash-attn,
                                  so this one has its projections and rotary, and PyTorch's attention
    mamba2                        fla's layer between its other layers; it needs mamba-ssm's Triton files, and
                                  of its ways through them takes the one that knows no causal-conv1d; and
                                  ours around fla's simple_gla, a faster kernel for the same
    attention                     transformers' Llama with PyTorch's attention, and our cross entropy

fla refuses its gated backward on Hopper with Triton 3.4 to 3.7.0, where some of its gradients are wrong; the
guard is lifted for timing, as in gpu_peers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gpu_peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from riverrun import ops
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.training.loss import cross_entropy

WIDTH, INNER, VOCABULARY, DEPTH, LONGEST = 768, 2048, 32_768, 12, 32_768
MIXERS = {
    "mamba2": dict(num_heads=24, num_states=128),
    "gla": dict(num_heads=6),
    "gated_deltanet": dict(num_heads=6),
    "rwkv7": dict(num_heads=12),
    "attention": dict(num_heads=12),
}
STACKS = {name: name for name in MIXERS} | {"hybrid": "3 gated_deltanet + 1 attention"}

OURS = "riverrun"

Loss = Callable[[Tensor], Tensor]
Make = Callable[[int], tuple[nn.Module, Loss]]


def config(stack: str, depth: int = DEPTH, vocabulary: int = VOCABULARY) -> LanguageConfig:
    used = {name: args for name, args in MIXERS.items() if name in STACKS[stack]}
    return LanguageConfig(vocabulary, WIDTH, depth, STACKS[stack], used, INNER)


def ours(stack: str, depth: int = DEPTH, vocabulary: int = VOCABULARY) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(config(stack, depth, vocabulary)).to("cuda", torch.bfloat16)


def made(stack: str, side: str, depth: int) -> tuple[nn.Module, Loss]:
    """A model and its loss."""
    if side != OURS:
        return PEERS[stack][side](depth)
    model = ours(stack, depth)
    return model, lambda tokens: loss_of(model, tokens)


def loss_of(model: LanguageModel, tokens: Tensor) -> Tensor:
    x, _ = model.hidden(tokens[:, :-1])
    return cross_entropy(x, model.output, tokens[:, 1:])


def of_fla(config: str, model: str, **settings: Any) -> Make:
    def make(depth: int) -> tuple[nn.Module, Loss]:
        gpu_peers.unguarded()
        import fla.models

        common = dict(
            hidden_size=WIDTH, num_hidden_layers=depth, vocab_size=VOCABULARY, intermediate_size=INNER,
            tie_word_embeddings=True, max_position_embeddings=LONGEST, use_cache=False,
        )  # fmt: skip
        chosen = getattr(fla.models, config)(**{**common, **settings})
        made = getattr(fla.models, model)(chosen).to("cuda", torch.bfloat16)
        criterion = fla.modules.FusedLinearCrossEntropyLoss()

        def loss(tokens: Tensor) -> Tensor:
            x = made.model(tokens[:, :-1]).last_hidden_state
            return criterion(x, tokens[:, 1:].contiguous(), made.lm_head.weight)

        return made, loss

    return make


gated_deltanet = of_fla(
    "GatedDeltaNetConfig", "GatedDeltaNetForCausalLM", num_heads=6, head_dim=128, expand_v=1.0
)


class Attention(nn.Module):
    """In the place of fla's, and called as that is."""

    def __init__(self, num_heads: int = 12):
        super().__init__()
        from fla.modules import RotaryEmbedding

        self.num_heads = num_heads
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.rotary = RotaryEmbedding(dim=WIDTH // num_heads)

    def forward(self, hidden_states: Tensor, **others: Any) -> tuple[Tensor, None, Any]:
        q, k, v = (f(hidden_states).unflatten(-1, (self.num_heads, -1)) for f in (self.q, self.k, self.v))
        q, k = self.rotary(q, k)[:2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(y), None, others.get("past_key_values")


def mixed(depth: int) -> tuple[nn.Module, Loss]:
    model, loss = gated_deltanet(depth)
    for layer in model.model.layers[3::4]:
        layer.attn = Attention().to("cuda", torch.bfloat16)
    return model, loss


def mamba2(depth: int) -> tuple[nn.Module, Loss]:
    from fla.layers import mamba2 as layers

    if not layers.is_fast_path_available:
        raise RuntimeError("mamba-ssm's Triton files are not to be found")
    model, loss = gated_deltanet(depth)
    sizes = dict(hidden_size=WIDTH, num_heads=24, head_dim=64, state_size=128, expand=2, backend="triton")
    for layer in model.model.layers:
        layer.attn = layers.Mamba2(**sizes).to("cuda", torch.bfloat16).eval()  # there is no dropout
    return model, loss


def llama(depth: int) -> tuple[nn.Module, Loss]:
    import transformers

    chosen = transformers.LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=depth, num_attention_heads=12,
        vocab_size=VOCABULARY, tie_word_embeddings=True, max_position_embeddings=LONGEST, use_cache=False,
        attn_implementation="sdpa",
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(chosen).to("cuda", torch.bfloat16)

    def loss(tokens: Tensor) -> Tensor:
        x = made.model(tokens[:, :-1]).last_hidden_state
        return cross_entropy(x, made.lm_head.weight, tokens[:, 1:])

    return made, loss


def around_simple_gla(depth: int) -> tuple[nn.Module, Loss]:
    gpu_peers.unguarded()
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q, k, v, g, u, state=None, reset=None):
        q, k = (x.expand(*v.shape[:3], -1) for x in (q, k))  # it knows no groups
        return chunk_simple_gla(q, k, v, g, scale=1.0, initial_state=state, output_final_state=True)

    model = ours("mamba2", depth)

    def loss(tokens: Tensor) -> Tensor:
        mine = ops.outer.kernels["gpu"]
        ops.outer.kernels["gpu"] = ops.Kernel(run, "cuda", lambda name, args: None, half=True)
        try:
            with ops.forced(outer="gpu"):
                return loss_of(model, tokens)
        finally:
            ops.outer.kernels["gpu"] = mine

    return model, loss


PEERS: dict[str, dict[str, Make]] = {
    "mamba2": {"fla, mamba-ssm's SSD": mamba2, "ours around fla's simple_gla": around_simple_gla},
    "gla": {"fla": of_fla("GLAConfig", "GLAForCausalLM", num_heads=6)},
    "gated_deltanet": {"fla": gated_deltanet},
    "rwkv7": {"fla": of_fla("RWKV7Config", "RWKV7ForCausalLM", head_dim=64, intermediate_size=3072)},
    "attention": {"transformers, SDPA": llama},
    "hybrid": {"fla, its attention PyTorch's": mixed},
}
