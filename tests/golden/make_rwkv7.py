"""Golden numbers of rwkv7 from the first layer of rwkv7-hf, in float32 on the CPU.

python tests/golden/make_rwkv7.py        # pip install rwkv7-hf==0.9.0 transformers==5.23.0, torch 2.13.0
"""

from importlib.metadata import version
from pathlib import Path

import torch
from rwkv7_hf.configuration_rwkv7 import RWKV7Config
from rwkv7_hf.modeling_rwkv7 import RWKV7TimeMix

from riverrun.testing import golden

WIDTH, STEPS, HEADS = 16, 70, 2


def main() -> None:
    torch.manual_seed(0)
    config = RWKV7Config(
        hidden_size=WIDTH, num_heads=HEADS, num_hidden_layers=1, decay_low_rank_dim=5, a_low_rank_dim=5,
        gate_low_rank_dim=7,
    )  # fmt: skip
    layer = RWKV7TimeMix(config, 0)
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("x_"):
                p.copy_(torch.rand_like(p))
            elif "proj" in name or "lora" in name:
                p.copy_(torch.randn_like(p) * WIDTH**-0.5)
            else:
                p.copy_(1 + 0.3 * torch.randn_like(p))
    x, K = torch.randn(2, STEPS, WIDTH), WIDTH // HEADS
    with torch.no_grad():
        y, S, last, _ = layer(
            x,
            torch.zeros(2, HEADS, K, K),
            torch.zeros(2, WIDTH),
            None,
            torch.ones(2, STEPS, dtype=torch.bool),
        )
    path = Path(__file__).parent / "rwkv7.safetensors"
    args = dict(num_heads=HEADS, decay_rank=5, rate_rank=5, gate_rank=7)
    weights = dict(layer.named_parameters())
    golden.save(path, x, y, weights, {"S": S, "last": last}, args, "rwkv7-hf", version("rwkv7-hf"))


if __name__ == "__main__":
    main()
