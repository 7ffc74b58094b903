"""Golden numbers of mixers that see both ways, from their authors' layers, in float32 on the CPU.

python tests/golden/make_both.py FOLDER        # needs einops 0.8.2; in FOLDER, clones of
    github.com/goombalab/hydra at 55bef74, github.com/YuHengsss/VSSD at 87b753b,
    github.com/mlvlab/EfficientViM at 304340c, and github.com/hustvl/ViG at dfb9d32

The layers run as they are. Their Triton kernels, which need a GPU, are replaced by the recurrences they
compute, written out below; what else they import and do not call here is replaced by nothing.
"""

import importlib
import sys
import types
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from riverrun.testing import golden

WIDTH, ROWS, COLUMNS = 16, 6, 6  # EfficientViM takes squares only
STEPS = ROWS * COLUMNS


class Absent(nn.Module):
    """Stands for whatever is imported and not called."""

    def __init__(self, *args, **kwargs):
        super().__init__()


class Stand(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Absent


class GatedNorm(nn.Module):
    """norm(x) ⊙ silu(z): mamba_ssm's RMSNormGated with norm_before_gate."""

    def __init__(self, width, eps, norm_before_gate, device=None, dtype=None):
        super().__init__()
        assert norm_before_gate
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x, z):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight * F.silu(z)


def ssd(x, dt, A, B, C, chunk_size, D=None, z=None, seq_idx=None, initial_states=None):
    """h = e^{dt A} h + dt x Bᵀ, y = h C: mamba_ssm's mamba_chunk_scan_combined, a step at a time."""
    heads = x.shape[2]
    B, C = (p.repeat_interleave(heads // p.shape[2], 2) for p in (B, C))
    h, ys = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[3]), []
    for t in range(x.shape[1]):
        decay = (dt[:, t] * A).exp()[..., None, None]
        h = decay * h + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append(torch.einsum("bhpn,bhn->bhp", h, C[:, t]))
    return torch.stack(ys, 1)


def gla(q, k, v, gk, gv):
    """S = diag(e^g) S + k vᵀ, y = Sᵀ q / sqrt(K), on (B, H, T, ·): fla's fused_recurrent_gla."""
    S, ys = torch.zeros(*k.shape[:2], k.shape[3], v.shape[3]), []
    for t in range(k.shape[2]):
        S = gk[:, :, t].exp()[..., None] * S + k[:, :, t, :, None] * v[:, :, t, None]
        ys.append(torch.einsum("bhkv,bhk->bhv", S, q[:, :, t]) * k.shape[3] ** -0.5)
    return torch.stack(ys, 2), S


def stand_in(**given) -> None:
    """Modules that cannot be imported here, with what stands for their functions."""
    names = """mamba_ssm mamba_ssm.ops mamba_ssm.ops.triton mamba_ssm.ops.triton.layernorm_gated
        mamba_ssm.ops.triton.ssd_combined mamba_ssm.ops.triton.selective_state_update hydra.modules.ops timm
        timm.layers timm.models timm.models.layers timm.models.registry timm.models.vision_transformer fvcore
        fvcore.nn fla fla.models fla.modules fla.ops fla.ops.gla fla.ops.gla.chunk_fuse
        fla.modules.activations causal_conv1d causal_conv1d.causal_conv1d_interface fla.modules.rotary
        fla.ops.gla.recurrent_fuse models.mamba_util mamba_util"""
    for name in names.split():
        sys.modules[name] = Stand(name)
        vars(sys.modules[name]).update(given)


def layer(folder: Path, module: str, cls: str, **args) -> nn.Module:
    """Their class, and new weights away from special values."""
    package, name = module.split(".")
    sys.modules[package] = types.ModuleType(package)
    sys.modules[package].__path__ = [str(folder)]
    sys.modules.pop(module, None)
    torch.manual_seed(0)
    made = getattr(importlib.import_module(module), cls)(**args)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made.train()


def main(folder: Path) -> None:
    stand_in(
        mamba_chunk_scan_combined=ssd,
        RMSNorm=GatedNorm,
        register_model=lambda f: f,
        fused_recurrent_gla=gla,
    )
    x = torch.randn(2, STEPS, WIDTH, generator=torch.Generator().manual_seed(1))

    def save(name, package, commit, made, y, **args):
        assert y.shape == x.shape
        path = Path(__file__).parent / f"{name}.safetensors"
        golden.save(path, x, y, dict(made.named_parameters()), {}, args, f"github.com/{package}", commit)

    theirs = layer(
        folder / "hydra/hydra/modules",
        "modules.hydra",
        "Hydra",
        d_model=WIDTH,
        d_state=4,
        headdim=8,
        ngroups=2,
    )
    save("hydra", "goombalab/hydra", "55bef74", theirs, theirs(x), num_heads=4, num_states=4, num_groups=2)

    theirs = layer(
        folder / "VSSD/classification/models", "models.mamba2", "Mamba2",
        d_model=WIDTH, d_state=4, headdim=8, linear_attn_duality=True,
    )  # fmt: skip
    y = theirs(x, ROWS, COLUMNS)
    save("vssd", "YuHengsss/VSSD", "87b753b", theirs, y, num_heads=4, num_states=4, columns=COLUMNS)

    theirs = layer(
        folder / "EfficientViM/classification/models", "models.EfficientViM", "HSMSSD",
        d_model=WIDTH, ssd_expand=2, state_dim=5,
    )  # fmt: skip
    y = theirs(x.mT)[0].flatten(2).mT
    save("efficientvim", "mlvlab/EfficientViM", "304340c", theirs, y, expand=2, num_states=5, columns=COLUMNS)

    sys.modules["fla.modules"].RMSNorm = nn.RMSNorm
    theirs = layer(
        folder / "ViG/classification/models", "models.vig", "GatedLinearAttention",
        d_model=WIDTH, expand_v=1, expand_k=0.5, num_heads=2, gate_low_rank_dim=4, mode="fused_recurrent",
    )  # fmt: skip
    y = theirs(x, token_position=None, patch_resolution=(ROWS, COLUMNS))
    save("vig", "hustvl/ViG", "dfb9d32", theirs, y, num_heads=2, rank=4, columns=COLUMNS, eps=1e-5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
