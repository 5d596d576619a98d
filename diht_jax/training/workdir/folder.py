"""The work directory of a run, ready to be worked in: locked, and on disk if it is in a store.

Called by the training loop.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax
from etils import epath

from diht_jax.training.multihost import check_together, gather_texts
from diht_jax.training.workdir.lock import LOCK_FILE, lock_directory
from diht_jax.training.workdir.remote import StagedDirectory, is_staged


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
            the folder on disk; nothing installed knows such URLs.
    """
    staged = StagedDirectory(os.fspath(workdir), staging) if is_staged(workdir, staging) else None
    path = epath.Path(staged.folder if staged else workdir)
    with contextlib.ExitStack() as stack:

        def prepare() -> None:
            if jax.process_index() != 0:
                return
            stack.enter_context(lock_directory(path))
            if staged:
                staged.fetch()
                staged.start()
                stack.push(staged.close_after)

        check_together(prepare)
        if staged:
            _check_shared(path, workdir)
        yield path


def _check_shared(folder: epath.Path, workdir: str | os.PathLike[str]) -> None:
    """Raises where a process does not see the lock file that the first one has just written."""
    lock = folder / LOCK_FILE
    seen = gather_texts(lock.read_text() if lock.exists() else "")
    without = [index for index, text in enumerate(seen) if text != seen[0]]
    if without:
        raise ValueError(
            f"--workdir={workdir}: process {without[0]} does not see {folder} of process 0. Set "
            "config.checkpoint.staging to a folder that all hosts share (NFS, Lustre), or take a "
            "gs:// work directory, which needs none"
        )
