"""The rules that decide whether a case passes."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from diht_jax.evaluation.sources.registry import open_units
from diht_jax.records.schema import Pair

SUCCESS, ERROR, SKIP = "success", "error", "skip"
OUTCOMES = (SUCCESS, ERROR, SKIP)


class WrongError(AssertionError):
    """The code under test broke a rule."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A documented error, in place of a value."""

    message: str
    reason: str | None = None  # None if the error has no reason


def require(condition: bool, message: str) -> None:
    """Raises `WrongError` unless the condition holds."""
    if not condition:
        raise WrongError(message)


def attempt(read: Callable[[], Any], *names: str | pathlib.Path) -> Any:
    """Returns the result of `read`, or `Refused` if it raises a ValueError with one of the names.

    Raises:
        WrongError: the message has none of the names.
        Exception: any other class of error, unchanged.
    """
    try:
        return read()
    except ValueError as error:
        message, module = str(error), type(error).__module__
        if module != "builtins" and not module.startswith(("diht_jax.", "data_prep.")):
            raise  # another library's error that is a subclass of ValueError
        if not any(str(name) in message for name in names):
            text = f"the error names none of {list(map(str, names))}: {message!r}"
            raise WrongError(text) from error
        if len(message) > 2000:
            text = f"an error of {len(message)} characters: {message[:200]!r}..."
            raise WrongError(text) from error
        return Refused(message, getattr(error, "reason", None))


def must_refuse(read: Callable[[], Any], *names: str | pathlib.Path) -> str:
    """Returns the message of the error that `read` must raise."""
    result = attempt(read, *names)
    require(isinstance(result, Refused), f"accepted: {result!r:.200}")
    return ERROR


def judge_entries(
    found: Sequence[Any],
    skipped: Mapping[str, int],
    intact: Mapping[str, Any],
    touched: Sequence[str] = (),
    may_rename: bool = False,
) -> str:
    """Judges the result of a reader that raised no error.

    Args:
        found: (key, value) of every pair that was read, in order.
        skipped: reason -> number of skipped pairs.
        intact: key -> value of every undamaged pair, in order.
        touched: keys of damaged pairs, which may be missing if they are counted, or may differ.
        may_rename: whether keys could be damaged; an unknown key is then a damaged pair.

    Returns:
        SUCCESS or SKIP.
    """
    keys = [key for key, _ in found]
    require(len(set(keys)) == len(keys), f"a pair came twice: {keys}")
    values = dict(found)
    for key, value in intact.items():
        require(key in values, f"the good pair '{key}' is lost; skipped: {dict(skipped)}")
        require(values[key] == value, f"the good pair '{key}' has changed: {values[key]!r:.300}")
    order = [key for key in keys if key in intact]
    require(order == list(intact), "good pairs came in another order")
    extra = [key for key in keys if key not in intact and key not in touched]
    require(may_rename or not extra, f"pairs that nobody wrote: {extra}")
    missing = [key for key in touched if key not in values]
    require(
        sum(skipped.values()) + len(extra) >= len(missing),
        f"{missing} are neither there nor counted: {dict(skipped)}",
    )
    return SKIP if skipped else SUCCESS


def judge_source(
    source: str | pathlib.Path,
    path: pathlib.Path,
    value_of: Callable[[Pair], Any],
    values: Mapping[str, Any],
    *touched: str,
    ignored: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    may_fail: bool = True,
    must_fail: bool = False,
    may_rename: bool = False,
) -> str:
    """Judges the readers' result for a source: all good pairs, or an error that names the path.

    Args:
        source: as a user writes it.
        path: the source's file or folder.
        value_of: the part of a pair that is compared.
        values: key -> value of every pair that was written, in order.
        *touched: keys of the damaged pairs.
        ignored: keys that do not count.
        options: options of the reader.
        may_fail: whether the whole input may be refused.
        must_fail: whether the whole input must be refused.
        may_rename: see `judge_entries`.
    """

    def read() -> Any:
        found, skipped = [], {}
        for entry in open_units(str(source), options or {}).entries():
            if not isinstance(entry, Pair):
                skipped[entry.reason] = skipped.get(entry.reason, 0) + 1
            elif entry.key not in ignored:
                found.append((entry.key, value_of(entry)))
        return found, skipped

    result = attempt(read, path)
    if isinstance(result, Refused):
        require(may_fail, f"refused, though it can be read: {result.message}")
        return ERROR
    require(not must_fail, f"accepted: {result!r:.300}")
    intact = {key: value for key, value in values.items() if key not in touched}
    return judge_entries(*result, intact, touched, may_rename)
