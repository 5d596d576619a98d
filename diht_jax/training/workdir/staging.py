"""Opens the work directory of a run: locked, and on disk where it is in an object store.

Orbax writes arrays to files and to `gs://`. A run anywhere else that fsspec knows (`s3://`, `az://`,
`memory://`) works in a folder of this machine; a thread copies each finished checkpoint, and with
it metrics and config, to the store. How a store is laid out and read is `stored_run`'s.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from diht_jax.storage.files import write_bytes
from diht_jax.storage.locks import lock_folder
from diht_jax.storage.stores import is_remote, open_system
from diht_jax.training.multihost import check_together, gather_texts
from diht_jax.training.stopping import TemporaryError
from diht_jax.training.workdir.checkpoint import (
    CHECKPOINT_DIRECTORY,
    CORRUPT_DIRECTORY,
    SaveError,
)
from diht_jax.training.workdir.stored_run import (
    MANIFEST_DIRECTORY,
    copy_folder,
    download_checkpoint,
    find_files,
    make_manifest,
    manifest_path,
    read_manifests,
)

LOCK_FILE = "run.lock"
# In the folder: the steps that it has in common with the store.
_RECORD_FILE = "uploaded.json"
_DEFAULT_STAGING = "~/.cache/diht_jax/staging"
_POLL_SECONDS = 1.0
_RETRY_SECONDS = 30.0
# At a file of the first process, before hosts are taken to share no folder.
_LOOKS = 10


@contextlib.contextmanager
def open_workdir(workdir: str | os.PathLike[str], staging: str | None) -> Iterator[epath.Path]:
    """Locks it for as long as the context lasts. All processes of a job must call.

    Args:
        workdir: a path or a URL.
        staging: `config.checkpoint.staging`.

    Yields:
        Where to work. Of a run in a store it is the folder on disk; at the end of the context all
        of it is in the store.

    Raises:
        ValueError: another run works there, or it cannot be read or written; hosts do not share
            the folder on disk, which is that of the run or the one it is staged in; nothing
            installed knows such URLs.
    """
    staged = StagedDirectory(os.fspath(workdir), staging) if is_staged(workdir, staging) else None
    path = epath.Path(staged.folder if staged else workdir)
    with contextlib.ExitStack() as stack:

        def prepare() -> None:
            if jax.process_index() != 0:
                return
            stack.enter_context(lock_folder(path, "--workdir", LOCK_FILE))
            if staged:
                staged.fetch()
                staged.start()
                stack.push(staged.close_after)

        check_together(prepare)
        if not is_remote(os.fspath(path)):
            _check_shared(path, workdir)
        yield path


def is_staged(workdir: str | os.PathLike[str], staging: str | None) -> bool:
    """Returns whether it is staged in a local folder: all URLs are, `gs://` only with `staging`."""
    path = os.fspath(workdir)
    return is_remote(path) and (bool(staging) or not path.startswith("gs://"))


class StagedDirectory:
    """A work directory in a store, and the folder that stands for it here.

    One process of a job holds it. Call `fetch`, then `start`, work in `folder`, then `close_after`.

    Attributes:
        url: of the work directory.
        folder: its files on this machine.
    """

    def __init__(self, url: str, staging: str | None = None):
        """Opens the store; nothing is copied yet.

        Raises:
            ValueError: nothing installed knows such URLs.
        """
        self.url = url.rstrip("/")
        self.folder = copy_folder(url, staging or _DEFAULT_STAGING)
        self._system, self._root = open_system(self.url)
        self._sent_files: dict[str, tuple[int, int]] = {}
        self._made: set[str] = set()  # directories, where the store has such
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def fetch(self) -> None:
        """Makes the folder what the store is.

        Checkpoints of the folder that never reached the store stay if they come after those
        of the store; everything else that the store does not have goes.

        Raises:
            TemporaryError: the store cannot be read.
        """
        try:
            self._fetch()
        except Exception as error:  # what it is depends on the store
            raise TemporaryError(f"{self.url} cannot be read: {error}") from error

    def start(self) -> None:
        """Starts copying finished checkpoints as they come."""
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def close_after(self, error_type: type[BaseException] | None, *_: object) -> None:
        """Copies what is left.

        Raises:
            SaveError: it cannot be written, and no other error is under way.
        """
        if self._thread is not None:
            self._ended.set()
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
        """Copies what is new, removes from the store what is gone; returns when that is done.

        Raises:
            Exception: the store cannot be written; which one depends on the store.
        """
        record = self._read_record()
        local = set(self._local_steps())
        for step in sorted(local - record):
            if self._send_checkpoint(step):
                record.add(step)
                self._write_record(record)
                logging.info("the checkpoint of step %d is in %s", step, self.url)
        self._send_files()
        for step in sorted(record - local):
            self._remove_checkpoint(step)
            record.remove(step)
            self._write_record(record)

    def _run(self) -> None:
        wait = _POLL_SECONDS
        while not self._ended.wait(wait):
            try:
                # The folder may be on a network, where a mere listing may fail for a moment.
                if set(self._local_steps()) != self._read_record():
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

    def _fetch(self) -> None:
        checkpoints = self.folder / CHECKPOINT_DIRECTORY
        checkpoints.mkdir(parents=True, exist_ok=True)
        record = self._read_record()
        stored = read_manifests(self._system, self._root)
        # Neither gone on by another machine, nor removed there to start anew.
        if stored.keys() <= record and (stored or not record):
            newer = {step for step in self._local_steps() if step > max(stored, default=-1)}
            unsent = newer - record
        else:
            unsent = set()
        known = {s: m for s, m in stored.items() if make_manifest(checkpoints / str(s)) == m}
        for step in self._local_steps():
            if step not in known and step not in unsent:
                shutil.rmtree(checkpoints / str(step))
        for step in sorted(stored.keys() - known.keys()):
            problem = download_checkpoint(self._system, self._root, step, stored[step], checkpoints)
            if problem is None:
                known[step] = stored[step]
                continue
            logging.warning(
                "%s: the checkpoint of step %d is damaged (%s); it is removed",
                self.url,
                step,
                problem,
            )
            self._remove_checkpoint(step)
        self._write_record(set(known))
        self._remove_unfinished(set(known))
        if not unsent:
            self._fetch_files()

    def _remove_unfinished(self, finished: set[int]) -> None:
        """Removes remains of checkpoints of a killed process: their files may have other names."""
        prefix = f"{self._root}/{CHECKPOINT_DIRECTORY}/"
        steps = {
            p.removeprefix(prefix).split("/")[0] for p in find_files(self._system, prefix[:-1])
        }
        for step in steps - {str(step) for step in finished}:
            self._system.rm(prefix + step, recursive=True)

    def _fetch_files(self) -> None:
        """Metrics, config and the like: those of the store, and no others."""
        prefix = self._root.rstrip("/") + "/"
        names = {path.removeprefix(prefix) for path in find_files(self._system, self._root)}
        names = {name for name in names if _is_file_of_run(name)}
        for path in self._local_files():
            if path.relative_to(self.folder).as_posix() not in names:
                path.unlink()
        for name in sorted(names):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, self._system.cat_file(prefix + name))
            self._sent_files[name] = _stamp(path)

    def _send_files(self) -> None:
        for path in self._local_files():
            name = path.relative_to(self.folder).as_posix()
            stamp = _stamp(path)
            if self._sent_files.get(name) != stamp:
                self._put(path, name)
                self._sent_files[name] = stamp

    def _send_checkpoint(self, step: int) -> bool:
        """Sends one; false where it was removed under our hands."""
        folder = self.folder / CHECKPOINT_DIRECTORY / str(step)
        try:
            manifest = make_manifest(folder)
            # Before the manifest: a run that goes on from here needs the lines up to here.
            self._send_files()
            for name in manifest:
                self._put(folder / name, f"{CHECKPOINT_DIRECTORY}/{step}/{name}")
        except FileNotFoundError:
            if folder.exists():
                raise
            return False
        text = json.dumps({"files": manifest}, indent=1)
        self._system.makedirs(f"{self._root}/{MANIFEST_DIRECTORY}", exist_ok=True)
        self._system.pipe_file(manifest_path(self._root, step), text.encode())
        return True

    def _remove_checkpoint(self, step: int) -> None:
        for path in (
            manifest_path(self._root, step),
            f"{self._root}/{CHECKPOINT_DIRECTORY}/{step}",
        ):
            if self._system.exists(path):
                self._system.rm(path, recursive=True)

    def _put(self, path: pathlib.Path, name: str) -> None:
        target = f"{self._root}/{name}"
        parent = target.rsplit("/", 1)[0]
        if parent not in self._made:
            self._system.makedirs(parent, exist_ok=True)
            self._made.add(parent)
        self._system.put_file(os.fspath(path), target)

    def _local_steps(self) -> list[int]:
        folder = self.folder / CHECKPOINT_DIRECTORY
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())

    def _local_files(self) -> list[pathlib.Path]:
        return [
            path
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and _is_file_of_run(path.relative_to(self.folder).as_posix())
        ]

    def _read_record(self) -> set[int]:
        path = self.folder / _RECORD_FILE
        return set(json.loads(path.read_text())) if path.exists() else set()

    def _write_record(self, steps: set[int]) -> None:
        write_bytes(self.folder / _RECORD_FILE, json.dumps(sorted(steps)).encode())


def _check_shared(folder: epath.Path, workdir: str | os.PathLike[str]) -> None:
    """Raises where a process does not see the lock file that the first one has just written."""
    lock = folder / LOCK_FILE
    for look in range(_LOOKS):
        if look:
            time.sleep(_POLL_SECONDS)  # a network file system may show it a moment later
        seen = gather_texts(lock.read_text() if lock.exists() else "")
        without = [index for index, text in enumerate(seen) if text != seen[0]]
        if not without:
            return
    if is_remote(os.fspath(workdir)):
        advice = (
            "Set config.checkpoint.staging to a folder that all hosts share (NFS, Lustre), or take "
            "a gs:// work directory, which needs none"
        )
    else:
        advice = (
            "All hosts write their part of a checkpoint there: take a folder that they share (NFS, "
            "Lustre), or a URL such as gs://BUCKET/run"
        )
    raise ValueError(
        f"--workdir={workdir}: process {without[0]} does not see {folder} of process 0. {advice}"
    )


def _is_file_of_run(name: str) -> bool:
    first = name.split("/", 1)[0]
    hidden = any(part.startswith(".") for part in name.split("/"))
    return not hidden and first not in (
        CHECKPOINT_DIRECTORY,
        CORRUPT_DIRECTORY,
        MANIFEST_DIRECTORY,
        LOCK_FILE,
        _RECORD_FILE,
    )


def _stamp(path: pathlib.Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
