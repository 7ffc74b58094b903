"""Triton kernels: chunked forms on tensor cores, and single-step kernels for decoding. Importing compiles nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

KERNELS: dict[str, Callable[..., Any]] = {}


def refuses(name: str, args: tuple[Tensor | None, ...]) -> str | None:
    """Why the kernel of op `name` cannot run these arguments, or None."""
    return None
