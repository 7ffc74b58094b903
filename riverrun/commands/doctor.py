"""`riverrun doctor`: every kernel against its definition, on the machine at hand."""

from __future__ import annotations

from rich.console import Console

from riverrun import doctor


def run(names: list[str], device: str | None, json: bool) -> int:
    """Print the verdicts; 1 if one of them is a failure."""
    with Console(stderr=True).status("examining") as status:
        verdicts = doctor.run(
            device, names or None, progress=lambda v: status.update(f"{v.op} {v.impl} {v.dtype}")
        )
    print(doctor.to_json(verdicts) if json else doctor.report(verdicts, device))
    return doctor.exit_code(verdicts)
