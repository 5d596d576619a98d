"""The rules by which a case is judged."""

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
    """The code under test did what it must not."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """The documented error that came instead of a value."""

    message: str
    reason: str | None = None  # of those that have one


def require(condition: bool, message: str) -> None:
    """Judges: raises `WrongError` where the condition does not hold."""
    if not condition:
        raise WrongError(message)


def attempt(read: Callable[[], Any], *names: str | pathlib.Path) -> Any:
    """What `read` returns, or `Refused` where it raises a ValueError that holds one of the names.

    Raises:
        WrongError: the message holds none of them.
        Exception: any other class of error, as it came.
    """
    try:
        return read()
    except ValueError as error:
        message, module = str(error), type(error).__module__
        if module != "builtins" and not module.startswith(("diht_jax.", "data_prep.")):
            raise  # some library's own error that happens to be a ValueError
        if not any(str(name) in message for name in names):
            text = f"the error names none of {list(map(str, names))}: {message!r}"
            raise WrongError(text) from error
        if len(message) > 2000:
            text = f"an error of {len(message)} characters: {message[:200]!r}..."
            raise WrongError(text) from error
        return Refused(message, getattr(error, "reason", None))


def must_refuse(read: Callable[[], Any], *names: str | pathlib.Path) -> str:
    """Judges input of which nothing may be accepted: the error must come."""
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
    """Judges what a reader gave in the end, without an error.

    Args:
        found: (key, value) of every pair that came out, in order.
        skipped: reason -> count of what did not.
        intact: key -> value of every pair that was not damaged, in order.
        touched: keys of damaged pairs: these may be missing, if they are counted, or differ.
        may_rename: whether keys could be damaged, so that unknown ones are damaged pairs as well.

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
    """Judges what the readers give of a source: all good pairs, or an error that names the path.

    Args:
        source: as a user names it.
        path: of its file or folder.
        value_of: what a pair is compared by.
        values: key -> value of every pair that was written, in order.
        *touched: keys of those that were damaged.
        ignored: keys that do not count.
        options: of the reader.
        may_fail: whether the input may be refused as a whole.
        must_fail: whether it must be.
        may_rename: as of `judge_entries`.
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
