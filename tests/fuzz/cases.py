"""What the kinds of input share: seeded damage, and the rules by which a case is judged.

Nothing of the code under test comes in here.
"""

from __future__ import annotations

import dataclasses
import pathlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SUCCESS, ERROR, SKIP = "success", "error", "skip"
OUTCOMES = (SUCCESS, ERROR, SKIP)

# Bytes that are no UTF-8, each wrong in another way.
NOT_UTF8 = (
    b"\xff\xfe",
    b"\xc3\x28",
    b"\xe2\x82",
    b"\xed\xa0\x80",
    b"\xf8\x88\x80\x80\x80",
    b"\x80",
)
# A text with brackets enough to exhaust a parser's stack.
DEEP_JSON = b"[" * 200_000


class WrongError(AssertionError):
    """The code under test did what it must not."""


class Draw(random.Random):
    """The random choices of one case; the same for the same seed, kind and number.

    Attributes:
        number: of the case within its kind.
    """

    def __new__(cls, *_: Any) -> Draw:
        return super().__new__(cls)

    def __init__(self, seed: int, kind: str, number: int):
        super().__init__(f"{seed}/{kind}/{number}")
        self.number = number

    def flip(self, data: bytes, most: int = 8) -> bytes:
        """Some bits inverted, at least one; never the same bytes."""
        changed = bytearray(data)
        while bytes(changed) == data:
            for _ in range(self.randint(1, most)):
                changed[self.randrange(len(changed))] ^= 1 << self.randrange(8)
        return bytes(changed)

    def cut(self, data: bytes) -> bytes:
        """The beginning, of any length that is shorter."""
        return data[: self.randrange(len(data))]

    def text(self, most: int = 12) -> str:
        """Printable words of several scripts, one line, not blank."""
        words = ["dog", "café", "犬", "a red car", "x", "größe", "🐕", "1 2", "é"]
        return " ".join(self.choices(words, k=self.randint(1, most)))

    def damage(self, data: bytes) -> bytes:
        """Any damage to a whole file."""
        kinds: list[Callable[[], bytes]] = [
            lambda: self.flip(data),
            lambda: self.flip(data, 1),
            lambda: self.flip(data[:64], 4) + data[64:],
            lambda: self.cut(data),
            lambda: b"",
            lambda: data + self.randbytes(self.randint(1, 64)),
            lambda: _overwrite(data, self.randrange(len(data)), self.randbytes(16)),
            lambda: _overwrite(data, self.randrange(len(data)), bytes(self.randint(1, 512))),
            lambda: self._without_a_part(data),
            lambda: self.randbytes(self.randint(1, 512)),
        ]
        return self.choice(kinds)()

    def _without_a_part(self, data: bytes) -> bytes:
        start = self.randrange(len(data))
        return data[:start] + data[start + self.randint(1, 32) :]


def _overwrite(data: bytes, start: int, patch: bytes) -> bytes:
    return (data[:start] + patch + data[start + len(patch) :])[: len(data)]


@dataclasses.dataclass(frozen=True)
class Refused:
    """The documented error that came instead of a value."""

    message: str


def attempt(read: Callable[[], Any], *places: str | pathlib.Path) -> Any:
    """What `read` returns, or `Refused` where it raises a ValueError that names a place.

    Args:
        read: calls the code under test.
        places: texts of which the error's message must hold at least one.

    Raises:
        WrongError: the message names none of them.
        Exception: any other class of error, as it came.
    """
    try:
        return read()
    except ValueError as error:
        message = str(error)
        if type(error).__module__ != "builtins" and not type(error).__module__.startswith(
            ("diht_jax.", "data_prep.")
        ):
            raise  # some library's own error that happens to be a ValueError
        if not any(str(place) in message for place in places):
            raise WrongError(
                f"the error names none of {list(map(str, places))}: {message!r}"
            ) from error
        if len(message) > 2000:
            raise WrongError(
                f"an error of {len(message)} characters: {message[:200]!r}..."
            ) from error
        return Refused(message)


def require(condition: bool, message: str) -> None:
    """Judges: raises `WrongError` where the condition does not hold."""
    if not condition:
        raise WrongError(message)


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
