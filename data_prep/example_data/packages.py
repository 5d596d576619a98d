"""Downloads and reads files of public package indexes, and writes pairs as webdataset tars."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from diht_jax.storage.files import local_output
from diht_jax.weights.releases import download

NPM_REGISTRY = "https://registry.npmjs.org"
NPM_VARIABLE = "npm_config_registry"  # npm's own variable for an alternative registry
_AR_HEADER_BYTES = 60
_DEBIAN_FILES = b"data.tar.xz"  # member of a Debian package that holds the installed files


@dataclasses.dataclass(frozen=True)
class Package:
    """A file in a package index, with its SHA-256 in hexadecimal."""

    url: str
    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        """Name of the file, the same on every mirror and on disk."""
        return self.url.rpartition("/")[2]


def fetch_package(
    package: Package, folder: pathlib.Path, mirror: str | None = None
) -> pathlib.Path:
    """Returns the local file of a package, and downloads it if it is not in the folder.

    An interrupted download is resumed, now or in a later call. A mirror provides the file under its
    name. Without a mirror, `npm_config_registry` replaces npm's registry if it is set.

    Raises:
        ValueError: the mirror is not a URL, the connection failed, or the file has another
            SHA-256.
    """
    path = folder / package.name
    advice = (
        f"without a network, get {package.url} elsewhere, put it into {folder} (--packages) and "
        "run the same command again"
    )
    download(_address(package, mirror), path, package.sha256, advice=advice)
    return path


def _address(package: Package, mirror: str | None) -> str:
    if mirror is not None:
        if not mirror.startswith(("http://", "https://")):
            raise ValueError(
                f"--mirror={mirror}: expected an address with https:// or http://; a folder on a "
                "disk is named by --packages"
            )
        return f"{mirror.rstrip('/')}/{package.name}"
    registry = os.environ.get(NPM_VARIABLE)
    if registry and package.url.startswith(f"{NPM_REGISTRY}/"):
        return registry.rstrip("/") + package.url.removeprefix(NPM_REGISTRY)
    return package.url


class ExamplePair(NamedTuple):
    """An encoded picture with its caption. The suffix is that of its file, such as ".png"."""

    key: str
    suffix: str
    image: bytes
    caption: str
    metadata: Mapping[str, Any]


def read_archive(
    path: pathlib.Path, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[str, bytes]]:
    """Yields (name without a leading `./`, content) of wanted files in a .tgz, .whl or .deb."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            for name in filter(is_wanted, archive.namelist()):
                yield name, archive.read(name)
        return
    with open(path, "rb") as file:
        if path.suffix == ".deb":
            _seek_debian_files(file)
        with tarfile.open(fileobj=file, mode="r|*") as members:
            for member in filter(tarfile.TarInfo.isfile, members):  # skips links
                name = member.name.removeprefix("./")
                if is_wanted(name) and (content := members.extractfile(member)):
                    yield name, content.read()


def _seek_debian_files(file: IO[bytes]) -> None:
    """Seeks to the installed files in a Debian package, which is a Unix `ar` archive."""
    file.seek(len(b"!<arch>\n"))
    while (header := file.read(_AR_HEADER_BYTES))[:16].strip().rstrip(b"/") != _DEBIAN_FILES:
        num_bytes = int(header[48:58])
        file.seek(num_bytes + num_bytes % 2, io.SEEK_CUR)


def write_pair_tar(path: pathlib.Path, pairs: Iterable[ExamplePair]) -> int:
    """Writes a webdataset and returns the number of pairs. Equal pairs produce equal bytes."""
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
    member = tarfile.TarInfo(name)  # time and owner remain 0, for equal bytes
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
