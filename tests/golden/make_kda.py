"""Golden numbers of kda from transformers, in float32 on the CPU: the layers of Kimi Linear and of GLM 5.

python tests/golden/make_kda.py        # pip install transformers==5.23.0, with torch 2.13.0 and without fla
"""

from pathlib import Path

import torch
import transformers
from transformers import DynamicCache
from transformers.models.glm5_next.modeling_glm5_next import Glm5NextTextConfig, Glm5NextTextLinearAttention
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearConfig, KimiLinearDeltaAttention

from riverrun.testing import golden

WIDTH, STEPS, HEADS = 16, 70, 2  # past a chunk of 64


def main(path: str, of_layer: type, of_config: type, **args: float) -> None:
    torch.manual_seed(0)
    config = of_config(
        vocab_size=8, hidden_size=WIDTH, num_hidden_layers=1, layer_types=["linear_attention"],
        linear_head_dim=WIDTH // HEADS, linear_num_heads=HEADS,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, **{f"linear_{name}": b for name, b in args.items()},
    )  # fmt: skip
    layer = of_layer(config, 0).eval()
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * (p.shape[-1] ** -0.5 if p.dim() == 2 else 1))
    x, cache = torch.randn(2, STEPS, WIDTH), DynamicCache(config=config)
    with torch.no_grad():
        y = layer(x, cache_params=cache)
    state = {"S": cache.get_recurrent_state(0, state_idx=0), "conv": cache.get_conv_state(0, state_idx=0)}
    w, source = dict(layer.named_parameters()), ("transformers", transformers.__version__)
    golden.save(Path(__file__).parent / path, x, y, w, state, dict(num_heads=HEADS, **args), *source)


if __name__ == "__main__":
    main("kda.safetensors", KimiLinearDeltaAttention, KimiLinearConfig)
    bounded = "variants/kda_bounded.safetensors"
    main(bounded, Glm5NextTextLinearAttention, Glm5NextTextConfig, lower_bound=-5.0)
