"""Archives of packages are read, and tars of pairs are written."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import pathlib
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from diht_jax.storage.files import local_output

_AR_MAGIC, _AR_HEADER_BYTES = b"!<arch>\n", 60
_DEBIAN_FILES = b"data.tar.xz"  # the member of a Debian package that holds what it installs
_CHUNK_BYTES = 2**20
_DAMAGES = (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, zlib.error, EOFError)


class ExamplePair(NamedTuple):
    """A picture with its caption.

    Attributes:
        key: of the pair.
        suffix: of the picture's file, such as ".png".
        image: the encoded picture.
        caption: its text.
        metadata: what is known besides.
    """

    key: str
    suffix: str
    image: bytes
    caption: str
    metadata: Mapping[str, Any]


def read_archive(
    path: pathlib.Path, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of files of an archive, in its order.

    Args:
        path: of a `.tgz` or `.tar.gz`, of a `.whl`, or of a `.deb`.
        is_wanted: says by a name whether the file is read.

    Raises:
        ValueError: the archive is damaged or truncated, or a wanted name leads out of a folder.
    """
    for name, read in _members(path):
        if is_wanted(name):
            if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                raise ValueError(f"{path}: member '{name}' leads out of the archive's folder")
            yield name, read()


def write_pair_tar(path: pathlib.Path, pairs: Iterable[ExamplePair]) -> int:
    """Writes a webdataset and returns its number of pairs; equal pairs give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    with local_output(path) as local, tarfile.open(local, "w") as tar:
        for pair in pairs:
            metadata = {"key": pair.key, "caption": pair.caption, **pair.metadata}
            _add(tar, f"{pair.key}{pair.suffix}", pair.image)
            _add(tar, f"{pair.key}.txt", pair.caption.encode())
            _add(tar, f"{pair.key}.json", json.dumps(metadata).encode())
            number += 1
    return number


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # time and owner stay 0
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _members(path: pathlib.Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Names of an archive's files without a leading `./`, and what reads each."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".whl":
                yield from _zip_members(file)
            elif path.suffix == ".deb":
                _seek_debian_files(file)
                yield from _tar_members(file, lzma.open)
            else:
                yield from _tar_members(file, gzip.open)
    except (*_DAMAGES, gzip.BadGzipFile) as error:
        raise ValueError(
            f"{path}: damaged or truncated ({type(error).__name__}: {error}); delete it, and it "
            "is downloaded again"
        ) from error


def _tar_members(
    file: IO[bytes], decompress: Callable[[IO[bytes]], Any]
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    # tarfile's own decompression of a stream takes one that breaks off for the archive's end.
    with decompress(file) as stream:
        with tarfile.open(fileobj=stream, mode="r|") as members:
            for member in members:
                if member.isfile() and (content := members.extractfile(member)):
                    yield member.name.removeprefix("./"), content.read
        while stream.read(_CHUNK_BYTES):  # up to the checksum at its end
            pass


def _zip_members(file: IO[bytes]) -> Iterator[tuple[str, Callable[[], bytes]]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, lambda info=info: archive.read(info)


def _seek_debian_files(file: IO[bytes]) -> None:
    """Goes to the beginning of a Debian package's files: members of a Unix `ar` archive."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise EOFError("no Debian package")
    while len(header := file.read(_AR_HEADER_BYTES)) == _AR_HEADER_BYTES:
        if header[:16].strip().rstrip(b"/") == _DEBIAN_FILES:
            return
        digits = header[48:58].strip()
        if not digits.isdigit():
            break
        num_bytes = int(digits)
        file.seek(num_bytes + num_bytes % 2, io.SEEK_CUR)
    raise EOFError(f"no {_DEBIAN_FILES.decode()} in it")
