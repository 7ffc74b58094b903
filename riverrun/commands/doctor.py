"""`riverrun doctor`: every kernel against its definition, on the machine at hand."""

from __future__ import annotations

import json
import os
from dataclasses import asdict

import torch
from rich.console import Console

from riverrun import doctor
from riverrun.kernels import verdicts as store


def run(names: list[str], device: str | None, as_json: bool, jobs: int | None) -> int:
    """Print the verdicts; 1 if one of them is a failure."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if jobs is None and torch.device(device).type == "cuda":  # kernels of a CPU already use its cores
        jobs = os.cpu_count()
    with Console(stderr=True).status("examining") as status:
        found = doctor.run(
            device, names or None, progress=lambda v: status.update(f"{v.op} {v.impl} {v.dtype}"), jobs=jobs
        )
    print(to_json(found) if as_json else report(found, device))
    return exit_code(found)


def report(verdicts: list[doctor.Verdict], device: str) -> str:
    """A table with each worst case at the end of its line, and a count."""
    head = f"{'op':<11}{'impl':<11}{'dtype':<9} {'error':>8} {'bound':>8}  {'verdict':<7}"
    lines = [store.machine(device), f"{head}{'ms':>9}{'first s':>8}  worst"]
    for v in verdicts:
        numbers = f"{'':>17}" if v.verdict == "cannot" else f"{v.error:>8.1e} {v.bound:>8.1e}"
        times = f"{v.best_ms:>9.2f}{v.first_s:>8.2f}"
        lines.append(f"{v.op:<11}{v.impl:<11}{v.dtype:<9} {numbers}  {v.verdict:<7}{times}  {v.where}")
    count = {kind: sum(v.verdict == kind for v in verdicts) for kind in ("pass", "fail", "cannot")}
    return "\n".join([*lines, ", ".join(f"{n} {kind}" for kind, n in count.items())])


def to_json(verdicts: list[doctor.Verdict]) -> str:
    return json.dumps([asdict(v) for v in verdicts], indent=1)


def exit_code(verdicts: list[doctor.Verdict]) -> int:
    """0 if nothing failed, else 1."""
    return int(any(v.verdict == "fail" for v in verdicts))
