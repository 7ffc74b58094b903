"""Generation on disk: one safetensors file with states, and with all that the next draws depend on.

    save("anne.state", run.sequences, model)
    run = Generation(model, tokenizer, resume=load("anne.state", model))    goes on as if it had never ended

The file knows its model by a digest of the configuration and all weights, and is refused by any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from riverrun import state as states
from riverrun.models.language import LanguageModel
from riverrun.state import State

from .stopping import Outlet
from .streams import Stream

KEPT = [f.name for f in fields(Stream) if f.name != "state"]


def digest(model: LanguageModel) -> str:
    """SHA-256 of a model's configuration and weights."""
    sha = hashlib.sha256(repr(model.config).encode())
    for name, x in sorted(model.state_dict().items()):
        sha.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        sha.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save(path: str | Path, sequences: Sequence[Stream], model: LanguageModel) -> None:
    """Write sequences to `path`; what was there stays whole until the new file is."""
    records = [
        {name: getattr(s, name) for name in KEPT} | {"outlet": asdict(s.outlet), "partial": s.partial.hex()}
        for s in sequences
    ]
    states.save(tuple(s.state for s in sequences), path, model=digest(model), sequences=json.dumps(records))


def load(path: str | Path, model: LanguageModel) -> list[Stream]:
    """Read sequences to go on with. Raises ValueError for a damaged file and for another model's."""
    state, metadata = states.load(path)
    if not {"model", "sequences"} <= set(metadata):
        raise ValueError(
            f"{path} holds a state, but not how to go on with it: it was not written by generation"
        )
    if metadata["model"] != digest(model):
        raise ValueError(
            f"{path} is of another model, or of other weights of this one, and only the weights that made a "
            "state can go on with it; give that model, or another file"
        )
    device = next(model.parameters()).device
    try:
        records = json.loads(metadata["sequences"])
        return [restored(r, states.to(part, device)) for r, part in zip(records, state, strict=True)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be gone on with: its record of sequences is damaged ({error})"
        ) from error


def restored(record: dict[str, Any], state: State) -> Stream:
    """A sequence from its JSON record and its state."""
    parsed = {
        "outlet": Outlet(**record["outlet"]),
        "partial": bytes.fromhex(record["partial"]),
        "state": state,
    }
    return Stream(**(record | parsed))
