"""Webdataset tars, through `diht_jax.data.readers`: damaged members, headers and archives.

The archives are put together in `tar_archives.py`.
"""

from __future__ import annotations

import gzip
import io
import pathlib
import tarfile
from collections.abc import Sequence

from diht_jax.data.readers import registry
from tests.fuzz.cases import (
    DEEP_JSON,
    ERROR,
    NOT_UTF8,
    SUCCESS,
    Draw,
    Refused,
    attempt,
    judge_entries,
    require,
)
from tests.fuzz.tar_archives import (
    BLOCK,
    END,
    Entry,
    checksummed,
    member,
    odd_members,
    pax_record,
    raw_member,
)

_NAME = "archive.tar"


def entries(draw: Draw) -> list[Entry]:
    """Three to six good pairs."""
    return [Entry(draw, f"{draw.choice(['', 'd/'])}{i:03d}") for i in range(draw.randint(3, 6))]


def read(path: pathlib.Path):
    """Pairs as (key, value), and the counts of what is none."""
    source = registry.open_source(str(path))
    found = [(p.key, (p.image, p.caption, dict(p.metadata))) for p in source]
    return found, source.skipped


def judge(
    folder: pathlib.Path,
    data: bytes,
    good: Sequence[Entry],
    touched: Sequence[str] = (),
    may_fail: bool = True,
) -> str:
    """Reads an archive: all good pairs must come, or an error that names the file."""
    path = folder / _NAME
    path.write_bytes(data)
    result = attempt(lambda: read(path), path)
    if isinstance(result, Refused):
        require(may_fail, f"refused, though all of it can be read: {result.message}")
        return ERROR
    return judge_entries(*result, {entry.key: entry.value for entry in good}, touched)


