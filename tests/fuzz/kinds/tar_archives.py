"""Tar archives put together block by block, so that a case knows where each member lies."""

from __future__ import annotations

import json
import tarfile

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy, integers
from hypothesis.strategies import sampled_from as one

from tests.fuzz.damage import Draw, noise, words

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)
_PAX_FIELDS = [
    (b"comment", b"\xff\xfe not text"),
    (b"comment", b"x" * 500),
    (b"mtime", b"not a number"),
    (b"uid", b"-1"),
    (b"uname", b"\x80"),
    (b"SCHILY.xattr.user.x", b"\0\1\2"),
    (b"path", b"elsewhere.cfg"),
    (b"hdrcharset", b"BINARY"),
    (b"=", b"="),
]


class Entry:
    """One good pair: its key, its members' bytes, and what must come out."""

    def __init__(self, draw: Draw, key: str):
        self.key = key
        image, caption = draw(noise(3000, 1)), draw(words())
        extra = {"url": draw(words()), "score": draw(integers(0, 9))}
        self.value = (image, caption, extra)
        self.names = [f"{key}.{draw(one(['jpg', 'png', 'jpeg', 'webp']))}", f"{key}.txt"]
        self.names.append(f"{key}.json")
        self.contents = [image, caption.encode(), json.dumps(extra).encode()]

    def blob(self, names: list[str] | None = None, contents: list[bytes] | None = None) -> bytes:
        """Its part of an archive, with other names or contents where they are given."""
        parts = zip(names or self.names, contents or self.contents, strict=True)
        return b"".join(member(name, data) for name, data in parts)


def member(name: str, data: bytes = b"", size: int | None = None, **fields) -> bytes:
    """Header and contents of one member; `size` is what the header claims, where it is wrong."""
    info = tarfile.TarInfo(name)
    info.size = len(data) if size is None else size
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return header + data + bytes(-len(data) % BLOCK)


