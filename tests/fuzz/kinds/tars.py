"""Webdataset tars, through `diht_jax.readers`: damaged members, headers and archives.

The archives are assembled block by block, so that a case knows the position of each member.
"""

from __future__ import annotations

import json
import pathlib
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, integers
from hypothesis.strategies import sampled_from as one

from diht_jax.readers import registry
from diht_jax.records.tar_records import TarRecordSource
from tests.fuzz.damage import NO_OBJECT, NOT_UTF8, Draw, flipped, noise, words
from tests.fuzz.judge import Refused, attempt, judge_source, require

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
_PAX_FIELDS = [(b"comment", b"\xff\xfe not text"), (b"comment", b"x" * 500), (b"uid", b"-1")]
_PAX_FIELDS += [(b"mtime", b"not a number"), (b"uname", b"\x80"), (b"SCHILY.xattr.x", b"\0\1\2")]
_PAX_FIELDS += [(b"path", b"elsewhere.cfg"), (b"hdrcharset", b"BINARY"), (b"=", b"=")]
_NAME = "archive.tar"
_BAD_NOTES = [*NO_OBJECT, b'{"caption": 3}', b'{"a": 1e999, "b": NaN}', b'{"a": ' + b"1" * 5000]
_BAD_NOTES += [b'{"a": ' + b"1" * 5000 + b"}", b'{"caption": "\\ud800", "captions": [1, null]}']


class _Entry:
    """One good pair: its key, its members' bytes, and the expected result."""

    def __init__(self, draw: Draw, key: str):
        self.key = key
        image, caption, extra = draw(noise(3000, 1)), draw(words()), {"url": draw(words())}
        self.value = (image, caption, extra)
        extension = draw(one(["jpg", "png", "jpeg", "webp"]))
        self.names = [f"{key}.{extension}", f"{key}.txt", f"{key}.json"]
        self.contents = [image, caption.encode(), json.dumps(extra).encode()]

    def blob(self, names: list[str] | None = None, contents: list[bytes] | None = None) -> bytes:
        """Returns the pair's part of an archive, optionally with other names or contents."""
        parts = zip(names or self.names, contents or self.contents, strict=True)
        return b"".join(member(name, data) for name, data in parts)


def member(name: str, data: bytes) -> bytes:
    """Returns header and contents of one member."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + data + bytes(-len(data) % BLOCK)


def _raw_member(
    name: bytes, kind: bytes, data: bytes, size: bytes = b"", patches: tuple = ()
) -> bytes:
    """Returns a member whose header has arbitrary bytes and a valid checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = (size or b"%011o\0" % len(data))[:12].ljust(12, b"\0")
    block[156:157] = kind
    for start, patch in patches:
        block[start : start + len(patch)] = patch
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + data + bytes(-len(data) % BLOCK)


