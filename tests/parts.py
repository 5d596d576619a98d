"""The files of tests in parts, for machines that share the suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def part_of(files: Sequence[T], part: int, parts: int) -> Sequence[T]:
    """Every `parts`-th file: where the longest are first, all parts take a similar time.

    Args:
        files: all of them.
        part: from 1.
        parts: how many there are.

    Raises:
        ValueError: there is no such part.
    """
    if not 1 <= part <= parts:
        raise ValueError(f"--part: expected 1/{parts} to {parts}/{parts}, got {part}/{parts}")
    return files[part - 1 :: parts]