def raw_member(name: bytes, kind: bytes, data: bytes, size_field: bytes | None = None) -> bytes:
    """A member with a header of any bytes and a right checksum."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = (size_field or b"%011o\0" % len(data))[:12].ljust(12, b"\0")
    block[156:157] = kind
    return _checksummed(block) + data + bytes(-len(data) % BLOCK)


def _checksummed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def pax_record(keyword: bytes, value: bytes) -> bytes:
    """One line of an extended header, which begins with its own length."""
    body = b" " + keyword + b"=" + value + b"\n"
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size = len(str(size)) + len(body)
    return str(size).encode() + body


@st.composite
def odd_members(draw: Draw) -> bytes:
    """A member that a tar may hold and that is no part of any pair."""
    fields = draw(st.lists(one(_PAX_FIELDS), min_size=1, max_size=4, unique=True))
    pax = b"".join(pax_record(*field) for field in fields)
    # For all members that follow; a path would be the name of every one of them.
    for_all = b"".join(pax_record(*field) for field in fields if field[0] != b"path")
    return draw(
        one(
            [
                raw_member(b"link.jpg", tarfile.SYMTYPE, b""),
                raw_member(b"hard.jpg", tarfile.LNKTYPE, b""),
                raw_member(b"pipe.png", tarfile.FIFOTYPE, b""),
                raw_member(b"device.png", tarfile.CHRTYPE, b""),
                raw_member(b"folder.jpg/", tarfile.DIRTYPE, b""),
                raw_member(b"volume", b"V", b""),
                raw_member(b"dump", b"D", b"Yfile\0\0"),
                *(raw_member(b"odd", kind, b"something") for kind in (b"Z", b"7", b"\xff")),
                raw_member(b"", tarfile.REGTYPE, b"no name"),
                raw_member(b".jpg", tarfile.REGTYPE, b"no stem"),
                raw_member(b"README", tarfile.REGTYPE, b"no extension"),
                raw_member(b"video.mp4", tarfile.REGTYPE, b"not ours"),
                raw_member(b"pax", tarfile.XGLTYPE, for_all),
                raw_member(b"pax", tarfile.XHDTYPE, pax) + raw_member(b"n.cfg", b"0", b"text"),
                raw_member(b"././@LongLink", tarfile.GNUTYPE_LONGNAME, b"y" * 4000 + b".cfg\0")
                + raw_member(b"short.cfg", b"0", b"text"),
            ]
        )
    )


def giant_members() -> SearchStrategy[bytes]:
    """A header that claims more than there is."""
    sizes = one([2**20, 2**28, 2**28 + 1, 2**32, 8**11 - 1, 2**62, 2**70])
    fields = sizes.map(lambda n: b"%011o\0" % n if n < 8**11 else b"\x80" + n.to_bytes(11, "big"))
    names = one([b"big.jpg", b"big.txt", b"big.json", b"big.mp4"])
    kinds = one([b"0", b"L", b"K", b"x", b"g", b"S", b"7", b"1"])
    return st.builds(raw_member, names, kinds, st.just(b"x" * 600), fields)


@st.composite
def negative_members(draw: Draw) -> bytes:
    """A size below zero: whoever follows it goes round in circles."""
    size = -draw(one([1, 512, 1024, 5000, 2**40]))
    if draw(st.booleans()):
        kind = draw(one([b"0", b"L", b"x", b"7"]))
        return raw_member(b"minus.mp4", kind, b"x", (256**12 + size).to_bytes(12, "big"))
    pax = pax_record(b"size", str(size).encode())
    return raw_member(b"pax", tarfile.XHDTYPE, pax) + raw_member(b"minus.jpg", b"0", b"x")


@st.composite
def sparse_members(draw: Draw) -> bytes:
    """Members that claim terabytes of zeros, in all formats of GNU tar."""
    size = draw(one([2**27, 2**28 + 1, 8**11 - 1]))
    name = draw(one([b"huge.jpg", b"huge.txt", b"huge.mp4"]))
    form = draw(integers(0, 3))
    if form == 0:
        block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
        block[:100] = name.ljust(100, b"\0")
        block[156:157] = tarfile.GNUTYPE_SPARSE
        block[386:398] = block[398:410] = b"%011o\0" % draw(one([0, 8**11 - 1]))
        block[482:483] = draw(one([b"\0", b"\1"]))
        block[483:495] = b"%011o\0" % size
        odd = _checksummed(block) + draw(one([b"", b"\xa5" * BLOCK]))
    else:
        fields = [(b"GNU.sparse.name", name)]
        fields.append((b"GNU.sparse." + (b"realsize" if form == 3 else b"size"), b"%d" % size))
        if form == 1:
            fields.append((b"GNU.sparse.map", draw(one([b"0,1", b"0,99999999999", b"a,b", b""]))))
        elif form == 2:
            fields += [(b"GNU.sparse.offset", b"0"), (b"GNU.sparse.numbytes", b"5")]
        else:
            fields += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
        body = draw(one([b"1\n0\n5\n", b"99999999\n", b"no number", b"-1\n", b"1\n0\n"]))
        odd = raw_member(b"p", tarfile.XHDTYPE, b"".join(pax_record(*f) for f in fields))
        odd += raw_member(b"s.cfg", b"0", body)
    return odd * draw(one([1, 3, 12]))


def long_headers() -> SearchStrategy[bytes]:
    """Extended headers of megabytes, on which a pattern search takes quadratic time."""
    junk = one([b"1" * 2**20, b"9" * 2**20 + b" a=b\n", b"\xa5\x31" * 2**15, b"0 a=b\n"])
    kinds = one([tarfile.XHDTYPE, tarfile.XGLTYPE, b"L", b"K"])
    heads = st.builds(raw_member, st.just(b"pax"), kinds, junk)
    return heads.map(lambda head: head + raw_member(b"n.cfg", b"0", b"text"))
