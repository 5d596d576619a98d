"""Validation of configs: the name and the type of every key."""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags


class TextOrSections:
    """Type of a key that is a text, or a section of named sections that other code checks."""

    expected = "a text or a section of sections"
    kinds: tuple[type, ...] = (str, ml_collections.ConfigDict)
    is_set = True  # by default, to an empty section

    @classmethod
    def check(cls, value: Any) -> None:
        """Raises TypeError for a value of another kind; None is accepted."""
        if value is not None and not isinstance(value, cls.kinds):
            raise TypeError(f"expected {cls.expected}, got {type(value).__name__} {value!r:.200}")


class PathsOrSections(TextOrSections):
    """Type of a key that is a path, a list of paths, or a section of named sections."""

    expected = "a path, a list of paths or a section of sources"
    kinds = (*TextOrSections.kinds, list, tuple)
    is_set = False


class TextOrSectionsReference(ml_collections.FieldReference):
    """A config value that a value of another allowed kind may replace."""

    def set(self, value: Any, type_safe: bool = True) -> None:
        """Sets the value to one of the allowed kinds, or to None."""
        if isinstance(value, dict):
            value = ml_collections.ConfigDict(value)
        self.get_type().check(value)
        super().set(value, type_safe=False)


class _OrNone(flags.ArgumentParser):
    """Parses `--config.KEY=None` as None, and passes other values to another parser."""

    def __init__(self, parse: Callable[[Any], Any]):
        super().__init__()
        self._parse = parse

    def parse(self, argument: Any) -> Any:
        return None if argument == "None" else self._parse(argument)


_PARSERS: dict[type, Callable[[Any], Any]] = {
    int: flags.IntegerParser().parse,
    float: flags.FloatParser().parse,
    bool: flags.BooleanParser().parse,
    str: flags.ArgumentParser().parse,
    TextOrSections: lambda value: value,
    PathsOrSections: lambda value: value,
}
for _kind, _parse in _PARSERS.items():
    config_flags.register_flag_parser_for_type(_kind, _OrNone(_parse))


def validate_config(config: ml_collections.ConfigDict, defaults: ml_collections.ConfigDict) -> None:
    """Checks the names and types of every key of `config` against `defaults`.

    Args:
        config: values of the recipe and the command line.
        defaults: all known keys, except those inside a `TextOrSections`. None is accepted for
            every key except a section, and an int for a float. A default of None without a type
            accepts everything. The elements of a tuple must have the type of those in the
            default, if it has any. NaN is never accepted.

    Raises:
        ValueError: a key is unknown (the message names the nearest one) or has a wrong type.
    """
    known, found = walk(defaults), walk(config)
    check_names(found, defaults)
    for name, (value, _) in found.items():
        if name not in known:  # inside a `TextOrSections`
            continue
        default, expected = known[name]
        if issubclass(expected, TextOrSections):
            try:
                expected.check(value)
            except TypeError as error:
                raise ValueError(f"config key '{name}': {error}") from error
            continue
        if not _matches(value, expected, default):
            such_as = f" (such as {default!r})" if default is not None else ""
            raise ValueError(
                f"config key '{name}': expected {expected.__name__}{such_as:.200}, "
                f"got {type(value).__name__} {value!r:.200}"
            )


def check_names(names: Iterable[str], defaults: ml_collections.ConfigDict) -> None:
    """Raises ValueError for the first dotted name that is not a key, with suggestions.

    Names inside a `TextOrSections` of `defaults` are not checked.
    """
    known = walk(defaults)
    for name in names:
        if name in known:
            continue
        sections = known.keys() & itertools.accumulate(name.split("."), "{}.{}".format)
        if not any(issubclass(known[section][1], TextOrSections) for section in sections):
            raise ValueError(_unknown_key_message(name[:200], list(known)))


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name most similar to `name`, or None if none is similar."""
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def suggest(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message, with the known name that may be meant or all known names."""
    known = list(known)
    nearest = nearest_name(name[:200], known)
    return f"did you mean '{nearest}'?" if nearest else f"known: {', '.join(known)}"


def walk(config: ml_collections.ConfigDict, prefix: str = "") -> dict[str, tuple[Any, type]]:
    """Returns dotted name -> (value, type); an unset key has the type of its placeholder."""
    found = {}
    for key in sorted(config.keys()):
        value, name = config[key], f"{prefix}{key}"
        found[name] = (value, config.get_type(key))
        if isinstance(value, ml_collections.ConfigDict):
            found.update(walk(value, f"{name}."))
    return found


def _unknown_key_message(name: str, known: list[str]) -> str:
    section, _, last = name.rpartition(".")
    # A common error is a correct name in the wrong section: config.beta for config.loss.beta.
    meant = [key for key in known if key.rpartition(".")[2] == last]
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    for candidates in (siblings, known):
        by_last = {key.rpartition(".")[2]: key for key in candidates}
        nearest = None if meant else nearest_name(last, by_last)
        meant = [by_last[nearest]] if nearest else meant
    if meant:
        return f"unknown config key '{name}'; did you mean {' or '.join(map(repr, meant))}?"
    return f"unknown config key '{name}'; known keys: {', '.join(sorted(siblings or known))}"


def _matches(value: Any, expected: type, default: Any = None) -> bool:
    """Returns whether a value has a type, and its elements the only type in the default."""
    if isinstance(value, float) and math.isnan(value):
        return False
    if value is None:
        return not issubclass(expected, ml_collections.ConfigDict)
    if expected is type(None):
        return True
    if bool in (expected, type(value)):
        return isinstance(value, bool) and expected is bool
    if expected is float:
        return isinstance(value, int | float)
    if expected not in (list, tuple):
        return isinstance(value, expected)
    if not isinstance(value, list | tuple):
        return False
    kinds = set(map(type, default or ()))
    for element in value if len(kinds) == 1 else ():
        if element is None or not _matches(element, *kinds):
            return False
    return True


def check_unset(
    config: ml_collections.ConfigDict,
    defaults: ml_collections.ConfigDict,
    optional_keys: Collection[str] = (),
) -> None:
    """Raises ValueError for a key that is None but must be set, since its default is not None."""
    known = walk(defaults)
    for name, (value, _) in walk(config).items():
        default, kind = known.get(name, (None, TextOrSections))  # or inside a section
        is_optional = default is None or issubclass(kind, TextOrSections) or name in optional_keys
        if value is None and not is_optional:
            raise ValueError(
                f"--config.{name}=None: this key cannot be unset; its default is {default!r:.200}"
            )
