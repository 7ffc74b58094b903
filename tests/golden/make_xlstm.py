"""Golden numbers of xlstm and slstm_block from the authors' package, in float32 on the CPU.

python tests/golden/make_xlstm.py        # pip install xlstm==2.0.6, torch 2.13.0

An eps of 1e-6 that the package adds to mLSTM's normaliser, and the paper does not, is set to zero.
"""

from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.mlstm.layer import mLSTMLayer, mLSTMLayerConfig
from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

from riverrun.testing import golden

WIDTH, STEPS, HEADS = 16, 40, 2


def main() -> None:
    torch.manual_seed(0)
    config = mLSTMLayerConfig(embedding_dim=WIDTH, num_heads=HEADS, context_length=STEPS)
    mlstm = mLSTMLayer(config)
    mlstm.mlstm_cell.backend_fn = partial(parallel_stabilized_simple, eps=0)
    slstm = sLSTMLayer(
        sLSTMLayerConfig(embedding_dim=WIDTH, num_heads=HEADS, backend="vanilla", dtype="float32")
    )
    for name, layer in (("xlstm", mlstm), ("slstm_block", slstm)):
        with torch.no_grad():
            for p in layer.parameters():
                p.add_(0.3 * torch.randn_like(p))
            x = torch.randn(2, STEPS, WIDTH)
            y = layer(x)
        path = Path(__file__).parent / f"{name}.safetensors"
        weights = dict(layer.named_parameters())
        args = dict(num_heads=HEADS) | (dict(expand=4) if layer is mlstm else {})  # it rounds 32 up to 64
        golden.save(path, x, y, weights, {}, args, "xlstm", version("xlstm"))


if __name__ == "__main__":
    main()
