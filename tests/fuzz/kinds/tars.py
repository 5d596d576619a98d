"""Webdataset tars, through `diht_jax.data.readers`: damaged members, headers and archives."""

from __future__ import annotations

import functools
import gzip
import pathlib
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import integers
from hypothesis.strategies import sampled_from as one

from diht_jax.data.readers import registry
from tests.fuzz.damage import DEEP_JSON, NO_OBJECT, NOT_UTF8, Draw, damaged, flipped, noise
from tests.fuzz.judge import SUCCESS, judge_read, require
from tests.fuzz.kinds import tar_archives as archives
from tests.fuzz.kinds.tar_archives import BLOCK, END, Entry, raw_member

_NAME = "archive.tar"
_BAD_NOTES = [*NO_OBJECT, b'{"caption": 3}', b'{"a": 1e999, "b": NaN}', b'{"a": ' + b"1" * 5000]
_BAD_NOTES += [b'{"a": ' + b"1" * 5000 + b"}", b'{"caption": "\\ud800", "captions": [1, null]}']


def _entries(draw: Draw) -> list[Entry]:
    """Three to six good pairs."""
    count, prefix = draw(integers(3, 6)), draw(one(["", "d/"]))
    return [Entry(draw, f"{prefix}{number:03d}") for number in range(count)]


def _with(draw: Draw, pairs: Sequence[Entry], odd: bytes) -> bytes:
    """The pairs' archive with something put between them, without its end."""
    blobs = [pair.blob() for pair in pairs]
    blobs.insert(draw(integers(0, len(blobs))), odd)
    return b"".join(blobs)


def _judge(
    folder: pathlib.Path,
    data: bytes,
    good: Sequence[Entry],
    touched: Sequence[str] = (),
    ignored: Sequence[str] = (),
    name: str = _NAME,
    **verdict: bool,
) -> str:
    """Reads an archive: all good pairs must come, or an error that names the file."""
    path = folder / name
    path.write_bytes(data)

    def read() -> Any:
        source = registry.open_source(str(path))
        found = [(p.key, (p.image, p.caption, dict(p.metadata))) for p in source]
        return [pair for pair in found if pair[0] not in ignored], source.skipped

    return judge_read(read, path, {e.key: e.value for e in good}, touched, **verdict)


def check_contents(draw: Draw, folder: pathlib.Path) -> str:
    """Contents that are flipped, swapped, no text or no JSON cost their own pair at most."""
    pairs = _entries(draw)
    bad = draw(one(pairs))
    contents, place, form = list(bad.contents), draw(integers(0, 2)), draw(integers(0, 2))
    if form == 0:
        contents[place] = draw(flipped(contents[place]))
    elif form == 1:
        contents = draw(st.permutations(contents))
    else:
        texts = [*NOT_UTF8, b"", b" \n", b"\0", *(contents[1] + end for end in NOT_UTF8)]
        contents[1:] = draw(one(texts)), draw(one(_BAD_NOTES))
    data = b"".join(e.blob(contents=contents) if e is bad else e.blob() for e in pairs)
    rest = [entry for entry in pairs if entry is not bad]
    return _judge(folder, data + END, rest, [bad.key], may_fail=False)


def check_flips_in_a_pair(draw: Draw, folder: pathlib.Path) -> str:
    """Contents have no checksum: the pair that was hit may differ or be renamed, and no other."""
    pairs = _entries(draw)
    bad = draw(one(pairs))
    hit = draw(flipped(bad.blob(), 3))
    data = b"".join(hit if e is bad else e.blob() for e in pairs)
    rest = [entry for entry in pairs if entry is not bad]
    return _judge(folder, data + END, rest, [bad.key], may_rename=True)


def check_cut_off(draw: Draw, folder: pathlib.Path) -> str:
    """Up to the first whole block of zeros behind the members, all could not be there."""
    pairs = _entries(draw)
    data = b"".join(entry.blob() for entry in pairs)
    size = draw(integers(0, len(data) + BLOCK - 1) | integers(len(data), len(data) + 9 * BLOCK))
    is_whole = size >= len(data) + BLOCK
    return _judge(
        folder, (data + END * 5)[:size], pairs, may_fail=not is_whole, must_fail=not is_whole
    )


