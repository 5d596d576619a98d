"""Archives of packages are read, and tars of pairs are written."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from diht_jax.storage.files import local_output

_AR_HEADER_BYTES = 60
_DEBIAN_FILES = b"data.tar.xz"  # the member of a Debian package that holds what it installs


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
    """Yields name, without a leading `./`, and content of wanted files of a .tgz, .whl or .deb."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in filter(is_wanted, archive.namelist()):
                yield name, archive.read(name)
        return
    with open(path, "rb") as file:
        if path.suffix == ".deb":
            _seek_debian_files(file)
        with tarfile.open(fileobj=file, mode="r|*") as members:
            for member in filter(tarfile.TarInfo.isfile, members):  # no links
                name = member.name.removeprefix("./")
                if is_wanted(name) and (content := members.extractfile(member)):
                    yield name, content.read()


def _seek_debian_files(file: IO[bytes]) -> None:
    """Goes to the beginning of a Debian package's files: members of a Unix `ar` archive."""
    file.seek(len(b"!<arch>\n"))
    while (header := file.read(_AR_HEADER_BYTES))[:16].strip().rstrip(b"/") != _DEBIAN_FILES:
        num_bytes = int(header[48:58])
        file.seek(num_bytes + num_bytes % 2, io.SEEK_CUR)


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