def _flip_in_member(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    bad = draw.choice(pairs)
    parts = bad.members()
    place = draw.randrange(3)
    parts[place] = parts[place][0], draw.flip(parts[place][1])
    blobs = [b"".join(member(*part) for part in parts) if e is bad else e.blob() for e in pairs]
    rest = [entry for entry in pairs if entry is not bad]
    return judge(folder, b"".join(blobs) + END, rest, [bad.key], may_fail=False)


def _flip_anywhere(draw: Draw, folder: pathlib.Path) -> str:
    """Contents have no checksum: the pair whose part was hit may differ, and no other."""
    pairs = entries(draw)
    blobs = [entry.blob() for entry in pairs]
    place = draw.randrange(len(blobs))
    blobs[place] = draw.flip(blobs[place], 3)
    rest = [entry for entry in pairs if entry is not pairs[place]]
    path = folder / _NAME
    path.write_bytes(b"".join(blobs) + END)
    result = attempt(lambda: read(path), path)
    if isinstance(result, Refused):
        return ERROR
    # A damaged name makes a key of its own.
    rest_values = {entry.key: entry.value for entry in rest}
    return judge_entries(*result, rest_values, [pairs[place].key], may_rename=True)


def _cut_off(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    data = b"".join(entry.blob() for entry in pairs)
    # Up to the first whole block of zeros behind the members, nobody can tell that all is there.
    size = draw.randrange(len(data) + BLOCK)
    outcome = judge(folder, (data + END)[:size], pairs)
    require(outcome == ERROR, f"cut off at {size} of {len(data)} bytes, and nobody noticed")
    return outcome


def _cut_behind_the_end(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    data = b"".join(entry.blob() for entry in pairs)
    size = draw.randrange(len(data) + BLOCK, len(data) + 10 * BLOCK)
    return judge(folder, (data + bytes(20 * BLOCK))[:size], pairs, may_fail=False)


def _hole(draw: Draw, folder: pathlib.Path) -> str:
    """Blocks of zeros in the midst, as an unfinished download leaves them, look like the end."""
    pairs = entries(draw)
    data = bytearray(b"".join(entry.blob() for entry in pairs))
    start = draw.randrange(len(data) // BLOCK) * BLOCK
    length = min(len(data) - start, draw.randint(1, 9) * BLOCK)
    before = bytes(data)
    data[start : start + length] = bytes(length)
    touched, position = [], 0
    for entry in pairs:
        end = position + len(entry.blob())
        if before[position:end] != data[position:end]:
            touched.append(entry.key)
        position = end
    rest = [entry for entry in pairs if entry.key not in touched]
    if not rest and start == 0:
        rest = pairs[:0]
    return judge(folder, bytes(data) + END, rest, touched)


def _concatenated(draw: Draw, folder: pathlib.Path) -> str:
    """`cat a.tar b.tar`: whoever stops at the first end loses the second half."""
    pairs = entries(draw)
    half = len(pairs) // 2
    blobs = [entry.blob() for entry in pairs]
    return judge(folder, b"".join([*blobs[:half], END, *blobs[half:], END]), pairs)


def _damaged_header(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    blobs = [entry.blob() for entry in pairs]
    place = draw.randrange(len(blobs))
    header = draw.flip(blobs[place][:148], 3)
    if sum(header) == sum(blobs[place][:148]):
        header = bytes([header[0] ^ 1]) + header[1:]
    blobs[place] = header + blobs[place][148:]
    outcome = judge(folder, b"".join(blobs) + END, pairs)
    require(outcome == ERROR, "a header with a wrong checksum was accepted")
    return outcome


def _with_odd_members(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    blobs = [entry.blob() for entry in pairs]
    for odd in draw.sample(odd_members(draw), 3):
        blobs.insert(draw.randint(0, len(blobs)), odd)
    path = folder / _NAME
    path.write_bytes(b"".join(blobs) + END)
    result = attempt(lambda: read(path), path)
    if isinstance(result, Refused):
        return ERROR
    found, skipped = result
    known = {entry.key for entry in pairs}
    return judge_entries(
        [pair for pair in found if pair[0] in known],
        skipped,
        {entry.key: entry.value for entry in pairs},
    )


def _names_that_lead_out(draw: Draw, folder: pathlib.Path) -> str:
    inside = folder / "inside"
    inside.mkdir()
    pairs = [
        Entry(draw, key)
        for key in ("../up", f"{folder}/absolute", "a/../../b", "./dot", "x" * 90, "sp ace", "café")
    ]
    draw.shuffle(pairs)
    data = b"".join(entry.blob() for entry in pairs) + END
    outcome = judge(inside, data, pairs, may_fail=False)
    require([p.name for p in folder.iterdir()] == ["inside"], "something was written")
    require([p.name for p in inside.iterdir()] == [_NAME], "something was written")
    return outcome


def _giant_size(draw: Draw, folder: pathlib.Path) -> str:
    """A header that claims more than there is: nothing behind it can be found."""
    pairs = entries(draw)
    blobs = [entry.blob() for entry in pairs]
    size = draw.choice([2**20, 2**28, 2**28 + 1, 2**32, 8**11 - 1, 2**62, 2**70])
    field = b"%011o\0" % size if size < 8**11 else b"\x80" + size.to_bytes(11, "big")
    kind = draw.choice([b"0", b"L", b"K", b"x", b"g", b"S", b"7", b"1"])
    name = draw.choice([b"big.jpg", b"big.txt", b"big.json", b"big.mp4"])
    place = draw.randint(0, len(blobs))
    blobs.insert(place, raw_member(name, kind, b"x" * 600, field))
    path = folder / _NAME
    path.write_bytes(b"".join(blobs) + END)
    require(isinstance(attempt(lambda: read(path), path), Refused), "a size beyond the end")
    return ERROR


def _negative_size(draw: Draw, folder: pathlib.Path) -> str:
    """Whoever follows it goes round in circles."""
    pairs = entries(draw)
    blobs = [entry.blob() for entry in pairs]
    size = -draw.choice([1, 512, 1024, 5000, 2**40])
    kind = draw.choice([b"0", b"L", b"x", b"7"])
    if draw.random() < 0.5:
        field = (256**12 + size).to_bytes(12, "big")
        odd = raw_member(b"minus.mp4", kind, b"x", field)
    else:
        pax = pax_record(b"size", str(size).encode())
        odd = raw_member(b"pax", tarfile.XHDTYPE, pax) + raw_member(b"minus.jpg", b"0", b"x")
    blobs.insert(draw.randint(0, len(blobs)), odd)
    return judge(folder, b"".join(blobs) + END, pairs, ["minus"])


def _sparse(draw: Draw, folder: pathlib.Path) -> str:
    """Members that claim terabytes of zeros, in all formats of GNU tar."""
    pairs = entries(draw)
    blobs = [entry.blob() for entry in pairs]
    size = draw.choice([2**27, 2**28 + 1, 8**11 - 1])
    name = draw.choice([b"huge.jpg", b"huge.txt", b"huge.mp4"])
    form = draw.randrange(4)
    if form == 0:
        block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
        block[:100] = name.ljust(100, b"\0")
        block[156:157] = tarfile.GNUTYPE_SPARSE
        block[386:398] = block[398:410] = b"%011o\0" % draw.choice([0, 8**11 - 1])
        block[482:483] = draw.choice([b"\0", b"\1"])
        block[483:495] = b"%011o\0" % size
        odd = checksummed(block) + draw.choice([b"", draw.randbytes(BLOCK)])
    else:
        fields = [
            (b"GNU.sparse.name", name),
            (b"GNU.sparse.realsize" if form == 3 else b"GNU.sparse.size", b"%d" % size),
        ]
        if form == 1:
            fields.append((b"GNU.sparse.map", draw.choice([b"0,1", b"0,99999999999", b"a,b", b""])))
        elif form == 2:
            fields += [(b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"5")]
        else:
            fields += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
        body = draw.choice([b"1\n0\n5\n", b"99999999\n", b"no number", b"-1\n", b"1\n0\n"])
        odd = raw_member(b"p", tarfile.XHDTYPE, b"".join(pax_record(*f) for f in fields))
        odd += raw_member(b"s.cfg", b"0", body)
    repeats = draw.choice([1, 3, 12])
    blobs.insert(draw.randint(0, len(blobs)), odd * repeats)
    path = folder / _NAME
    path.write_bytes(b"".join(blobs) + END)
    result = attempt(lambda: read(path), path)
    if isinstance(result, Refused):
        return ERROR
    found, skipped = result
    found = [pair for pair in found if pair[0] != "huge"]
    return judge_entries(found, skipped, {entry.key: entry.value for entry in pairs})


def _long_pax(draw: Draw, folder: pathlib.Path) -> str:
    """Extended headers of megabytes, on which a pattern search takes quadratic time."""
    pairs = entries(draw)
    blobs = [entry.blob() for entry in pairs]
    junk = draw.choice([b"1" * 2**20, b"9" * 2**20 + b" a=b\n", draw.randbytes(2**16), b"0 a=b\n"])
    kind = draw.choice([tarfile.XHDTYPE, tarfile.XGLTYPE, b"L", b"K"])
    odd = raw_member(b"pax", kind, junk) + raw_member(b"n.cfg", b"0", b"text")
    blobs.insert(draw.randint(0, len(blobs)), odd)
    return judge(folder, b"".join(blobs) + END, pairs)


def _swapped_members(draw: Draw, folder: pathlib.Path) -> str:
    """Contents under each other's names: text in the jpg, a picture in the txt or the json."""
    pairs = entries(draw)
    bad = draw.choice(pairs)
    names, contents = zip(*bad.members(), strict=True)
    contents = draw.sample(contents, 3)
    parts = list(zip(names, contents, strict=True))
    blobs = [b"".join(member(*part) for part in parts) if e is bad else e.blob() for e in pairs]
    rest = [entry for entry in pairs if entry is not bad]
    return judge(folder, b"".join(blobs) + END, rest, [bad.key], may_fail=False)


def _bad_texts(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    bad = draw.choice(pairs)
    text = draw.choice(
        [*NOT_UTF8, b"", b" \n", b"\0", bad.caption.encode() + draw.choice(NOT_UTF8)]
    )
    note = draw.choice(
        [b"{", b"[]", b"3", DEEP_JSON, b'{"caption": 3}', b'{"a": 1e999, "b": NaN}', b"", *NOT_UTF8]
        + [b'{"a": ' + b"1" * 5000 + b"}", b'{"caption": "\\ud800", "captions": [1, null, "x"]}']
    )
    parts = [bad.members()[0], (f"{bad.key}.txt", text), (f"{bad.key}.json", note)]
    blobs = [b"".join(member(*part) for part in parts) if e is bad else e.blob() for e in pairs]
    rest = [entry for entry in pairs if entry is not bad]
    return judge(folder, b"".join(blobs) + END, rest, [bad.key], may_fail=False)


def _repeated_keys(draw: Draw, folder: pathlib.Path) -> str:
    """The same key again: in a row it is one entry with members twice, later one that is there."""
    pairs = entries(draw)
    bad = draw.choice(pairs)
    blobs = {entry.key: entry.blob() for entry in pairs}
    if draw.random() < 0.5:
        blobs[bad.key] *= 2
        data, rest, touched = (
            b"".join(blobs.values()),
            [e for e in pairs if e is not bad],
            [bad.key],
        )
    else:
        data, rest, touched = b"".join([*blobs.values(), pairs[0].blob()]), pairs, []
    path = folder / _NAME
    path.write_bytes(data + END)
    found, skipped = attempt(lambda: read(path))
    require(skipped == {"duplicate": 1}, f"one duplicate, but the counts are {dict(skipped)}")
    return judge_entries(found, skipped, {e.key: e.value for e in rest}, touched)


def _missing_members(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    bad = draw.choice(pairs)
    parts = draw.sample(bad.members(), draw.randint(1, 2))
    has_image = any(data is bad.image for _, data in parts)
    has_text = any(name.endswith(".txt") for name, _ in parts)
    blobs = [b"".join(member(*part) for part in parts) if e is bad else e.blob() for e in pairs]
    path = folder / _NAME
    path.write_bytes(b"".join(blobs) + END)
    found, skipped = attempt(lambda: read(path))
    expected = {} if has_image and has_text else {"no_caption" if has_image else "no_image": 1}
    require(skipped == expected, f"expected {expected}, got {dict(skipped)}")
    rest = {entry.key: entry.value for entry in pairs if entry is not bad}
    return judge_entries(found, skipped, rest, [bad.key])


def _gzip(draw: Draw, folder: pathlib.Path) -> str:
    """A compressed archive has a checksum: any loss is an error, or everything is there."""
    pairs = entries(draw)
    data = gzip.compress(b"".join(entry.blob() for entry in pairs) + END, mtime=0)
    damaged = draw.damage(data)
    path = folder / f"{_NAME}.gz"
    path.write_bytes(damaged)
    result = attempt(lambda: read(path), path)
    if isinstance(result, Refused):
        return ERROR
    return judge_entries(*result, {entry.key: entry.value for entry in pairs})


def _gzip_bomb(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", compresslevel=1) as file:
        for entry in pairs:
            file.write(entry.blob())
        file.write(raw_member(b"bomb.mp4", b"0", b"", b"%011o\0" % 2**26))
        for _ in range(2**6):
            file.write(bytes(2**20))
        file.write(END)
    path = folder / f"{_NAME}.gz"
    path.write_bytes(buffer.getvalue())
    found, skipped = attempt(lambda: read(path))
    return judge_entries(found, skipped, {entry.key: entry.value for entry in pairs})


def _not_a_tar(draw: Draw, folder: pathlib.Path) -> str:
    data = draw.choice([b"", b"<html>404</html>", draw.randbytes(3000), b"PK\3\4" + bytes(600)])
    outcome = judge(folder, data, [])
    require(outcome == ERROR or not any(data), "this is no tar")
    return outcome


def _undisturbed(draw: Draw, folder: pathlib.Path) -> str:
    pairs = entries(draw)
    outcome = judge(folder, b"".join(entry.blob() for entry in pairs) + END, pairs, may_fail=False)
    require(outcome == SUCCESS, "a good archive")
    return outcome


MUTATIONS = {
    "undisturbed": _undisturbed,
    "bits flipped in a member": _flip_in_member,
    "bits flipped anywhere": _flip_anywhere,
    "cut off": _cut_off,
    "cut off behind the end": _cut_behind_the_end,
    "a hole of zeros": _hole,
    "two archives in a row": _concatenated,
    "damaged header": _damaged_header,
    "odd members": _with_odd_members,
    "names that lead out": _names_that_lead_out,
    "giant sizes": _giant_size,
    "negative sizes": _negative_size,
    "sparse members": _sparse,
    "long pax headers": _long_pax,
    "swapped members": _swapped_members,
    "bad texts": _bad_texts,
    "repeated keys": _repeated_keys,
    "missing members": _missing_members,
    "damaged gzip": _gzip,
    "gzip bomb": _gzip_bomb,
    "no tar at all": _not_a_tar,
}
