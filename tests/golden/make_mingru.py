"""Golden numbers of mingru from lucidrains' package, in float32 on the CPU.

python tests/golden/make_mingru.py        # pip install minGRU-pytorch==0.2.1, with torch 2.13.0
"""

from importlib.metadata import version
from pathlib import Path

import torch
from minGRU_pytorch.minGRU import minGRU

from riverrun.testing import golden

WIDTH, STEPS = 24, 40


def main() -> None:
    torch.manual_seed(0)
    layer, x = minGRU(WIDTH, expansion_factor=2.0), torch.randn(2, STEPS, WIDTH)
    y, last = layer(x, return_next_prev_hidden=True)
    path, args = Path(__file__).parent / "mingru.safetensors", dict(expand=2, positive=True)
    weights = dict(layer.named_parameters())
    golden.save(path, x, y, weights, {"h": last}, args, "minGRU-pytorch", version("minGRU-pytorch"))


if __name__ == "__main__":
    main()
