"""Files of a job as local files that can be mapped into memory, wherever they lie.

What lies in a store is fetched once by a machine, into a folder below the system's temporary one;
all processes of the job share it.
"""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
import tempfile

from diht_jax.data.atomic_file import temporary_path
from diht_jax.data.records.remote import file_version, is_remote
from diht_jax.data.stores import local_copy


def cache_folder(output: str) -> str:
    """Where the files of an output folder are kept on this machine."""
    digest = hashlib.blake2b(output.encode(), digest_size=8).hexdigest()
    return os.path.join(tempfile.gettempdir(), f"diht_jax-duplicates-{os.getuid()}-{digest}")


def fetch(path: str, cache: str) -> str:
    """The path of a local file with these contents.

    Args:
        path: of a local file, which is its own copy, or a URL.
        cache: of `cache_folder`.
    """
    if not is_remote(path):
        return path
    identity = f"{path}\n{file_version(path)}"
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    target = pathlib.Path(cache, digest)
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_path(target)
        with local_copy(path) as copy:
            shutil.copyfile(copy, temporary)
        os.replace(temporary, target)
    return str(target)


def forget(cache: str) -> None:
    """Removes what was fetched."""
    shutil.rmtree(cache, ignore_errors=True)
