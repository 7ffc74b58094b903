"""Golden numbers of mamba, mamba2, gated_deltanet and mlstm from transformers, in float32 on the CPU.

python tests/golden/make_transformers.py        # pip install transformers==5.23.0, with torch 2.13.0
"""

from pathlib import Path

import torch
import transformers
from transformers import DynamicCache
from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Config, Mamba2Mixer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextGatedDeltaNet
from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from riverrun.testing import golden

FOLDER = Path(__file__).parent
WIDTH, STEPS = 24, 70  # past a chunk of 64
SIZES = dict(vocab_size=8, hidden_size=WIDTH)


def scatter(layer: torch.nn.Module) -> torch.nn.Module:
    """Parameters away from the values they begin with, which hide mistakes."""
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.eval()


def write(name: str, layer: torch.nn.Module, args: dict, config=None) -> None:
    x = torch.randn(2, STEPS, WIDTH)
    with torch.no_grad():
        if config is None:
            y, parts = layer(x)
            state = dict(zip("Cnm", parts))
        else:
            cache = DynamicCache(config=config)
            y = layer(x, cache_params=cache)
            state = {
                "conv": cache.get_conv_state(0, state_idx=0),
                "S": cache.get_recurrent_state(0, state_idx=0),
            }
    weights = dict(layer.named_parameters())
    golden.save(
        FOLDER / f"{name}.safetensors", x, y, weights, state, args, "transformers", transformers.__version__
    )


def main() -> None:
    torch.manual_seed(0)
    config = MambaConfig(
        **SIZES, num_hidden_layers=1, state_size=5, time_step_rank=3, expand=2, conv_kernel=4
    )
    write("mamba", scatter(MambaMixer(config, 0)), dict(num_states=5, rank=3), config)

    limits = (0.05, 0.6)  # so narrow that it bites at both ends
    config = Mamba2Config(
        **SIZES,
        num_hidden_layers=1,
        state_size=5,
        num_heads=6,
        head_dim=8,
        n_groups=2,
        time_step_limit=limits,
    )
    args = dict(num_heads=6, num_states=5, num_groups=2, step_limits=limits)
    write("mamba2", scatter(Mamba2Mixer(config, 0)), args, config)

    config = Qwen3NextConfig(
        **SIZES, num_hidden_layers=1, layer_types=["linear_attention"], linear_num_value_heads=4,
        linear_num_key_heads=2, linear_key_head_dim=6, linear_value_head_dim=7, linear_conv_kernel_dim=4,
    )  # fmt: skip
    args = dict(num_heads=4, num_key_heads=2, key_width=6, value_width=7)
    write("gated_deltanet", scatter(Qwen3NextGatedDeltaNet(config, 0)), args, config)

    config = xLSTMConfig(**SIZES, num_blocks=1, num_heads=2, autocast_kernel_dtype="float32", chunk_size=16)
    layer = scatter(xLSTMLayer(config))
    with torch.no_grad():  # gates that open, and one that runs into the soft cap
        layer.igate_preact.weight.mul_(30)
        layer.fgate_preact.bias.add_(2)
    write("mlstm", layer, dict(num_heads=2))


if __name__ == "__main__":
    main()
