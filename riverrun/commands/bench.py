"""`riverrun bench`: how fast each mixer is on this machine, measured in a minute."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from riverrun import state as states
from riverrun.mixers import MIXERS, build, row
from riverrun.models.device import available

REPEATS, DECODED = 3, 100


def run(names: list[str], width: int, length: int, device: str) -> None:
    """Print for each mixer ms per 1,000 tokens without and with backward, and tokens decoded a second."""
    available(device)
    table = Table(title=f"one sequence of {length:,} steps at width {width}, float32, {place(device)}")
    table.add_column("mixer", no_wrap=True)
    for title in ("forward\nms / 1,000", "and backward\nms / 1,000", "decoded\ntokens / s", "state\nbytes"):
        table.add_column(title, justify="right")
    notes = Console(stderr=True)
    for name in names or [name for name in MIXERS if row(name).causal]:
        with notes.status(f"{name}: the first call of an op may compile it"):
            forward, both, decoded, size = measure(name, width, length, device)
        steps = f"{decoded:,.0f}" if row(name).causal else "-"
        table.add_row(name, f"{forward:.2f}", f"{both:.2f}", steps, f"{size:,}")
    Console().print(table)


def place(device: str) -> str:
    """The device in words, with threads where they count."""
    if device == "cpu":
        return f"CPU, {(n := torch.get_num_threads())} thread{'s' if n > 1 else ''}"
    return torch.cuda.get_device_name(device)


def measure(name: str, width: int, length: int, device: str) -> tuple[float, float, float, int]:
    """Milliseconds per 1,000 tokens without and with backward, tokens decoded a second, bytes of state."""
    torch.manual_seed(0)
    mixer = build(name, width).to(device)
    x = torch.randn(1, length, width, device=device)

    @torch.no_grad()
    def forward() -> states.State:
        return mixer(x)[1]

    def both() -> None:
        mixer.zero_grad(set_to_none=True)
        mixer(x)[0].square().mean().backward()

    state = forward()
    per = 1e6 / length
    decoded = best(lambda: decode(mixer, x[:, :1], state), device)
    return best(forward, device) * per, best(both, device) * per, DECODED / decoded, states.nbytes(state)


@torch.no_grad()
def decode(mixer: nn.Module, x: Tensor, state: states.State) -> None:
    """One step after another."""
    for _ in range(DECODED):
        _, state = mixer(x, state)


def best(f: Callable[[], object], device: str) -> float:
    """Seconds of the fastest of a few calls; the first may compile."""
    taken = []
    for _ in range(REPEATS + 1):
        begun = time.perf_counter()
        f()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return min(taken)
