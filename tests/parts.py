"""Splits the test files into parts for machines that share the suite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def part_of(files: Sequence[Any], part: int, parts: int) -> Sequence[Any]:
    """Returns every `parts`-th file; with the longest first, all parts take a similar time.

    Args:
            files: All test files.
            part: Number of the part, from 1.
            parts: Number of parts.

    Raises:
            ValueError: The part does not exist.
    """
    if not 1 <= part <= parts:
        raise ValueError(f"--part: expected 1/{parts} to {parts}/{parts}, got {part}/{parts}")
    return files[part - 1 :: parts]
