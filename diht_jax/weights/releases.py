"""Models by name: the one included in the package, DiHT's weights, and some on the hub.

Addresses and SHA-256 sums are those of DiHT's official code (facebookresearch/diht). `source.py`
reads the files.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.resources
import os
import pathlib
import shutil
import urllib.error
import urllib.request

from absl import logging

from diht_jax.config.checks import nearest_name
from diht_jax.storage.locks import lock_file
from diht_jax.terminal import ProgressBar

CACHE_VARIABLE = "DIHT_JAX_CACHE"
WEIGHTS_VARIABLE = "DIHT_JAX_WEIGHTS"

# Folder with `NAME_SHA256.ckpt` for each release.
ADDRESS = "https://dl.fbaipublicfiles.com/diht"
_ADVICE = f"without a network, download it elsewhere and name the file in {WEIGHTS_VARIABLE}"
_LOCAL_SUFFIXES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
_CHUNK_BYTES = 2**20
_TIMEOUT_SECS = 60
_MOST_ATTEMPTS = 3


# The SHA-256 of each published weight file, in hex.
RELEASES: dict[str, str] = {
    "diht_vitb32_224px": "0cee3cbdf80edc3a9b3add0a913eb0f293839d807423ae1eb6dfe57be3550586",
    "diht_vitb16_224px": "d2f68609e5d0469c824cd16353375cf7c47b468666fdfcd8baecf06705e4a6f0",
    "diht_vitl14_224px": "eaf1e498d0a40aef206329a2d5753f3d479f550d72631e26f89f67878d06afa8",
    "diht_vitl14_336px": "4864afccc0f28d5bbc24444672789cfe23320ada5980b730c915defcebe52e4c",
}

# Models of the Hugging Face hub by architecture name.
HUB_MODELS: dict[str, str] = {
    "siglip_vitb16_224px": "hf-hub:google/siglip-base-patch16-224",
    "siglip_so400m14_384px": "hf-hub:google/siglip-so400m-patch14-384",
    "siglip2_vitb16_224px": "hf-hub:google/siglip2-base-patch16-224",
    "siglip2_vitl16_256px": "hf-hub:google/siglip2-large-patch16-256",
    "siglip2_so400m14_384px": "hf-hub:google/siglip2-so400m-patch14-384",
    "pe_core_vitb16_224px": "hf-hub:timm/PE-Core-B-16",
    "pe_core_vitl14_336px": "hf-hub:timm/PE-Core-L-14-336",
    "metaclip2_vith14_224px": "hf-hub:facebook/metaclip-2-worldwide-huge-quickgelu",
    "dfn2b_vitb16_224px": "hf-hub:apple/DFN2B-CLIP-ViT-B-16",
    "dfn2b_vitl14_224px": "hf-hub:apple/DFN2B-CLIP-ViT-L-14",
    "dfn5b_vith14_378px": "hf-hub:apple/DFN5B-CLIP-ViT-H-14-378",
}

# Models included in the package, each a folder of `diht_jax.data`.
CONTAINED = ("clipart_tiny",)


def locate_weights(name: str) -> pathlib.Path:
    """Returns an existing path itself, or the files of a named model, downloaded if needed.

    Raises:
        ValueError: there is no such path or model.
    """
    if os.path.exists(name):
        return pathlib.Path(name)
    if name in CONTAINED:
        return pathlib.Path(str(importlib.resources.files("diht_jax.data") / name))
    if name in RELEASES:
        return fetch_release(name)
    nearest = nearest_name(name, (*CONTAINED, *RELEASES, *HUB_MODELS))
    hint = f"; did you mean '{nearest}'?" if nearest else ""
    raise ValueError(
        f"'{name}': no such work directory or weight file, and no model of this name{hint} (with "
        f"the package comes {', '.join(CONTAINED)}; released: {', '.join(RELEASES)}, of which "
        f"{WEIGHTS_VARIABLE} names local files; on the hub: {', '.join(HUB_MODELS)})"
    )


def fetch_release(name: str) -> pathlib.Path:
    """Returns a local file or directory with the weights of the release `name`.

    The environment variable DIHT_JAX_WEIGHTS takes precedence: a weight file or model directory, or
    a directory with `NAME.ckpt`, `NAME.safetensors` or the like, `NAME_SHA256.ckpt` as published,
    or a model directory `NAME`. Otherwise the file is downloaded once into DIHT_JAX_CACHE (by
    default `~/.cache/diht_jax`).

    Raises:
        ValueError: no such file, no connection, or a file with another hash.
    """
    sha256 = RELEASES[name]
    published = f"{name}_{sha256}.ckpt"
    text = os.environ.get(WEIGHTS_VARIABLE)
    if not text:
        cache = pathlib.Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/diht_jax").expanduser()
        download(f"{ADDRESS}/{published}", cache / published, sha256)
        return cache / published
    given = pathlib.Path(text).expanduser()
    if not given.exists():
        raise ValueError(f"{WEIGHTS_VARIABLE}={given}: no such file or directory")
    names = (published, name, *(f"{name}{suffix}" for suffix in _LOCAL_SUFFIXES))
    # Any other directory is treated as a model directory; `source.py` raises if it is not.
    found = next((given / other for other in names if (given / other).exists()), given)
    if found.name == published and hash_file(found) != sha256:
        raise ValueError(f"{found}: its SHA-256 is not the one in its name; get it again")
    entries = [entry.name for entry in given.iterdir()] if given.is_dir() else []
    if found == given and any(other in entry for entry in entries for other in RELEASES):
        raise ValueError(
            f"{WEIGHTS_VARIABLE}={given}: holds no '{name}'; expected {', '.join(names)}"
        )
    return found


def download(url: str, path: pathlib.Path, sha256: str, *, advice: str = _ADVICE) -> None:
    """Downloads `url` to `path`, unless a file with the right hash exists.

    An interrupted download is resumed, in this call (a few attempts) or a later one: partial data
    stay in `path` with `.part` appended. Only a file with the right hash is ever renamed to
    `path`. Processes that want the same file wait for each other.

    Raises:
        ValueError: the connection failed or was interrupted, or the hash differs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with lock_file(path.with_name(f".{path.name}.lock")):
        if path.exists():
            if hash_file(path) == sha256:
                return
            logging.warning("%s: SHA-256 is not %s; downloading it again", path, sha256)
            path.unlink()
        logging.info("downloading %s to %s", url, path)
        _download_part(url, part, advice)
        found = hash_file(part)
        if found != sha256:
            part.unlink()
            raise ValueError(
                f"{url}: expected SHA-256 {sha256}, got {found}; the download was damaged or the "
                f"file is another one, and it was deleted. Try again; {advice}"
            )
        os.replace(part, path)


