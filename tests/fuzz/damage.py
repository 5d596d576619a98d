"""Strategies for damaged bytes, odd texts and random contents, shared by all kinds of input."""

from __future__ import annotations

import pathlib
import random
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, integers
from hypothesis.strategies import sampled_from as one

Draw = Callable[[SearchStrategy[Any]], Any]

# Bytes that are invalid UTF-8, each in a different way.
NOT_UTF8 = (
    *(b"\xff\xfe", b"\xc3\x28", b"\xe2\x82", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"),
)
# A text with enough brackets to exhaust a parser's stack.
DEEP_JSON = b"[" * 200_000
# Contents of a JSON file without an object.
NO_OBJECT = (b"", b"{", b"[]", b"3", b"null", b'"x"', DEEP_JSON, *NOT_UTF8)
# Values of an unexpected type or size.
ODD = [None, True, -1, 0, 3, 1.5, float("nan"), 10**9, 10**30, [], [None], {}, {"a": 1}, "", "text"]
ODD += ["9" * 50, " ", "\ud800", "a\0b", "x" * 5000, "../x", "/etc/hostname", ".", "\u2028"]
_WORDS = ("dog", "café", "犬", "a red car", "x", "größe", "🐕", "1 2", "é")

seeds = integers(0, 2**32 - 1)


def noise(most: int, least: int = 0) -> SearchStrategy[bytes]:
    """Returns random bytes, drawn as a seed and a length so that long ones are cheap to draw."""
    return st.builds(lambda s, n: random.Random(s).randbytes(n), seeds, integers(least, most))


def words(most: int = 12) -> SearchStrategy[str]:
    """Returns printable words of several scripts, on one line, not blank."""
    return st.lists(one(_WORDS), min_size=1, max_size=most).map(" ".join)


def flipped(data: bytes, most: int = 8) -> SearchStrategy[bytes]:
    """Inverts one or more bits."""

    def flip(bits: set[int]) -> bytes:
        changed = bytearray(data)
        for bit in bits:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return st.sets(integers(0, 8 * len(data) - 1), min_size=1, max_size=most).map(flip)


def cut(data: bytes) -> SearchStrategy[bytes]:
    """Returns a proper prefix of any length."""
    return integers(0, len(data) - 1).map(lambda size: data[:size])


def damaged(data: bytes) -> SearchStrategy[bytes]:
    """Damages a whole file in any way, or leaves it unchanged."""
    position = integers(0, len(data) - 1)

    def overwrite(start: int, patch: bytes) -> bytes:
        return (data[:start] + patch + data[start + len(patch) :])[: len(data)]

    return st.one_of(
        flipped(data),
        flipped(data, 1),
        flipped(data[:64], 4).map(lambda head: head + data[64:]),
        cut(data),
        st.just(b""),
        noise(64, 1).map(lambda more: data + more),
        st.builds(overwrite, position, noise(16, 16)),
        st.builds(overwrite, position, integers(1, 512).map(bytes)),
        st.builds(lambda start, n: data[:start] + data[start + n :], position, integers(1, 32)),
        noise(512, 1),
    )


def damage_file(draw: Draw, path: pathlib.Path, others: Sequence[pathlib.Path]) -> None:
    """Damages a file in place or removes it, or leaves it unchanged.

    `others` are files of the same kind, one of which may be copied over the file.
    """
    data, rng = path.read_bytes(), random.Random(draw(seeds))
    form = draw(one(["bit", "bits", "cut", "zeros", "swap", "reverse", "gone", "copy"]))
    if form == "gone":
        path.unlink()
        return
    size = rng.randint(1, 1 + len(data) // 4)
    blocks = [data[start : start + size] for start in range(0, len(data), size)] or [b""]
    place, other = rng.choices(range(len(blocks)), k=2)
    if form == "copy" and others:
        data = draw(one(others)).read_bytes()
    elif form in ("bit", "bits") and data:
        data = draw(flipped(data, 1 if form == "bit" else 8))
    elif form == "cut":
        data = data[: rng.randrange(len(data) + 1)]
    elif form == "reverse":
        data = data[::-1]
    elif form == "zeros":
        blocks[place] = bytes(len(blocks[place]))
        data = b"".join(blocks)
    elif form == "swap":
        blocks[place], blocks[other] = blocks[other], blocks[place]
        data = b"".join(blocks)
    path.write_bytes(data)
