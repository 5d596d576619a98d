"""The members of a tar, read from front to back, with nothing lost in silence and nothing trusted.

Nothing is ever written to disk, so that no path in an archive can do harm. What the members mean
belongs to the callers.

Python's `tarfile` believes the headers: it reserves whatever size an extended header claims,
searches it with patterns that take quadratic time, goes backwards at a negative size, and takes a
damaged header or a hole of zeros for the end. Each of these is an error here.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator

# Names of 4,096 bytes and some attributes; `tarfile` needs a second to search so many digits.
_MAX_EXTENDED_BYTES = 2**14
_EXTENDED_TYPES = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)
_CHUNK_BYTES = 2**20
# What `tarfile` raises on damaged archives; the last five escape from its parsing of headers.
_BROKEN = (
    *(tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError),
    *(ValueError, OverflowError, IndexError, KeyError, TypeError),
)


def read_members(
    path: str, size_limit: Callable[[str], int | None]
) -> Iterator[tuple[str, bytes | None]]:
    """Yields the ordinary files of an archive, in its order.

    Args:
        path: of the archive, plain or compressed.
        size_limit: of a name, the bytes up to which the contents are wanted; None skips the
            member.

    Returns:
        Names and contents; None in place of contents over the limit.

    Raises:
        ValueError: the archive is damaged, cut off, or goes on behind its end; names it.
        FileNotFoundError: there is none.
    """
    try:
        with tarfile.open(path, "r:*", tarinfo=_BoundedInfo) as tar:
            position = -1
            while (member := tar.next()) is not None:
                tar.members.clear()  # kept for random access, which nobody needs here
                if tar.offset <= position:
                    raise tarfile.ReadError(f"the size of '{member.name}' leads backwards")
                position = tar.offset
                limit = size_limit(member.name) if member.isreg() else None
                if limit is None:
                    continue
                # The size is checked first: a sparse member may claim terabytes of zeros.
                is_wanted = 0 <= member.size <= limit
                yield member.name, tar.extractfile(member).read() if is_wanted else None
            _check_end(tar)
    except FileNotFoundError:
        raise
    except _BROKEN as error:
        raise ValueError(
            f"{path}: the tar archive cannot be read to its end ({type(error).__name__}: {error}); "
            "download or write it again"
        ) from error


class _BoundedInfo(tarfile.TarInfo):
    """A header whose size is checked before `tarfile` acts upon it."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise tarfile.ReadError(f"a member of {info.size} bytes")
        if info.type in _EXTENDED_TYPES and info.size > _MAX_EXTENDED_BYTES:
            raise tarfile.ReadError(
                f"an extended header of {info.size} bytes; at most {_MAX_EXTENDED_BYTES} are read"
            )
        return info


def _check_end(tar: tarfile.TarFile) -> None:
    """Raises if the archive goes on or breaks off here; reads a compressed file to its checksum."""
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"cut off at byte {tar.offset}, where an end marker should be")
    if any(block):
        raise tarfile.ReadError(f"damaged member header at byte {tar.offset}")
    while block:
        block = tar.fileobj.read(_CHUNK_BYTES)
        if block.strip(b"\0"):
            raise tarfile.ReadError(
                f"more data behind the end marker at byte {tar.offset}: a hole in the file, or "
                "archives one after the other, which `tar --concatenate` joins"
            )
