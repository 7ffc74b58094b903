"""Golden numbers of lstm and gru from torch.nn, in float32 on the CPU.

python tests/golden/make_torch.py        # with torch 2.13.0
"""

from pathlib import Path

import torch

from riverrun.testing import golden

WIDTH, STEPS = 24, 40


def main() -> None:
    torch.manual_seed(0)
    for name, kind in (("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)):
        layer, x = kind(WIDTH, WIDTH, batch_first=True), torch.randn(2, STEPS, WIDTH)
        y, last = layer(x)
        state = dict(zip("hs", last)) if name == "lstm" else {"h": last}
        path = Path(__file__).parent / f"{name}.safetensors"
        golden.save(path, x, y, dict(layer.named_parameters()), state, {}, "torch", torch.__version__)


if __name__ == "__main__":
    main()
