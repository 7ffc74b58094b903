"""Files and folders that appear whole or not at all: written beside their place, synced, then renamed.

    write(path, data)                    a file, brought to the disk; half of it if the disk is full
    replace(path, data)                  a file that is there whole, or as it was before
    with replacing(folder) as fresh:     the same for a folder that the block fills

Models, checkpoints and states are written by nothing else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write(path: Path, data: bytes) -> None:
    """Write a file and bring it to the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace(path: str | Path, data: bytes) -> None:
    """Write a file; what was there stays until all is written, and if it cannot be."""
    path = Path(path)
    fresh = path.with_name(f".{path.name}.new")
    try:
        write(fresh, data)
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def replacing(folder: str | Path) -> Iterator[Path]:
    """A fresh folder to fill, which takes the place of `folder` when the block ends without an error."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh, old = (folder.with_name(f".{folder.name}.{end}") for end in ("new", "old"))
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        fresh.mkdir()
        yield fresh
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)  # what was there stays
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def sync(folder: Path) -> None:
    """Bring a folder's names to the disk, where the system can."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
