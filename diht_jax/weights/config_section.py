"""One JSON object of another library's config, whose values are checked when they are taken.

What the values mean is known in `settings.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# Far above any model's sizes, and small enough to be multiplied.
_LARGEST_SIZE = 2**24


class ConfigSection:
    """A part of a config.

    Attributes:
        values: the object itself; empty where it is absent.
    """

    def __init__(self, config: Mapping[str, Any], name: str, path: str):
        """Takes the part.

        Args:
            config: holds it.
            name: of the part.
            path: of the file, for messages.

        Raises:
            ValueError: it is no object.
        """
        self.values = config.get(name)
        if self.values is None:
            self.values = {}
        self._path, self._name = path, name
        if not isinstance(self.values, Mapping):
            raise ValueError(f"{path}: {name} is {self.values!r:.80}; expected an object")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; raises ValueError if invalid or out of range."""
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value <= _LARGEST_SIZE:
            raise self._error(name, value, f"an integer from {least} to {_LARGEST_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; raises ValueError if invalid."""
        value = self.values.get(name, default)
        if not is_number(value) or not 0 < value <= _LARGEST_SIZE:
            raise self._error(name, value, "a positive number")
        return value

    def side(self, name: str, default: int | None = None) -> int:
        """Of a square: one number, or the same one several times."""
        value = self.values.get(name, default)
        if isinstance(value, list | tuple) and value:
            if any(side != value[0] for side in value):
                raise self._error(name, value, "equal sides; our pictures and patches are squares")
            return ConfigSection({"": {name: value[0]}}, "", self._path).integer(name)
        return self.integer(name, default)

    def _error(self, name: str, value: Any, expected: str) -> ValueError:
        where = f"{self._name}.{name}" if self._name else name
        return ValueError(f"{self._path}: {where} is {value!r:.80}; expected {expected}")


def is_number(value: Any) -> bool:
    """Whether a value is an int or a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, int) or math.isfinite(value)
