"""A list under the name that callers know; it goes when none is left."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def PackedList(items: Iterable[Any], per_block: int = 0) -> list[Any]:  # noqa: N802
    """The items as a list."""
    return list(items)
