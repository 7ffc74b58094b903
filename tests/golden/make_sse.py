"""Golden numbers of sparse state expansion: its layer for flash-linear-attention, in float32 on the CPU.

The layer is part of no release: it is loaded from a checkout at the commit below. Its kernel needs a GPU; in
its place stands the library's plain function for gated linear attention, and the gated norm in PyTorch.
Routing, sorting and the rest are the layer's.

python tests/golden/make_sse.py CHECKOUT    # beside flash-linear-attention==0.6.0 triton==3.6.0, torch 2.13.0
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import fla.layers.utils
import torch
import torch.nn.functional as F
from fla.ops.gla.naive import naive_recurrent_gla

from riverrun.testing import golden

COMMIT = "bf82e8243e9f4c1e6226d50eb9e7f2973c120300"
WIDTH, STEPS, HEADS, PARTITIONS, CHOSEN = 16, 70, 2, 4, 2


def loaded(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gla(q, k, v, initial_state, cu_seqlens, output_final_state, g=None, gk=None):
    assert initial_state is None
    parts = (x.split(cu_seqlens.diff().tolist(), 1) for x in (q, k, v, g if gk is None else gk))
    return torch.cat([naive_recurrent_gla(*some)[0] for some in zip(*parts, strict=True)], 1), None


def main() -> None:
    torch.manual_seed(0)
    source = Path(sys.argv[1]) / "fla"
    index = loaded(source / "ops" / "sse" / "index.py")
    index.softmax_and_mask = None  # a kernel of the other implementation
    sys.modules["fla.ops.sse"] = index
    fla.layers.utils.get_unpad_data = None  # for padded batches
    sse = loaded(source / "layers" / "sse.py")
    sse.chunk_gla = sse.fused_recurrent_gla = gla
    layer = sse.SSEGLA(
        hidden_size=WIDTH, head_dim=WIDTH // HEADS, num_heads=HEADS, num_sparse_partition=PARTITIONS,
        num_writer=CHOSEN, num_reader=CHOSEN, gate_low_rank_dim=4, layer_idx=0,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if p.dim() == 2:
                p.copy_(torch.randn_like(p) * p.shape[1] ** -0.5)
            else:
                p.copy_(0.3 * torch.randn_like(p) + ("norm" in name))
    norm = layer.o_norm
    norm.forward = lambda x, gate: F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps) * F.silu(gate)
    x = torch.randn(2, STEPS, WIDTH)
    with torch.no_grad():
        y = layer(x)[0]
    args = dict(
        num_heads=HEADS, num_partitions=PARTITIONS, writers=CHOSEN, readers=CHOSEN, decay_rank=4, eps=1e-5
    )
    path, weights = Path(__file__).parent / "sse.safetensors", dict(layer.named_parameters())
    golden.save(path, x, y, weights, {}, args, "flash-linear-attention", COMMIT)


if __name__ == "__main__":
    main()
