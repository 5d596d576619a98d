"""The members of a tar, read from front to back, with nothing lost in silence and nothing trusted.

Nothing is ever written to disk, so that no path in an archive can do harm. What the members mean
belongs to the callers.

Python's `tarfile` believes the headers: it reserves whatever size an extended header claims,
searches it with patterns that take quadratic time, goes backwards at a negative size, and takes a
damaged header or a hole of zeros for the end. Each of these is an error here, and so is an archive
that unpacks to far more than it takes.
"""

from __future__ import annotations

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator

from diht_jax.data.readers.base import ExpansionCheck, ExpansionError
from diht_jax.data.retries import check_failure, open_file

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
        ValueError: the archive is damaged, cut off, goes on behind its end, or unpacks to far more
            than it takes; names it.
        StorageError: it cannot be read, now and after some attempts; names it.
        FileNotFoundError: there is none.
    """
    file = open_file(path)
    try:
        with file, tarfile.open(path, "r:*", fileobj=file, tarinfo=_BoundedInfo) as tar:
            position, expansion, contents = -1, ExpansionCheck(path), ExpansionCheck(path)
            while (member := tar.next()) is not None:
                tar.members.clear()  # kept for random access, which nobody needs here
                if tar.offset <= position:
                    raise tarfile.ReadError(f"the size of '{member.name}' leads backwards")
                position = tar.offset
                if tar.fileobj is not file:  # compressed; `position` is where the contents end
                    expansion.check(position)
                limit = size_limit(member.name) if member.isreg() else None
                if limit is None:
                    continue
                # The size is checked first: a sparse member may claim terabytes of zeros.
                is_wanted = 0 <= member.size <= limit
                contents.add(member.size if is_wanted else 0)
                yield member.name, tar.extractfile(member).read() if is_wanted else None
            _check_end(tar)
    except ExpansionError:
        raise
    except _BROKEN as error:
        check_failure(file)  # the archive itself may be good
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
