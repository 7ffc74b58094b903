"""Stop strings in a stream: text goes out once it can no longer belong to one, however it is cut."""

from __future__ import annotations

from dataclasses import dataclass


def release(text: str, stops: tuple[str, ...]) -> tuple[str, str, bool]:
    """Split text into what may go out and what must wait, and say whether a stop string was met.

    What may go out ends before the first stop string; what must wait is the longest end that begins one.
    """
    found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
    if found:
        return text[: min(found)], "", True
    longest = min(len(text), max((len(stop) for stop in stops), default=1) - 1)
    for size in range(longest, 0, -1):
        if any(stop.startswith(text[-size:]) for stop in stops):
            return text[:-size], text[-size:], False
    return text, "", False


@dataclass
class Outlet:
    """The text of one sequence between its tokens and its reader."""

    held: str = ""  # text that may turn out to begin a stop string
    shown: int = 0  # characters of `held` that went out all the same, because a run ended there

    def put(self, text: str, stops: tuple[str, ...]) -> tuple[str, bool]:
        """Add text; what goes out, and whether a stop string was met."""
        out, self.held, stopped = release(self.held + text, stops)
        new, self.shown = out[self.shown :], 0 if stopped else max(0, self.shown - len(out))
        return new, stopped

    def drain(self) -> str:
        """What goes out when a run ends: all. It stays on record, in case the next run completes a stop."""
        new, self.shown = self.held[self.shown :], len(self.held)
        return new
