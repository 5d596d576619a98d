"""Strategies for damaged bytes, odd texts and random contents, shared by all kinds of input."""

from __future__ import annotations

import copy
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, integers
from hypothesis.strategies import sampled_from as one

Draw = Callable[[SearchStrategy[Any]], Any]

# Bytes that are no UTF-8, each wrong in another way.
NOT_UTF8 = (
    *(b"\xff\xfe", b"\xc3\x28", b"\xe2\x82", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"),
)
# A text with brackets enough to exhaust a parser's stack.
DEEP_JSON = b"[" * 200_000
# Contents of a JSON file that hold no object.
NO_OBJECT = (b"", b"{", b"[]", b"3", b"null", b'"x"', DEEP_JSON, *NOT_UTF8)
# Values that stand where another kind of value, or one of another size, is expected.
ODD = [None, True, -1, 0, 3, 1.5, float("nan"), 10**9, 10**30, [], [None], {}, {"a": 1}, "", "text"]
ODD += ["9" * 50, " ", "\ud800", "a\0b", "x" * 5000, "../x", "/etc/hostname", ".", "\u2028"]
_WORDS = ("dog", "café", "犬", "a red car", "x", "größe", "🐕", "1 2", "é")

seeds = integers(0, 2**32 - 1)


def noise(most: int, least: int = 0) -> SearchStrategy[bytes]:
    """Random bytes; drawn as a seed and a length, so that long ones are cheap to draw."""
    return st.builds(lambda s, n: random.Random(s).randbytes(n), seeds, integers(least, most))


def words(most: int = 12) -> SearchStrategy[str]:
    """Printable words of several scripts, on one line, not blank."""
    return st.lists(one(_WORDS), min_size=1, max_size=most).map(" ".join)


def flipped(data: bytes, most: int = 8) -> SearchStrategy[bytes]:
    """Some bits inverted, at least one."""

    def flip(bits: set[int]) -> bytes:
        changed = bytearray(data)
        for bit in bits:
            changed[bit // 8] ^= 1 << bit % 8
        return bytes(changed)

    return st.sets(integers(0, 8 * len(data) - 1), min_size=1, max_size=most).map(flip)


def cut(data: bytes) -> SearchStrategy[bytes]:
    """The beginning, of any length that is shorter."""
    return integers(0, len(data) - 1).map(lambda size: data[:size])


def damaged(data: bytes) -> SearchStrategy[bytes]:
    """Any damage to a whole file; at times the bytes stay as they are."""
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


@st.composite
def changed_json(draw: Draw, value: Any) -> Any:
    """A JSON value in which one node is removed, or replaced by an odd value or another node."""
    value = copy.deepcopy(value)
    nodes = list(_nodes(value))
    container, key = nodes[draw(integers(0, len(nodes) - 1))]
    form = draw(integers(0, 3))
    if form == 0:
        del container[key]
    elif form == 1:
        other, other_key = nodes[draw(integers(0, len(nodes) - 1))]
        container[key] = copy.deepcopy(other[other_key])
    else:
        container[key] = draw(one(ODD))
    return value


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Container and key of every node below a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _nodes(value[key])


@st.composite
def changed_text(draw: Draw, data: bytes) -> bytes:
    """A text file in which one line is removed, doubled, replaced, or has another field."""
    lines = data.split(b"\n")
    number = draw(integers(0, len(lines) - 1))
    odd = [b"", b"x", b"-1", b"0", b"3", b"1.5", b"9" * 30, b"9" * 5000, b"\0", b"{}", *NOT_UTF8]
    fields = lines[number].split(b"\t")
    fields[draw(integers(0, len(fields) - 1))] = draw(one(odd))
    lines[number : number + 1] = draw(
        one([[], [lines[number]] * 2, [b"\t".join(fields)], [b"\t".join(fields[::-1])]])
    )
    return b"\n".join(lines)


def damage_folder(draw: Draw, folder: pathlib.Path) -> list[pathlib.Path]:
    """Damages some files of a folder, or all: bytes, lines, nodes of JSON, or whole files.

    Returns:
        The files that are no longer what they were.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    before = {path: path.read_bytes() for path in files}
    some = st.lists(integers(0, len(files) - 1), min_size=1, max_size=3, unique=True)
    for number in draw(some | st.just(range(len(files)))):
        path, data = files[number], before[files[number]]
        form = draw(integers(0, 5))
        if form == 0:
            path.unlink()
        elif form == 1:
            path.write_bytes(draw(one([*NO_OBJECT, *before.values()])))
        elif form == 2 and data:
            path.write_bytes(draw(changed_text(data)))
        elif data[:1] == b"{":
            value = draw(changed_json(json.loads(data)))
            path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
        elif data:
            path.write_bytes(draw(cut(data) if form == 3 else damaged(data)))
    return [path for path in files if not path.exists() or path.read_bytes() != before[path]]