def _with_pax(fields: list, follower: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    """Returns a member after extended header fields, each a line that starts with its length."""
    lines = b""
    for keyword, value in fields:
        body = b" " + keyword + b"=" + value + b"\n"
        size = len(body) + 1
        while len(str(size)) + len(body) != size:
            size = len(str(size)) + len(body)
        lines += str(size).encode() + body
    return _raw_member(b"pax", kind, lines) + follower


def _odd_members() -> SearchStrategy[bytes]:
    """Returns a valid member that belongs to no pair."""
    kinds = {b"link.jpg": tarfile.SYMTYPE, b"hard.jpg": tarfile.LNKTYPE, b"volume": b"V"}
    kinds |= {b"pipe.png": tarfile.FIFOTYPE, b"device.png": tarfile.CHRTYPE, b"dump": b"D"}
    kinds |= {b"folder.jpg/": tarfile.DIRTYPE, b"odd": b"Z", b"other": b"7", b"last": b"\xff"}
    kinds |= dict.fromkeys((b"", b".jpg", b"README", b"video.mp4"), tarfile.REGTYPE)
    members = [_raw_member(name, kind, b"x" * (kind > b"6")) for name, kind in kinds.items()]
    text = _raw_member(b"n.cfg", b"0", b"text")
    long_name = _raw_member(b"@LongLink", tarfile.GNUTYPE_LONGNAME, b"y" * 4000 + b".cfg\0")
    some = st.lists(one(_PAX_FIELDS), min_size=1, max_size=4, unique=True)
    # For all following members; a path would name every one of them.
    for_all = st.lists(one([f for f in _PAX_FIELDS if f[0] != b"path"]), min_size=1, max_size=4)
    return st.one_of(
        one([*members, long_name + text]),
        some.map(lambda fields: _with_pax(fields, text)),
        for_all.map(lambda fields: _with_pax(fields, b"", tarfile.XGLTYPE)),
    )


def _giant_members() -> SearchStrategy[bytes]:
    """Returns a header with a size beyond the end of the archive."""
    sizes = one([2**20, 2**28, 2**28 + 1, 2**32, 8**11 - 1, 2**62, 2**70])
    fields = sizes.map(lambda n: b"%011o\0" % n if n < 8**11 else b"\x80" + n.to_bytes(11, "big"))
    names = one([b"big.jpg", b"big.txt", b"big.json", b"big.mp4"])
    kinds = one([b"0", b"L", b"K", b"x", b"g", b"S", b"7", b"1"])
    return st.builds(_raw_member, names, kinds, st.just(b"x" * 600), fields)


def _negative_members() -> SearchStrategy[bytes]:
    """Returns a member of negative size: a reader that follows it loops forever."""
    follower = _raw_member(b"minus.jpg", b"0", b"x")
    sizes = one([1, 512, 1024, 5000, 2**40])
    return sizes.map(lambda n: _with_pax([(b"size", b"-%d" % n)], follower)) | st.builds(
        lambda n, k: _raw_member(b"minus.mp4", k, b"x", (256**12 - n).to_bytes(12, "big")),
        sizes,
        one([b"0", b"L", b"x", b"7"]),
    )


@st.composite
def _sparse_members(draw: Draw) -> bytes:
    """Returns members that claim terabytes of zeros, in the old GNU format or in a pax format."""
    size = draw(one([2**27, 2**28 + 1, 8**11 - 1]))
    name = draw(one([b"huge.jpg", b"huge.txt", b"huge.mp4"]))
    if draw(st.booleans()):
        part = b"%011o\0" % draw(one([0, 8**11 - 1]))
        patches = ((386, part * 2), (482, draw(one([b"\0", b"\1"])) + b"%011o\0" % size))
        odd = _raw_member(name, b"S", draw(one([b"", b"\xa5" * BLOCK])), b"%011o\0" % 0, patches)
    else:
        forms = [
            [(b"size", b"%d" % size), (b"map", draw(one([b"0,1", b"0,99999999999", b"a,b", b""])))],
            [(b"size", b"%d" % size), (b"offset", b"0"), (b"numbytes", b"5")],
            [(b"realsize", b"%d" % size), (b"major", b"1"), (b"minor", b"0")],
        ]
        fields = [(b"GNU.sparse." + k, v) for k, v in [(b"name", name), *draw(one(forms))]]
        body = draw(one([b"1\n0\n5\n", b"99999999\n", b"no number", b"-1\n", b"1\n0\n"]))
        odd = _with_pax(fields, _raw_member(b"s.cfg", b"0", body))
    return odd * draw(one([1, 3, 12]))


def _long_headers() -> SearchStrategy[bytes]:
    """Returns extended headers of megabytes, on which a regex search takes quadratic time."""
    junk = one([b"1" * 2**20, b"9" * 2**20 + b" a=b\n", b"\xa5\x31" * 2**15, b"0 a=b\n"])
    kinds = one([tarfile.XHDTYPE, tarfile.XGLTYPE, b"L", b"K"])
    heads = st.builds(_raw_member, st.just(b"pax"), kinds, junk)
    return heads.map(lambda head: head + _raw_member(b"n.cfg", b"0", b"text"))


def _entries(draw: Draw) -> list[_Entry]:
    """Returns three to six good pairs."""
    count, prefix = draw(integers(3, 6)), draw(one(["", "d/", "../", "/tmp/", "./é "]))
    return [_Entry(draw, f"{prefix}{number:03d}") for number in range(count)]


def _judge(
    folder: pathlib.Path,
    data: bytes,
    entries: Sequence[_Entry],
    *touched: str,
    name: str = _NAME,
    **verdict: Any,
) -> str:
    """Reads an archive: all good pairs must come, or an error that names the file."""
    path = folder / name
    path.write_bytes(data)
    values = {entry.key: entry.value for entry in entries}
    value_of = lambda pair: (pair.image, pair.caption, dict(pair.metadata))  # noqa: E731
    outcome = judge_source(path, path, value_of, values, *touched, **verdict)
    if name == _NAME:
        _compare_shard(path)
    require([p.name for p in folder.iterdir()] == [name], "something was written")
    return outcome


def _compare_shard(path: pathlib.Path) -> None:
    """As a record shard, an archive has the pairs of the tar reader, or is refused as well."""

    def read_shard() -> list[Any]:
        source = TarRecordSource(path)
        return [source.decode(source[number]) for number in range(len(source))]

    pairs = attempt(lambda: list(registry.open_source(str(path))), path)
    records = attempt(read_shard, path)
    if isinstance(records, Refused):
        # A global header prevents reading members one by one.
        require(isinstance(pairs, Refused) or "global header" in str(records), "refused as shard")
        return
    pathlib.Path(f"{path}.idx").unlink()
    require(not isinstance(pairs, Refused), "read as a shard, and refused as an archive")
    parts = [[(p.key, p.image, p.caption, p.metadata) for p in found] for found in (pairs, records)]
    require(parts[0] == parts[1], "other records than pairs")


def _bad_pair(
    draw: Draw, folder: pathlib.Path, change: Callable[[Draw, _Entry], bytes], **verdict: bool
) -> str:
    """Judges an archive in which one pair has other bytes."""
    entries = _entries(draw)
    bad = draw(one(entries))
    blob = change(draw, bad)
    data = b"".join(blob if entry is bad else entry.blob() for entry in entries)
    return _judge(folder, data + END, entries, bad.key, **verdict)


def _changed_contents(draw: Draw, bad: _Entry) -> bytes:
    """Returns a pair with flipped or swapped contents, invalid text or JSON, or other members."""
    contents, number = list(bad.contents), draw(integers(0, 2))
    texts = [*NOT_UTF8, b"", b" \n", b"\0", *(contents[1] + end for end in NOT_UTF8)]
    members = draw(st.lists(integers(0, 2), min_size=1, max_size=4, unique=True))
    flip = flipped(contents[number])
    return draw(
        st.one_of(
            flip.map(lambda d: bad.blob(contents=contents[:number] + [d] + contents[number + 1 :])),
            st.permutations(contents).map(lambda c: bad.blob(contents=c)),
            st.tuples(one(texts), one(_BAD_NOTES)).map(
                lambda c: bad.blob(contents=[contents[0], *c])
            ),
            st.just(bad.blob([bad.names[n] for n in members], [contents[n] for n in members])),
            st.just(bad.blob() * 2),
        )
    )


def check_contents(draw: Draw, folder: pathlib.Path) -> str:
    """Bad contents and missing or repeated members cost at most their own pair."""
    return _bad_pair(draw, folder, _changed_contents, may_fail=False)


def check_flips_in_a_pair(draw: Draw, folder: pathlib.Path) -> str:
    """Contents have no checksum: only the damaged pair may differ or be renamed."""
    change = lambda draw, bad: draw(flipped(bad.blob(), 3))  # noqa: E731
    return _bad_pair(draw, folder, change, may_rename=True)


def check_damaged_header(draw: Draw, folder: pathlib.Path) -> str:
    """A header has a checksum, the sum of its bytes, which any flipped bit changes."""
    change = lambda draw, bad: draw(flipped(bad.blob()[:148], 1)) + bad.blob()[148:]  # noqa: E731
    return _bad_pair(draw, folder, change, must_fail=True)


def check_hole(draw: Draw, folder: pathlib.Path) -> str:
    """Zero blocks in the middle, as in an unfinished download, look like the end."""
    entries = _entries(draw)
    blobs = [entry.blob() for entry in entries]
    data = bytearray(b"".join(blobs))
    # The last block stays: zeros up to the end would be a valid, shorter archive.
    start = draw(integers(0, len(data) // BLOCK - 2)) * BLOCK
    length = min(len(data) - BLOCK - start, draw(integers(1, 9)) * BLOCK)
    data[start : start + length] = bytes(length)
    touched, position = [], 0
    for entry, blob in zip(entries, blobs, strict=True):
        if data[position : position + len(blob)] != blob:
            touched.append(entry.key)
        position += len(blob)
    return _judge(folder, bytes(data) + END, entries, *touched)


def check_odd_members(draw: Draw, folder: pathlib.Path) -> str:
    """Odd members between pairs cost no pair, however much memory or time they ask for."""
    harmless = st.lists(_odd_members(), max_size=3).map(b"".join)
    forms = [harmless, _giant_members(), _negative_members(), st.just(END)]
    forms += [_sparse_members(), _long_headers()]
    form = draw(integers(0, len(forms) - 1))
    entries, odd = _entries(draw), draw(forms[form])
    blobs = [entry.blob() for entry in entries]
    blobs.insert(draw(integers(0, len(blobs))), odd)
    verdict = {"may_fail": bool(odd), "must_fail": form == 1, "may_rename": form == 0}
    touched = ["minus"] * (form == 2)
    data = b"".join(blobs) + END
    return _judge(folder, data, entries, *touched, ignored=["huge"], **verdict)
