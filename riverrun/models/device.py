"""Where a model runs."""

from __future__ import annotations

import torch


def available(device: str | torch.device) -> torch.device:
    """The device of this name. Raises ValueError if there is none such here, and says what there is."""
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        found = torch.device(device)
    except RuntimeError:
        found = None
    if found is None or (found.type == "cuda" and (found.index or 0) >= len(there) - 1):
        why = "" if torch.version.cuda else f"; this PyTorch, {torch.__version__}, was built without CUDA"
        raise ValueError(f"no device '{device}'; there are {there}{why}")
    return found
