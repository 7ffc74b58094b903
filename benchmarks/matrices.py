"""The figure of docs/matrix_view.md: which token sees which, in six mixers at their first weights.

python benchmarks/matrices.py        # writes docs/figures/matrices.png
"""

from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

from riverrun.mixers import build
from riverrun.testing.materialise import materialise

PATH = Path(__file__).parents[1] / "docs" / "figures" / "matrices.png"
WIDTH, STEPS, RESET = 16, 48, 30
FLOOR = 1e-4  # of a matrix's largest entry; what is less is white, as is what is exactly zero
SHOWN = {
    "attention": (dict(num_heads=2), "dense"),
    "mamba2": (dict(num_heads=2, num_states=8), "semiseparable"),
    "gated_deltanet": (dict(num_heads=2), "semiseparable"),
    "sliding_window": (dict(num_heads=2, window=8), "banded"),
    "hydra": (dict(num_heads=2, num_states=8), "quasiseparable"),
    "vssd": (dict(num_heads=2, num_states=8, columns=8), "low rank, and its neighbours"),
}


def picture(name: str, x: torch.Tensor, reset: torch.Tensor) -> torch.Tensor:
    """|M| (T, T), its largest entry 1."""
    torch.manual_seed(0)
    mixer = build(name, WIDTH, **SHOWN[name][0]).double()
    seen = materialise(mixer, x, reset).norm(dim=(2, 4))[0]
    return seen / seen.max()


def main() -> None:
    matplotlib.use("Agg")
    torch.manual_seed(1)
    x, reset = torch.randn(1, STEPS, WIDTH, dtype=torch.float64), torch.zeros(1, STEPS, dtype=torch.bool)
    reset[0, RESET] = True
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    for panel, name in zip(axes.flat, SHOWN, strict=True):
        image = panel.imshow(picture(name, x, reset), norm=LogNorm(FLOOR, 1), cmap="Blues")
        panel.set_title(f"{name}: {SHOWN[name][1]}", fontsize=10)
        panel.set_xticks([0, RESET, STEPS - 1])
        panel.set_yticks([0, RESET, STEPS - 1])
    for panel in axes[:, 0]:
        panel.set_ylabel("output at t")
    for panel in axes[-1]:
        panel.set_xlabel("input at s")
    figure.colorbar(image, ax=axes, shrink=0.6, label="|∂ y[t] / ∂ x[s]|, of its largest")
    PATH.parent.mkdir(exist_ok=True)
    figure.savefig(PATH, dpi=110)


if __name__ == "__main__":
    main()
