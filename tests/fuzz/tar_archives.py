"""Tar archives put together block by block, so that a case knows where each member lies."""

from __future__ import annotations

import json
import tarfile

from tests.fuzz.cases import Draw

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


class Entry:
    """One good pair: its key, its members' bytes, and what must come out."""

    def __init__(self, draw: Draw, key: str):
        self.key = key
        self.image = draw.randbytes(draw.randint(1, 3000))
        self.caption = draw.text()
        self.extension = draw.choice(["jpg", "png", "jpeg", "webp"])
        self.extra = {"url": draw.text(), "score": draw.randint(0, 9)}
        self.value = (self.image, self.caption, self.extra)

    def members(self) -> list[tuple[str, bytes]]:
        """Names and contents, in the archive's order."""
        return [
            (f"{self.key}.{self.extension}", self.image),
            (f"{self.key}.txt", self.caption.encode()),
            (f"{self.key}.json", json.dumps(self.extra).encode()),
        ]

    def blob(self) -> bytes:
        """Its part of an archive."""
        return b"".join(member(name, data) for name, data in self.members())


def member(name: str, data: bytes = b"", size: int | None = None, **fields) -> bytes:
    """Header and contents of one member; `size` is what the header says, where it lies."""
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
    return checksummed(block) + data + bytes(-len(data) % BLOCK)


def checksummed(block: bytearray) -> bytes:
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def odd_members(draw: Draw) -> list[bytes]:
    """Members that a tar may hold and that are no part of any pair."""
    fields = draw.sample(_PAX_FIELDS, draw.randint(1, 4))
    pax = b"".join(pax_record(*field) for field in fields)
    # For all members that follow; a path would be the name of every one of them.
    for_all = b"".join(pax_record(*field) for field in fields if field[0] != b"path")
    return [
        raw_member(b"link.jpg", tarfile.SYMTYPE, b""),
        raw_member(b"hard.jpg", tarfile.LNKTYPE, b""),
        raw_member(b"pipe.png", tarfile.FIFOTYPE, b""),
        raw_member(b"device.png", tarfile.CHRTYPE, b""),
        raw_member(b"folder.jpg/", tarfile.DIRTYPE, b""),
        raw_member(b"volume", b"V", b""),
        raw_member(b"dump", b"D", b"Yfile\0\0"),
        raw_member(b"odd", draw.choice([b"Z", b"7", b"\xff"]), b"something"),
        raw_member(b"", tarfile.REGTYPE, b"no name"),
        raw_member(b".jpg", tarfile.REGTYPE, b"no stem"),
        raw_member(b"README", tarfile.REGTYPE, b"no extension"),
        raw_member(b"video.mp4", tarfile.REGTYPE, b"not ours"),
        raw_member(b"pax", tarfile.XGLTYPE, for_all),
        raw_member(b"pax", tarfile.XHDTYPE, pax) + raw_member(b"n.cfg", b"0", b"text"),
        raw_member(b"././@LongLink", tarfile.GNUTYPE_LONGNAME, b"y" * 4000 + b".cfg\0")
        + raw_member(b"short.cfg", b"0", b"text"),
    ]


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


def pax_record(keyword: bytes, value: bytes) -> bytes:
    body = b" " + keyword + b"=" + value + b"\n"
    size = len(body) + 1
    while len(str(size)) + len(body) != size:
        size = len(str(size)) + len(body)
    return str(size).encode() + body
