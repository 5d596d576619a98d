"""Runs in object stores: a local staging folder for training, and local copies for reading.

Orbax writes arrays to files and to `gs://`. For any other store that fsspec supports (`s3://`,
`az://`, `memory://`), a run works in a local folder, and a thread copies each finished checkpoint,
with metrics and config, to the store.

The store has the files of the work directory under the same names. In addition,
`manifests/STEP.json` has size and CRC32C of a checkpoint's files. It is written last and removed
first: a checkpoint without a manifest does not count.
"""

from __future__ import annotations

import hashlib
import json
import operator
import os
import pathlib
import shutil
import threading
import zlib

import google_crc32c
from absl import logging
from jax.sharding import Mesh

from diht_jax.storage import copies, files
from diht_jax.storage.locks import lock_file
from diht_jax.storage.stores import is_remote, open_system, retry
from diht_jax.training.multihost import TemporaryError, share_from_first
from diht_jax.training.workdir.checkpoint import SaveError
from diht_jax.training.workdir.saved_run import (
    CHECKPOINT_DIRECTORY,
    CONFIG_FILE,
    CORRUPT_DIRECTORY,
    TOKENIZER_DIRECTORY,
)

LOCK_FILE = "run.lock"
MANIFEST_DIRECTORY = "manifests"
# In the staging folder: the steps that are also in the store. Without this record, emptying the
# store to start over would bring the old run back.
_RECORD_FILE = "uploaded.json"
_NOT_FILES = (
    CHECKPOINT_DIRECTORY,
    CORRUPT_DIRECTORY,
    MANIFEST_DIRECTORY,
    LOCK_FILE,
    _RECORD_FILE,
    "wandb",  # written continuously by the client, which sends it elsewhere
)
_DEFAULT_STAGING = "~/.cache/diht_jax/staging"
_COPIES = "~/.cache/diht_jax/runs"
_POLL_SECONDS = 1.0
_RETRY_SECONDS = 30.0
_READ_BYTES = 2**22

# Maps a file's path within the checkpoint to its size in bytes, CRC32C and CRC32. CRC32C alone is
# equal for all files of one size that end with their own CRC32C, as some of Orbax's do.
Manifest = dict[str, list[int]]


