"""What a run leaves to look at: log.jsonl, a TensorBoard log and the loss curve as a PNG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG, CURVE, BOARD = "log.jsonl", "loss.png", "tensorboard"


class Log:
    """Rows of numbers, in log.jsonl and TensorBoard. A run resumed at `step` drops those after it."""

    def __init__(self, folder: str | Path, step: int = 0):
        # slow to import, and only needed by a run that begins
        from torch.utils.tensorboard import SummaryWriter

        self.path = Path(folder) / LOG
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [row for row in rows(folder) if row["step"] <= step]
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        self.board = SummaryWriter(str(Path(folder) / BOARD), purge_step=step + 1 if step else None)

    def write(self, step: int, **numbers: float) -> None:
        """One row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        self.board.close()


def rows(folder: str | Path) -> list[dict[str, Any]]:
    """Every row of a run's log; a last line that was cut off is left out."""
    path = Path(folder) / LOG
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def curve(folder: str | Path) -> Path | None:
    """Draw bits per byte against tokens read, in training and on held-out text; None without a point."""
    # slow to import, and only needed when a run ends
    from matplotlib.figure import Figure

    found = rows(folder)
    trained = [(r["tokens"] / 1e6, r["bits_per_byte"]) for r in found if "bits_per_byte" in r]
    held = [(r["tokens"] / 1e6, r["held_out"]) for r in found if "held_out" in r]
    if not trained:
        return None
    figure = Figure(figsize=(7, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*trained), color="#9db4c8", linewidth=0.8, label="training")
    axes.plot(*zip(*smooth(trained)), color="#1f4e79", linewidth=1.6, label="training, smoothed")
    if held:
        last = held[-1][1]
        axes.plot(*zip(*held), "o-", color="#c1440e", markersize=4, label=f"held out, at last {last:.3f}")
    levels = [bits for _, bits in trained[len(trained) // 50 :] + held]
    low, high = min(levels), max(levels)
    axes.set_ylim(low - 0.05 * (high - low) - 0.01, high + 0.05 * (high - low) + 0.01)
    axes.set_xlabel("million tokens read")
    axes.set_ylabel("bits per byte")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(Path(folder) / CURVE)
    return Path(folder) / CURVE


def smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A running mean over a twentieth of the points, centred."""
    half = max(1, len(points) // 40)
    means = []
    for i, (x, _) in enumerate(points):
        near = points[max(0, i - half) : i + half + 1]
        means.append((x, sum(y for _, y in near) / len(near)))
    return means