def check_hole(draw: Draw, folder: pathlib.Path) -> str:
    """Blocks of zeros in the midst, as an unfinished download leaves them, look like the end."""
    pairs = _entries(draw)
    blobs = [entry.blob() for entry in pairs]
    data = bytearray(b"".join(blobs))
    # The last block stays: zeros up to the end are an archive that is shorter, and whole.
    start = draw(integers(0, len(data) // BLOCK - 2)) * BLOCK
    length = min(len(data) - BLOCK - start, draw(integers(1, 9)) * BLOCK)
    data[start : start + length] = bytes(length)
    touched, position = [], 0
    for entry, blob in zip(pairs, blobs, strict=True):
        if data[position : position + len(blob)] != blob:
            touched.append(entry.key)
        position += len(blob)
    rest = [entry for entry in pairs if entry.key not in touched]
    return _judge(folder, bytes(data) + END, rest, touched)


def check_concatenated(draw: Draw, folder: pathlib.Path) -> str:
    """`cat a.tar b.tar`: whoever stops at the first end loses the second half."""
    pairs = _entries(draw)
    return _judge(folder, _with(draw, pairs, END) + END, pairs)


def check_damaged_header(draw: Draw, folder: pathlib.Path) -> str:
    """A header has a checksum, which is the sum of its bytes."""
    pairs = _entries(draw)
    blobs = [entry.blob() for entry in pairs]
    place = draw(integers(0, len(blobs) - 1))
    header = draw(flipped(blobs[place][:148], 3))
    if sum(header) == sum(blobs[place][:148]):
        header = bytes([header[0] ^ 1]) + header[1:]
    blobs[place] = header + blobs[place][148:]
    return _judge(folder, b"".join(blobs) + END, pairs, must_fail=True)


def check_odd_members(draw: Draw, folder: pathlib.Path) -> str:
    """Links, devices, extended headers and names without a stem cost no pair."""
    pairs = _entries(draw)
    odd = draw(st.lists(archives.odd_members(), max_size=3))
    data = _with(draw, pairs, b"".join(odd)) + END
    outcome = _judge(folder, data, pairs, may_fail=bool(odd), may_rename=bool(odd))
    require(bool(odd) or outcome == SUCCESS, "a good archive")
    return outcome


def check_names_that_lead_out(draw: Draw, folder: pathlib.Path) -> str:
    """Members may be named as they like: reading writes nothing."""
    inside = folder / "inside"
    inside.mkdir()
    keys = ["../up", f"{folder}/absolute", "a/../../b", "./dot", "x" * 90, "sp ace", "café"]
    pairs = [Entry(draw, key) for key in draw(st.permutations(keys))]
    data = b"".join(entry.blob() for entry in pairs) + END
    outcome = _judge(inside, data, pairs, may_fail=False)
    require([p.name for p in folder.rglob("*")] == ["inside", _NAME], "something was written")
    return outcome


def check_impossible_sizes(draw: Draw, folder: pathlib.Path) -> str:
    """Behind a size beyond the end nothing can be found; a negative one must not lead back."""
    pairs = _entries(draw)
    is_giant = draw(st.booleans())
    odd = draw(archives.giant_members() if is_giant else archives.negative_members())
    data = _with(draw, pairs, odd) + END
    return _judge(folder, data, pairs, [] if is_giant else ["minus"], must_fail=is_giant)


def check_claims_of_memory(draw: Draw, folder: pathlib.Path) -> str:
    """Sparse members of terabytes, and extended headers of megabytes."""
    pairs = _entries(draw)
    odd = draw(archives.sparse_members() | archives.long_headers())
    return _judge(folder, _with(draw, pairs, odd) + END, pairs, ignored=["huge"])


def check_repeated_keys(draw: Draw, folder: pathlib.Path) -> str:
    """The same key again: in a row it is one entry with members twice, later one that is there."""
    pairs = _entries(draw)
    blobs, bad = [entry.blob() for entry in pairs], draw(one(pairs))
    in_a_row = draw(st.booleans())
    if in_a_row:
        blobs[pairs.index(bad)] *= 2
    else:
        blobs.append(pairs[0].blob())
    rest = [entry for entry in pairs if not in_a_row or entry is not bad]
    _judge(folder, b"".join(blobs) + END, rest, [bad.key] * in_a_row, may_fail=False)
    return _require_skipped(folder, {"duplicate": 1})


def check_missing_members(draw: Draw, folder: pathlib.Path) -> str:
    """A pair without image or caption is skipped, for that reason."""
    pairs = _entries(draw)
    bad = draw(one(pairs))
    members = draw(st.lists(integers(0, 2), min_size=1, max_size=2, unique=True))
    names, contents = ([part[n] for n in members] for part in (bad.names, bad.contents))
    data = b"".join(e.blob(names, contents) if e is bad else e.blob() for e in pairs)
    rest = [entry for entry in pairs if entry is not bad]
    _judge(folder, data + END, rest, [bad.key], may_fail=False)
    reason = "no_caption" if 0 in members else "no_image"
    return _require_skipped(folder, {} if {0, 1} <= set(members) else {reason: 1})


def _require_skipped(folder: pathlib.Path, expected: dict[str, int]) -> str:
    source = registry.open_source(str(folder / _NAME))
    list(source)
    require(source.skipped == expected, f"expected {expected}, got {dict(source.skipped)}")
    return "skip" if expected else SUCCESS


def check_gzip(draw: Draw, folder: pathlib.Path) -> str:
    """A compressed archive has a checksum: any loss is an error, or everything is there."""
    pairs = _entries(draw)
    data = gzip.compress(b"".join(entry.blob() for entry in pairs) + END, mtime=0)
    return _judge(folder, draw(damaged(data)), pairs, name=f"{_NAME}.gz")


def check_gzip_bomb(draw: Draw, folder: pathlib.Path) -> str:
    """A member of another kind that unpacks to 64 MB is skipped, not held."""
    pairs = _entries(draw)
    head, tail = (b"".join(entry.blob() for entry in part) for part in (pairs[:2], pairs[2:]))
    data = gzip.compress(head) + _compressed_bomb() + gzip.compress(tail + END)
    return _judge(folder, data, pairs, name=f"{_NAME}.gz", may_fail=False)


@functools.cache
def _compressed_bomb() -> bytes:
    return gzip.compress(raw_member(b"bomb.mp4", b"0", bytes(2**26)), 1)


def check_no_tar(draw: Draw, folder: pathlib.Path) -> str:
    """Files that are no archive."""
    data = draw(one([b"", b"<html>404</html>", b"PK\3\4" + bytes(600), DEEP_JSON]) | noise(3000, 1))
    return _judge(folder, data, [], must_fail=any(data))
