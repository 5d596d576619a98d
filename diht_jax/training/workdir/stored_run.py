"""Layout of a run in an object store: its files, and a manifest for each finished checkpoint.

The store has the files of the work directory under their own names, and `manifests/STEP.json` with
size and CRC32C of a checkpoint's files, written last and removed first: a checkpoint without one
does not count. Writing is `staging`'s.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import time
from typing import Any

import google_crc32c
from absl import logging
from jax.sharding import Mesh

from diht_jax.storage.files import write_bytes
from diht_jax.storage.locks import lock_file
from diht_jax.storage.stores import is_remote, open_system
from diht_jax.training.multihost import share_for
from diht_jax.training.workdir.checkpoint import CHECKPOINT_DIRECTORY
from diht_jax.training.workdir.config_file import CONFIG_FILE

MANIFEST_DIRECTORY = "manifests"
_COPIES = "~/.cache/diht_jax/runs"
_READ_BYTES = 2**22

# A file's path below the checkpoint: its size in bytes and CRC32C.
Manifest = dict[str, tuple[int, int]]


def local_run(
    workdir: str | os.PathLike[str], step: int | None = None, mesh: Mesh | None = None
) -> str:
    """A run that can be read: itself, or a copy of its config and one checkpoint on disk.

    Args:
        workdir: a path or a URL.
        step: which checkpoint; the latest by default, of a job the latest for its first process.
        mesh: devices that the run is read for; the processes of a job that have some of them must
            all call.

    Returns:
        `workdir`, unless it is a URL with manifests; else the copy, in `~/.cache/diht_jax/runs`.
        Orbax reads `gs://` runs without manifests itself.

    Raises:
        ValueError: there is no run or no such checkpoint, or it is damaged; the store cannot be
            read; nothing installed knows such URLs.
    """
    url = os.fspath(workdir)
    if not is_remote(url):
        return url
    system, root = open_system(url.rstrip("/"))

    def read() -> bytes:
        try:
            return json.dumps(read_manifests(system, root)).encode()
        except Exception as error:  # what it is depends on the store
            raise ValueError(f"{url} cannot be read: {error}") from error

    # One that goes on may save and remove checkpoints between the looks of two processes.
    listed = json.loads(share_for(mesh)(read))
    stored = {int(name): _parse_manifest(files) for name, files in listed.items()}
    if not stored and url.startswith("gs://"):
        return url
    if not stored:
        raise ValueError(
            f"{url}: no run of diht_jax.train with a finished checkpoint (it would have "
            f"{MANIFEST_DIRECTORY}/STEP.json)"
        )
    step = max(stored) if step is None else step
    if step not in stored:
        raise ValueError(f"{url}: no checkpoint of step {step}; steps found: {sorted(stored)}")
    checksum = google_crc32c.value(json.dumps(stored[step]).encode())
    folder = copy_folder(url, _COPIES) / f"{step}-{checksum:08x}"
    checkpoints = folder / CHECKPOINT_DIRECTORY
    checkpoints.mkdir(parents=True, exist_ok=True)
    # One of the processes that share this home copies, and the others wait for it.
    with lock_file(folder / ".download.lock"):
        if not (checkpoints / str(step)).exists():
            problem = download_checkpoint(system, root, step, stored[step], checkpoints)
            if problem:
                raise ValueError(f"{url}: the checkpoint of step {step} is damaged: {problem}")
    write_bytes(folder / CONFIG_FILE, system.cat_file(f"{root}/{CONFIG_FILE}"))
    return os.fspath(folder)


def read_manifests(system: Any, root: str) -> dict[int, Manifest]:
    """The finished checkpoints in a store: step to files with size and CRC32C."""
    folder = f"{root}/{MANIFEST_DIRECTORY}"
    found = {}
    for path in find_files(system, folder):
        name = path.rsplit("/", 1)[-1].removesuffix(".json")
        if not name.isdigit():
            continue
        # One that is cut off, where a store does not write whole files, is one not written yet.
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            found[int(name)] = _parse_manifest(json.loads(system.cat_file(path))["files"])
    return found


def _parse_manifest(files: dict[str, Any]) -> Manifest:
    return {name: (int(size), int(crc)) for name, (size, crc) in files.items()}


def make_manifest(folder: pathlib.Path) -> Manifest:
    """Size and CRC32C of each file below a folder, by its path from there."""
    return {
        path.relative_to(folder).as_posix(): (path.stat().st_size, _file_checksum(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def download_checkpoint(
    system: Any, root: str, step: int, manifest: Manifest, checkpoints: pathlib.Path
) -> str | None:
    """Copies one into a folder of checkpoints, where it appears whole or not at all.

    Nobody else may copy the same one there meanwhile.

    Returns:
        What is wrong with it in the store; None where it is as its manifest says.
    """
    target = checkpoints / str(step)
    temporary = checkpoints / f".{step}.download"
    shutil.rmtree(temporary, ignore_errors=True)
    started = time.monotonic()
    try:
        for name in manifest:
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                system.get_file(f"{root}/{CHECKPOINT_DIRECTORY}/{step}/{name}", os.fspath(path))
            except FileNotFoundError:
                return f"{name} is missing"
        found = make_manifest(temporary)
        wrong = sorted(name for name in manifest if found.get(name) != manifest[name])
        if wrong:
            return f"{wrong[0]} is not what was saved"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(size for size, _ in manifest.values())
    logging.info(
        "copied the checkpoint of step %d, %.1f MB in %.0f s",
        step,
        size / 1e6,
        time.monotonic() - started,
    )
    return None


def copy_folder(url: str, parent: str) -> pathlib.Path:
    """The folder below `parent` that stands for a URL, and for no other."""
    url = url.rstrip("/")
    name = f"{url.rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return pathlib.Path(parent).expanduser().absolute() / name


def manifest_path(root: str, step: int) -> str:
    """Path of a checkpoint's manifest."""
    return f"{root}/{MANIFEST_DIRECTORY}/{step}.json"


def find_files(system: Any, folder: str) -> list[str]:
    """All files below a folder of a store; none where it does not exist."""
    # What another process wrote is not in a listing that this one has kept.
    system.invalidate_cache()
    return system.find(folder) if system.exists(folder) else []


def _file_checksum(path: pathlib.Path) -> int:
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            checksum.update(block)
    return int.from_bytes(checksum.digest(), "big")
