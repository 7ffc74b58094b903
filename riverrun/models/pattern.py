"""Which mixer stands at which depth: one line such as "3 gated_deltanet + 1 attention", repeated."""

from __future__ import annotations

import re

from riverrun.mixers import row


def layers(pattern: str, depth: int) -> list[str]:
    """The mixer's name for each of `depth` layers: the pattern's terms, "COUNT NAME" or "NAME", in turn.

    Raises ValueError for a malformed term, and for a name that is no mixer with the nearest one.
    """
    cycle: list[str] = []
    for term in pattern.split("+"):
        found = re.fullmatch(r"\s*(?:(\d+)\s+)?([A-Za-z_]\w*)\s*", term)
        if not found or found[1] == "0":
            raise ValueError(
                f"pattern '{pattern}': '{term.strip()}' is not of the form 'NAME' or 'COUNT NAME' with a "
                "count of at least 1; terms are joined by '+', as in '3 gated_deltanet + 1 attention'"
            )
        name = found[2]
        if not row(name).causal:
            raise ValueError(
                f"pattern '{pattern}': '{name}' sees the future; a language model needs causal mixers"
            )
        if row(name).state == "none":
            raise ValueError(
                f"pattern '{pattern}': '{name}' keeps no state; a language model needs one to continue from"
            )
        cycle += [name] * int(found[1] or 1)
    return [cycle[i % len(cycle)] for i in range(depth)]
