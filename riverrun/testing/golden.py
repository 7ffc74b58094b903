"""Golden numbers: outputs that somebody else's code gave for stored inputs and weights.

A file holds, as float32 tensors, `x`, `y`, the other implementation's weights as `weight.NAME` in its own
layout and its state after the last step as `state.NAME`; and in its metadata `package`, `version` and `args`,
our mixer's arguments as JSON. Laws see every inconsistency and hardly a wrong constant; these numbers do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from riverrun.state import State

from .tolerance import close, close_states

# theirs is float32, ours here float64: some hundred roundings of 6e-8 along their path add up to 1e-6, and an
# eps inside a square root may stand elsewhere, 1e-6 of a squared length near one
BOUND = 1e-5


@dataclass(frozen=True)
class Golden:
    """One file: x and y (B, T, width), the other's weights and last state by its own names, its source."""

    x: Tensor
    y: Tensor
    weights: dict[str, Tensor]
    state: dict[str, Tensor]
    args: dict[str, Any]
    source: str  # package and version

    def check(self, mixer: nn.Module, parameters: Mapping[str, Tensor], state: State = None) -> None:
        """Load `parameters`, all; compare y in one call and, where a state is kept, in two; the state."""
        mixer = mixer.double()
        mixer.load_state_dict({name: p.double() for name, p in parameters.items()})
        x, half = self.x.double(), self.x.shape[1] // 2
        with torch.no_grad():
            y, end = mixer(x)
            close(y, self.y.double(), f"against {self.source}", BOUND)
            if end is not None:
                first, middle = mixer(x[:, :half])
                again = torch.cat([first, mixer(x[:, half:], middle)[0]], 1)
                close(again, self.y.double(), f"in two calls, against {self.source}", BOUND)
        if state is not None:
            close_states(end, state, f"against {self.source}", BOUND)


def load(path: str | Path) -> Golden:
    """Read a file that `save` wrote."""
    with safe_open(str(path), framework="pt") as f:
        tensors, metadata = {name: f.get_tensor(name) for name in f.keys()}, f.metadata()  # noqa: SIM118
    parts: dict[str, dict[str, Tensor]] = {"weight": {}, "state": {}}
    for name, tensor in tensors.items():
        if "." in name:
            kind, rest = name.split(".", 1)
            parts[kind][rest] = tensor
    source = f"{metadata['package']} {metadata['version']}"
    args = json.loads(metadata["args"])
    return Golden(tensors["x"], tensors["y"], parts["weight"], parts["state"], args, source)


def save(
    path: str | Path,
    x: Tensor,
    y: Tensor,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    args: Mapping[str, Any],
    package: str,
    version: str,
) -> None:
    """Write one file; `args` are our mixer's."""
    tensors = {"x": x, "y": y}
    tensors |= {f"weight.{name}": w for name, w in weights.items()}
    tensors |= {f"state.{name}": s for name, s in state.items()}
    metadata = {"package": package, "version": version, "args": json.dumps(dict(args))}
    save_file({k: t.detach().float().contiguous().clone() for k, t in tensors.items()}, str(path), metadata)