def hash_file(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download_part(url: str, part: pathlib.Path, advice: str) -> None:
    """Completes `part`, with a few attempts if the connection breaks off."""
    for _ in range(_MOST_ATTEMPTS):
        have_bytes = part.stat().st_size if part.exists() else 0
        try:
            if _transfer(url, part, have_bytes):
                return
            problem = "the connection was closed early"
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                # Nothing left to send: the part is complete, or not a part of this file.
                return
            raise ValueError(
                f"{url}: the server answered {error.code} {error.reason}; {advice}"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            problem = str(error) or type(error).__name__
        logging.warning("%s: %s", url, problem)
    have_bytes = part.stat().st_size if part.exists() else 0
    raise ValueError(
        f"{url}: {problem}. {have_bytes} bytes are kept in {part} and the next call goes on from "
        f"there; {advice}"
    )


def _transfer(url: str, part: pathlib.Path, have_bytes: int) -> bool:
    """Appends the missing bytes; returns whether the file is complete."""
    headers = {"Range": f"bytes={have_bytes}-"} if have_bytes else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECS) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            have_bytes = 0  # the server sends the whole file
        total_bytes = have_bytes + response.length if response.length is not None else None
        name = url.rpartition("/")[2][:40]
        with (
            open(part, "ab" if have_bytes else "wb") as file,
            ProgressBar.wrapattr(
                file, "write", total=total_bytes, initial=have_bytes, desc=name, dynamic_ncols=True
            ) as progress,
        ):
            shutil.copyfileobj(response, progress, _CHUNK_BYTES)
    return total_bytes is None or part.stat().st_size >= total_bytes