class StagedDirectory:
    """A work directory in a store, with its local staging folder.

    One process of a job owns it. Call `fetch`, then `start`, work in `folder`, then `close_after`.

    Attributes:
        url: of the work directory.
        folder: local folder with its files.
    """

    def __init__(self, url: str, staging: str | None = None):
        """Opens the store without copying anything.

        Raises:
            ValueError: no installed package handles such URLs.
        """
        self.url = url.rstrip("/")
        open_system(self.url)
        self.folder = _folder_of(self.url, staging or _DEFAULT_STAGING)
        self._checkpoints = self.folder / CHECKPOINT_DIRECTORY
        self._sent_files: dict[str, tuple[int, int]] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)

    def fetch(self) -> None:
        """Synchronises the folder with the store.

        If the folder has continued from the store's checkpoints, it is kept: it may have work that
        never reached the store. Otherwise it is fetched anew.
        """
        self._checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            stored = read_manifests(self.url)
            if not self._has_gone_on_from(stored):
                self._begin_anew()
            for step in sorted(stored.keys() - self._local_steps()):
                problem = _download_checkpoint(self.url, step, stored[step], self._checkpoints)
                if problem is not None:
                    where = f"{self.url}: the checkpoint of step {step}"
                    logging.warning("%s is damaged (%s); it is removed", where, problem)
                    _remove_checkpoint(self.url, step)
                    del stored[step]
            self._write_record(set(stored))
            # Left by processes that were killed.
            names = _find_files(files.join(self.url, CHECKPOINT_DIRECTORY))
            for step in {name.split("/")[0] for name in names} - set(map(str, stored)):
                _remove_checkpoint(self.url, step)
        except Exception as error:  # the type depends on the store
            raise TemporaryError(f"{self.url} cannot be read: {error}") from error

    def start(self) -> None:
        """Starts the thread that copies finished checkpoints."""
        self._thread.start()

    def close_after(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Copies the remaining files.

        Raises:
            SaveError: the store cannot be written, and no other error is being handled.
        """
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        try:
            self.send()
        except Exception as error:  # as in `fetch`
            problem = SaveError(
                f"{self.url} cannot be written: {error}. What is missing there is in "
                f"{self.folder}; the same command on this machine goes on from it"
            )
            if error_type is None:
                raise problem from error
            logging.error("%s", problem)

    def send(self) -> None:
        """Copies new files, and removes from the store what is gone; returns when done.

        Raises:
            Exception: the store cannot be written; the type depends on the store.
        """
        record, local = self._read_record(), self._local_steps()
        for step in sorted(local - record):
            if self._send_checkpoint(step):
                record.add(step)
                self._write_record(record)
                logging.info("the checkpoint of step %d is in %s", step, self.url)
        self._send_files()
        for step in sorted(record - local):
            _remove_checkpoint(self.url, step)
            record.remove(step)
            self._write_record(record)

    def _run(self) -> None:
        wait = _POLL_SECONDS
        while not self._ended.wait(wait):
            try:
                # The folder may be on a network file system, whose listing may fail for a moment.
                if self._local_steps() != self._read_record():
                    self.send()
                wait = _POLL_SECONDS
            except Exception as error:  # as in `fetch`
                logging.error(
                    "copying %s to %s failed (%s); the run goes on, and it is tried again in %d s",
                    self.folder,
                    self.url,
                    error,
                    _RETRY_SECONDS,
                )
                wait = _RETRY_SECONDS

    def _has_gone_on_from(self, stored: dict[int, Manifest]) -> bool:
        """Returns whether the folder has all that the store has, except what it removed since."""
        record = self._read_record()
        local = {step: make_manifest(self._checkpoints / str(step)) for step in self._local_steps()}
        return (
            not record & local.keys() - stored.keys()
            # A run only removes checkpoints in favour of later ones.
            and stored.keys() - local.keys() <= record
            and max(local, default=0) >= max(stored, default=0)
            and not any(
                differing_files(local[step], stored[step]) for step in stored.keys() & local.keys()
            )
        )

    def _begin_anew(self) -> None:
        """Replaces the run's files by those of the store, and removes all checkpoints."""
        shutil.rmtree(self._checkpoints)
        self._checkpoints.mkdir()
        for path in self._local_files().values():
            path.unlink()
        # Before the checkpoints, since a folder that has checkpoints is taken as complete.
        for name in filter(_is_file_of_run, _find_files(self.url)):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(path, files.read_bytes(files.join(self.url, name)))

    def _send_files(self) -> None:
        for name, path in self._local_files().items():
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._sent_files.get(name) != stamp:
                _upload(path, files.join(self.url, name))
                self._sent_files[name] = stamp

    def _send_checkpoint(self, step: int) -> bool:
        """Sends a checkpoint; returns False if it was removed in the meantime."""
        folder = self._checkpoints / str(step)
        try:
            manifest = make_manifest(folder)
            # Before the manifest: a run resumed from this step needs the metrics until then.
            self._send_files()
            for name in manifest:
                _upload(folder / name, files.join(self.url, CHECKPOINT_DIRECTORY, str(step), name))
        except FileNotFoundError:
            if folder.exists():
                raise
            return False
        files.make_folder(files.join(self.url, MANIFEST_DIRECTORY))
        files.write_object(_manifest_url(self.url, step), {"files": manifest})
        return True

    def _local_steps(self) -> set[int]:
        return {int(path.name) for path in self._checkpoints.iterdir() if path.name.isdigit()}

    def _local_files(self) -> dict[str, pathlib.Path]:
        found = {
            path.relative_to(self.folder).as_posix(): path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }
        return {name: path for name, path in found.items() if _is_file_of_run(name)}

    def _read_record(self) -> set[int]:
        path = self.folder / _RECORD_FILE
        return set(json.loads(path.read_text())) if path.exists() else set()

    def _write_record(self, steps: set[int]) -> None:
        files.write_bytes(self.folder / _RECORD_FILE, json.dumps(sorted(steps)).encode())


def local_run(
    workdir: str | os.PathLike[str], step: int | None = None, mesh: Mesh | None = None
) -> str:
    """Returns a local directory of a run: the run itself, or a copy of config and one checkpoint.

    Args:
        workdir: a path or a URL.
        step: step of the checkpoint; by default the latest, as seen by the first process of a job.
        mesh: devices to read for; all processes of a job with some of these devices must call it.

    Returns:
        `workdir`, unless it is a URL with manifests; otherwise the copy in
        `~/.cache/diht_jax/runs`. Orbax itself reads `gs://` runs without manifests.

    Raises:
        ValueError: there is no run or no such checkpoint, or it is damaged; the store cannot be
            read; no installed package handles such URLs.
    """
    name = os.fspath(workdir)
    if not is_remote(name):
        return name
    url = name.rstrip("/")
    open_system(url)

    def read() -> list[tuple[int, Manifest]]:
        try:
            return list(read_manifests(url).items())
        except Exception as error:  # the type depends on the store
            raise ValueError(f"{url} cannot be read: {error}") from error

    # A running job may save and remove checkpoints between the listings of two processes.
    stored = dict(share_from_first(read) if mesh and mesh.is_multi_process else read())
    if not stored and url.startswith("gs://"):
        return name
    if not stored:
        raise ValueError(
            f"{name}: no run of diht_jax.train with a finished checkpoint (it would have "
            f"{MANIFEST_DIRECTORY}/STEP.json)"
        )
    step = max(stored) if step is None else step
    if step not in stored:
        raise ValueError(f"{name}: no checkpoint of step {step}; steps found: {sorted(stored)}")
    checksum = google_crc32c.value(json.dumps(stored[step]).encode())
    folder = _folder_of(url, _COPIES) / f"{step}-{checksum:08x}"
    checkpoints = folder / CHECKPOINT_DIRECTORY
    checkpoints.mkdir(parents=True, exist_ok=True)
    # One of the processes that share this home directory copies; the others wait for it.
    with lock_file(folder / ".download.lock"):
        if not (checkpoints / str(step)).exists():
            problem = _download_checkpoint(url, step, stored[step], checkpoints)
            if problem:
                raise ValueError(f"{name}: the checkpoint of step {step} is damaged: {problem}")
    files.write_bytes(folder / CONFIG_FILE, files.read_bytes(files.join(url, CONFIG_FILE)))
    tokenizer = files.join(url, TOKENIZER_DIRECTORY)
    for name in files.list_names(tokenizer):
        (folder / TOKENIZER_DIRECTORY).mkdir(exist_ok=True)
        data = files.read_bytes(files.join(tokenizer, name))
        files.write_bytes(folder / TOKENIZER_DIRECTORY / name, data)
    return os.fspath(folder)


def read_manifests(url: str) -> dict[int, Manifest]:
    """Reads the manifests of finished checkpoints in a store: step -> file -> size and CRC32C.

    A truncated manifest, left by a store without atomic writes, counts as not written yet.
    """
    names = [
        name.removesuffix(".json") for name in _find_files(files.join(url, MANIFEST_DIRECTORY))
    ]
    written = {int(n): files.read_object(_manifest_url(url, n)) for n in names if n.isdigit()}
    return {step: found["files"] for step, found in written.items() if found and "files" in found}


def make_manifest(folder: pathlib.Path) -> Manifest:
    """Computes size and checksums of each file below a folder, by relative path."""
    return {
        path.relative_to(folder).as_posix(): [path.stat().st_size, *_file_checksums(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differing_files(found: Manifest, stated: Manifest) -> list[str]:
    """Returns the files that differ from the manifest; old manifests have no CRC32."""
    both = found.keys() & stated.keys()
    same = {name for name in both if all(map(operator.eq, found[name], stated[name]))}
    return sorted((found.keys() | stated.keys()) - same)


def _manifest_url(url: str, step: int | str) -> str:
    return files.join(url, MANIFEST_DIRECTORY, f"{step}.json")


def _download_checkpoint(
    url: str, step: int, manifest: Manifest, checkpoints: pathlib.Path
) -> str | None:
    """Copies a checkpoint atomically into a folder of checkpoints.

    No other process may copy the same checkpoint there at the same time.

    Returns:
        What is wrong with it in the store; None if it matches its manifest.
    """
    target, temporary = checkpoints / str(step), checkpoints / f".{step}.download"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name in manifest:
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                copies.download(files.join(url, CHECKPOINT_DIRECTORY, str(step), name), path)
            except FileNotFoundError:
                return f"{name} is missing"
        found = make_manifest(temporary)
        if wrong := differing_files(found, manifest):
            return f"{wrong[0]} is not what was saved"
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(size for size, *_ in manifest.values())
    logging.info("copied the checkpoint of step %d, %.1f MB", step, size / 1e6)
    return None


def _remove_checkpoint(url: str, step: int | str) -> None:
    """Removes a checkpoint from a store, its manifest first."""
    files.remove(_manifest_url(url, step))
    folder = files.join(url, CHECKPOINT_DIRECTORY, str(step))
    for name in _find_files(folder):
        files.remove(files.join(folder, name))


def _upload(path: pathlib.Path, url: str) -> None:
    files.make_folder(url.rsplit("/", 1)[0])
    files.upload(path, url)


def _find_files(url: str) -> list[str]:
    """Returns the relative paths of all files below a folder of a store; empty if it is missing."""
    system, root = open_system(url, use_listings_cache=False)
    try:
        found = retry(lambda: system.find(root), url)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(path.removeprefix(f"{root.rstrip('/')}/") for path in found)


def _folder_of(url: str, parent: str) -> pathlib.Path:
    """Returns the folder below `parent` for a URL; unique to the URL."""
    name = f"{url.rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    return pathlib.Path(parent).expanduser().absolute() / name


def _file_checksums(path: pathlib.Path) -> tuple[int, int]:
    """Computes CRC32C and CRC32 of a file."""
    checksum, other = google_crc32c.Checksum(), 0
    with open(path, "rb") as file:
        for data in checksum.consume(file, _READ_BYTES):
            other = zlib.crc32(data, other)
    return int.from_bytes(checksum.digest(), "big"), other


def _is_file_of_run(name: str) -> bool:
    parts = name.split("/")
    return parts[0] not in _NOT_FILES and not any(part.startswith(".") for part in parts)
