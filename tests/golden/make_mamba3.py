"""Golden numbers of mamba3 from the step-by-step definitions that the authors test their kernels with, in
float32 on the CPU; the layer around them, which runs on GPUs only, is done here.

python tests/golden/make_mamba3.py MAMBA
    # MAMBA: a checkout of github.com/state-spaces/mamba at e9594ce1
    # pip install einops==0.8.2, with torch 2.13.0
"""

import ast
import math
import sys
from pathlib import Path
from typing import Optional

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

from riverrun.testing import golden

FOLDER = Path(__file__).parent
WIDTH, STEPS, HEADS, GROUPS, STATES, ANGLES = 16, 40, 4, 2, 6, 2
COMMIT = "e9594ce1"


def definition(path: Path, name: str):
    """One function of a file whose imports need a GPU."""
    found = next(n for n in ast.parse(path.read_text()).body if getattr(n, "name", "") == name)
    space = dict(
        torch=torch, F=F, math=math, rearrange=rearrange, repeat=repeat, Optional=Optional, Tuple=tuple
    )
    exec(compile(ast.Module([found], []), str(path), "exec"), space)
    return space[name]


def main(mamba: Path, rank: int) -> None:
    E, P = 2 * WIDTH, 2 * WIDTH // HEADS
    sizes = [E, E, rank * GROUPS * STATES, rank * GROUPS * STATES, HEADS, HEADS, HEADS, ANGLES]
    w = {
        "in_proj": torch.randn(sum(sizes), WIDTH) * WIDTH**-0.5,
        "dt_bias": torch.randn(HEADS) - 1,
        "B_norm": torch.randn(STATES),
        "C_norm": torch.randn(STATES),
        "B_bias": torch.randn(HEADS, rank, STATES),
        "C_bias": torch.randn(HEADS, rank, STATES),
        "D": torch.randn(HEADS),
        "out_proj": torch.randn(WIDTH, E) * E**-0.5,
    }
    w |= {f"mimo_{i}": torch.randn(HEADS, rank, P) for i in "xzo"} if rank > 1 else {}
    x = torch.randn(2, STEPS, WIDTH)
    z, u, B, C, dt, a, trap, angles = (x @ w["in_proj"].T).split(sizes, -1)
    z, u = (p.unflatten(-1, (HEADS, P)) for p in (z, u))
    B, C = (p.unflatten(-1, (rank, GROUPS, STATES)) for p in (B, C))
    B, C = (w[f"{n}_norm"] * F.rms_norm(p, (STATES,), eps=1e-5) for n, p in (("B", B), ("C", C)))
    dt = F.softplus(dt + w["dt_bias"])
    dta, dt, trap = (p.mT for p in (-F.softplus(a).clamp_min(1e-4) * dt, dt, trap))
    given = dict(
        ADT=dta, DT=dt, Trap=trap, Angles=angles[:, :, None].expand(-1, -1, HEADS, -1), V=u, Z=z, D=w["D"]
    )
    if rank > 1:
        step = definition(mamba / "tests/ops/tilelang/test_mamba3_mimo.py", "mamba3_MIMO_step_ref")
        ranks = dict(MIMO_V=w["mimo_x"], MIMO_O=w["mimo_o"], MIMO_Z=w["mimo_z"])
        y, state = step(Q=C, K=B, Q_bias=w["C_bias"], K_bias=w["B_bias"], **ranks, **given)
    else:
        step = definition(mamba / "tests/ops/triton/test_mamba3_siso.py", "mamba3_siso_step_ref")
        biases = dict(Q_bias=w["C_bias"][:, 0], K_bias=w["B_bias"][:, 0])
        y, state = step(Q=C[:, :, 0], K=B[:, :, 0], **biases, **given)
        state = (*state[:2], *(s[:, :, None] for s in state[2:]))
    state = dict(zip(("angle", "S", "k", "v"), state, strict=True))
    state["angle"] = state["angle"].remainder(2 * math.pi)
    args = dict(num_heads=HEADS, num_states=STATES, num_groups=GROUPS, rank=rank, turning=2 * ANGLES / STATES)
    name = "mamba3" if rank == 1 else "variants/mamba3_mimo"
    source = "the tests of state-spaces/mamba", COMMIT
    golden.save(FOLDER / f"{name}.safetensors", x, y.flatten(2) @ w["out_proj"].T, w, state, args, *source)


if __name__ == "__main__":
    torch.manual_seed(0)
    for rank in (1, 3):
        main(Path(sys.argv[1]), rank)
