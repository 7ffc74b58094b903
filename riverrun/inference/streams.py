"""Sequences in the making, and how several are begun, gone on with, and run as one batch."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from riverrun.state import State, describe, select, tree_map

from .stopping import Outlet

OVER = ("stop", "end")  # endings after which only a new prompt makes a sequence go on


@dataclass
class Stream:
    """One sequence: all that is needed to go on with it. The state has read everything but `pending`."""

    pending: list[int]  # tokens that the state has not read; the next token is drawn after the last of them
    seed: int = 0
    draws: int = 0
    read: int = 0  # tokens that the state has read
    recent: list[int] = field(default_factory=list)  # the last tokens, for the repetition penalty
    partial: bytes = b""  # the beginning of a character that is not whole yet
    outlet: Outlet = field(default_factory=Outlet)
    state: State = None  # batch axis of size 1
    finished: str = (
        ""  # why its last run ended: "stop", "end" (of the document), "length", "" when it was left
    )


def complete(partial: bytes, new: bytes) -> tuple[str, bytes]:
    """The characters that are whole, with U+FFFD for what is not UTF-8, and the bytes that wait for more."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(partial + new)
    return text, decoder.getstate()[0]


def begin(prompts: list[list[int]], first: int) -> list[Stream]:
    """A new sequence for each tokenized prompt, begun with the token `first`, as every document is."""
    if not prompts:
        raise ValueError("there is no prompt; give at least one, or a saved state to go on from")
    return [Stream(pending=[first, *tokens], recent=list(tokens)) for tokens in prompts]


def go_on(saved: Sequence[Stream], prompts: list[list[int]] | None) -> list[Stream]:
    """Copies of saved sequences, each followed by its tokenized prompt, if there are prompts.

    Without one, a sequence that stopped or came to its end stays there, as it would have in a longer run.
    """
    prompts = [[]] * len(saved) if prompts is None else prompts
    if len(prompts) != len(saved):
        raise ValueError(
            f"{len(prompts)} prompts for a saved state of {len(saved)} sequences; give as many, or none"
        )
    if all(s.finished in OVER and not new for s, new in zip(saved, prompts, strict=True)):
        raise ValueError(
            "every saved sequence has ended, at a stop string or its document's end; give prompts to follow"
        )
    return [
        follow(s, new) if new else replace(s, outlet=replace(s.outlet))
        for s, new in zip(saved, prompts, strict=True)
    ]


def follow(s: Stream, new: list[int]) -> Stream:
    """A copy of a sequence with something new to read."""
    return replace(
        s, pending=s.pending + new, recent=s.recent + new, outlet=Outlet(), partial=b"", finished=""
    )


def assign(seeds: int | Sequence[int], streams: list[Stream]) -> None:
    """Give each sequence its seed; one number is everybody's."""
    each = [seeds] * len(streams) if isinstance(seeds, int) else list(seeds)
    if len(each) != len(streams):
        raise ValueError(f"{len(each)} seeds for {len(streams)} sequences; give one, or one for each")
    for s, seed in zip(streams, each, strict=True):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed = {seed}; it must be a whole number from 0 to 2^64 - 1")
        s.seed = seed


def together(streams: list[Stream]) -> list[list[Stream]]:
    """Sequences grouped by the shapes of their states: each group can be run as one batch."""
    groups: dict[str, list[Stream]] = {}
    for s in streams:
        groups.setdefault(describe(s.state), []).append(s)
    return list(groups.values())


def join(streams: list[Stream]) -> State:
    """The states of sequences that run together, as one."""
    first, *rest = [s.state for s in streams]
    return tree_map(lambda *x: torch.cat(x), first, *rest) if rest else first


def settle(streams: list[Stream], state: State, which: Iterable[int] | None = None) -> None:
    """Give sequences, all or some, their parts of a batch's state, in memory of their own."""
    for i in range(len(streams)) if which is None else which:
        streams[i].state = select(state, [i])
