"""The models of transformers that riverrun is measured against, and their weights in riverrun's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from riverrun.mixers import build
from riverrun.models.language import LanguageConfig, LanguageModel
from riverrun.nn import RMSNorm

WIDTH, LAYERS, VOCABULARY, INNER, HEADS = 256, 4, 1000, 704, 4

Weights = dict[str, Tensor]
Call = Callable[[nn.Module, Tensor, Any], tuple[Tensor, Any]]  # (model, tokens, state) -> (logits, state)


@dataclass(frozen=True)
class Pair:
    """One model on both sides."""

    theirs: Callable[[], nn.Module]
    ours: Callable[[], nn.Module]
    call: Call  # of theirs
    convert: Callable[[Weights], Weights]  # their state dict -> ours


class Bare(nn.Module):
    """x + mixer(norm(x)) a layer: a `LanguageModel` without feed-forward layers, as the Mamba models are."""

    def __init__(self, mixer: str, **args: Any):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.mixers = nn.ModuleList(build(mixer, WIDTH, **args) for _ in range(LAYERS))
        self.norms = nn.ModuleList(RMSNorm(WIDTH, 1e-5) for _ in range(LAYERS + 1))

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        x, after = self.embedding(tokens), []
        for norm, mixer, before in zip(self.norms, self.mixers, state or [None] * LAYERS):
            y, s = mixer(norm(x), before)
            x = x + y
            after.append(s)
        return F.linear(self.norms[-1](x), self.embedding.weight), tuple(after)


def sizes() -> dict[str, Any]:
    return dict(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, tie_word_embeddings=True)


def mamba() -> nn.Module:
    return MambaForCausalLM(MambaConfig(**sizes(), state_size=16))


def mamba2() -> nn.Module:
    heads = dict(num_heads=8, head_dim=64, state_size=64, n_groups=1)
    return Mamba2ForCausalLM(Mamba2Config(**sizes(), **heads, chunk_size=64))  # faster than its 256 here


def qwen3_next() -> nn.Module:
    K = WIDTH // HEADS
    heads = dict(linear_num_key_heads=HEADS, linear_num_value_heads=HEADS)
    widths = dict(linear_key_head_dim=K, linear_value_head_dim=K, intermediate_size=INNER)
    layers = dict(layer_types=["linear_attention"] * LAYERS, mlp_only_layers=list(range(LAYERS)))
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes(), **heads, **widths, **layers))


def gated_deltanet() -> nn.Module:
    mixers = {"gated_deltanet": dict(num_heads=HEADS)}
    return LanguageModel(LanguageConfig(VOCABULARY, WIDTH, LAYERS, "gated_deltanet", mixers, INNER))


def call_ours(model: nn.Module, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
    return model(tokens, state)


def call_mamba(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    out = model(tokens, cache_params=cache, use_cache=not torch.is_grad_enabled())
    return out.logits, out.cache_params


def call_qwen3_next(model: nn.Module, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Positions and masks are passed: the model would ask an attention layer for them, and here is none."""
    if cache is None and not torch.is_grad_enabled():
        cache = DynamicCache(config=model.config)
    positions = torch.arange(tokens.shape[1])[None]  # read by attention layers only
    masks = {"linear_attention": None, "full_attention": None}
    keep = cache is not None
    out = model(tokens, masks, positions, past_key_values=cache, use_cache=keep)
    return out.logits, out.past_key_values


def from_mamba(weights: Weights, names: dict[str, str], inner: str = "") -> Weights:
    """Both Mamba models; `names` is what their mixers call otherwise, `inner` the part of ours that is
    between the maps in and out. A Conv1d loses its middle axis."""
    found = {"embedding.weight": weights["backbone.embeddings.weight"]}
    found[f"norms.{LAYERS}.weight"] = weights["backbone.norm_f.weight"]
    outer = {"in_proj.weight": "inp.weight", "out_proj.weight": "out.weight"}
    between = {"conv1d.bias": "conv.bias", "A_log": "log_rate", "D": "skip", **names}
    shared = outer | {theirs: inner + ours for theirs, ours in between.items()}
    for i in range(LAYERS):
        layer = f"backbone.layers.{i}."
        found[f"norms.{i}.weight"] = weights[layer + "norm.weight"]
        found[f"mixers.{i}.{inner}conv.weight"] = weights[layer + "mixer.conv1d.weight"].squeeze(1)
        for theirs, ours in shared.items():
            found[f"mixers.{i}.{ours}"] = weights[f"{layer}mixer.{theirs}"]
    return found


def from_mamba1(weights: Weights) -> Weights:
    dt = {"dt_proj.weight": "dt.weight", "dt_proj.bias": "dt.bias"}
    return from_mamba(weights, {"x_proj.weight": "dt_bc.weight", **dt}, "scan.")


def from_mamba2(weights: Weights) -> Weights:
    return from_mamba(weights, {"dt_bias": "dt_bias", "norm.weight": "norm.weight"})


def from_qwen3_next(weights: Weights) -> Weights:
    """Their input maps are interleaved by key head, [q, k, v, z] and [b, a]; ours are [q, k, v, z, b, a]. The
    weights of their norms between layers are stored less 1."""
    found = {"embedding.weight": weights["model.embed_tokens.weight"]}
    found["norm.weight"] = 1 + weights["model.norm.weight"]
    for i in range(LAYERS):
        start, block = f"model.layers.{i}.", f"blocks.{i}."
        part = {name.removeprefix(start): w for name, w in weights.items() if name.startswith(start)}
        qkvz = part["linear_attn.in_proj_qkvz.weight"].unflatten(0, (HEADS, 4, -1)).transpose(0, 1)
        ba = part["linear_attn.in_proj_ba.weight"].unflatten(0, (HEADS, 2)).transpose(0, 1)
        found[block + "mixer.inp.weight"] = torch.cat([qkvz.flatten(0, 2), ba.flatten(0, 1)])
        found[block + "mixer.conv.weight"] = part["linear_attn.conv1d.weight"].squeeze(1)
        found[block + "mixer.log_rate"] = part["linear_attn.A_log"]
        found[block + "mixer.dt_bias"] = part["linear_attn.dt_bias"]
        found[block + "mixer.norm.weight"] = part["linear_attn.norm.weight"]
        found[block + "mixer.out.weight"] = part["linear_attn.out_proj.weight"]
        gate, up = part["mlp.gate_proj.weight"], part["mlp.up_proj.weight"]
        found[block + "mlp.inp.weight"] = torch.cat([gate, up])
        found[block + "mlp.out.weight"] = part["mlp.down_proj.weight"]
        found[block + "mixer_norm.weight"] = 1 + part["input_layernorm.weight"]
        found[block + "mlp_norm.weight"] = 1 + part["post_attention_layernorm.weight"]
    return found


PAIRS = {
    "mamba": Pair(mamba, lambda: Bare("mamba"), call_mamba, from_mamba1),
    "mamba2": Pair(mamba2, lambda: Bare("mamba2"), call_mamba, from_mamba2),
    "qwen3_next": Pair(qwen3_next, gated_deltanet, call_qwen3_next, from_qwen3_next),
}


def make(name: str, side: str) -> tuple[nn.Module, Call]:
    """The model `name` of "riverrun" or "transformers": the same weights, none of them at a special value."""
    pair = PAIRS[name]
    torch.manual_seed(0)
    theirs = pair.theirs()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.02 * torch.randn_like(p))
    if side == "transformers":
        return theirs, pair.call
    ours = pair.ours()
    ours.load_state_dict(pair.convert(theirs.state_dict()))
    return ours, call_ours
