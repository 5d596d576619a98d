"""Architecture and preprocessing of a model, and checks of the configs that they are read from.

The configs of other libraries are read by `open_clip_config.py` and `huggingface.py`, with the
checks that stand here. A setting that would change what the model computes and that our model does
not have is an error, never ignored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from diht_jax.input.transforms import CLIP_MEAN, CLIP_STD
from diht_jax.models.zoo import Architecture

# Far above any model's sizes, and small enough to be multiplied.
_LARGEST_SIZE = 2**24


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of pictures, after resizing and centre crop (bicubic).

    Attributes:
        mean, std: per channel, for values in [0, 1].
    """

    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD


class ConfigSection:
    """One JSON object of another library's config, whose values are checked when they are taken.

    Attributes:
        values: the object itself; empty where it is absent.
    """

    def __init__(self, values: Any, name: str, path: str):
        """Checks that part `name` ("" for the whole) of the file `path` is an object, or None."""
        self.values = {} if values is None else values
        self._path, self._name = path, name
        if not isinstance(self.values, Mapping):
            raise ValueError(f"{path}: {name or 'config'} is {values!r:.80}; expected an object")

    def section(self, name: str) -> ConfigSection:
        """A part of it by name."""
        return ConfigSection(self.values.get(name), name, self._path)

    def require(self, *names: str) -> None:
        """Raises ValueError if fields are missing."""
        missing = [name for name in names if name not in self.values]
        if missing:
            raise ValueError(
                f"{self._path}: the model config lacks {', '.join(map(repr, missing))}"
            )

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number; raises ValueError if invalid or out of range."""
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value <= _LARGEST_SIZE:
            raise self._error(name, value, f"an integer from {least} to {_LARGEST_SIZE}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; raises ValueError if invalid."""
        value = self.values.get(name, default)
        if not _is_number(value) or not 0 < value <= _LARGEST_SIZE:
            raise self._error(name, value, "a positive number")
        return value

    def side(self, name: str, default: int | None = None) -> int:
        """The side of a square: one number, or the same one several times."""
        value = self.values.get(name, default)
        if isinstance(value, list | tuple) and value:
            if any(side != value[0] for side in value):
                raise self._error(name, value, "equal sides; our pictures and patches are squares")
            return ConfigSection({name: value[0]}, self._name, self._path).integer(name)
        return self.integer(name, default)

    def _error(self, name: str, value: Any, expected: str) -> ValueError:
        where = f"{self._name}.{name}" if self._name else name
        return ValueError(f"{self._path}: {where} is {value!r:.80}; expected {expected}")


def make_architecture(path: str, **fields: Any) -> Architecture:
    """The architecture; an error names the file."""
    fields["vision_heads"] = max(1, fields["vision_heads"])
    try:
        return Architecture(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_preprocessing(
    config: Mapping[str, Any], mean: Any, std: Any, wanted: Mapping[str, Any], path: str
) -> Preprocessing:
    """The preprocessing of another library's config, with CLIP's numbers where some are None.

    Raises:
        ValueError: a setting has another value than the wanted one, which is all that ours has, or
            the numbers are none.
    """
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"{path}: {name}={config[name]!r:.80}; our preprocessing has {value!r} only"
            )
    mean, std = CLIP_MEAN if mean is None else mean, CLIP_STD if std is None else std
    for values in (mean, std):
        is_triple = isinstance(values, list | tuple) and len(values) == 3
        if not is_triple or not all(map(_is_number, values)):
            raise ValueError(f"{path}: expected three means and deviations, got {values!r:.80}")
    if min(std) <= 0:
        raise ValueError(f"{path}: expected positive deviations, got {std}")
    return Preprocessing(tuple(mean), tuple(std))


def only_value(values: set[Any], what: str, path: str) -> Any:
    """The one value of both towers; raises ValueError where they differ."""
    if len(values) != 1:
        raise ValueError(f"{path}: several {what}, {sorted(values)!s:.200}; our model has one")
    return next(iter(values))


def mlp_width_unless_usual(mlp_width: int, width: int) -> int | None:
    """The inner width of the MLPs; None where it is four times the width."""
    return None if mlp_width == 4 * width else mlp_width


def _is_number(value: Any) -> bool:
    is_real = isinstance(value, int | float) and not isinstance(value, bool)
    return is_real and (isinstance(value, int) or math.isfinite(value))
