"""The tokenizer of a run, whose files are kept in the work directory: the run needs no others."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import tempfile

import jax
import ml_collections
from etils import epath

from diht_jax.data.file_tokenizer import FileTokenizer
from diht_jax.storage import copies, files
from diht_jax.storage.stores import is_remote
from diht_jax.weights.tokenizer_file import copy_tokenizer, is_copy, read_tokenizer

TOKENIZER_DIRECTORY = "tokenizer"


def open_tokenizer(
    config: ml_collections.ConfigDict, workdir: str | epath.Path
) -> FileTokenizer | None:
    """The tokenizer of a run, from its work directory, or else from `config.model.tokenizer`.

    Returns:
        None where it is CLIP's.

    Raises:
        ValueError: there is none, or it cannot be read.
    """
    if config.model.tokenizer is None:
        return None
    folder = files.join(os.fspath(workdir), TOKENIZER_DIRECTORY)
    names = files.list_names(folder)
    if is_copy(names):
        return read_tokenizer(_local_folder(folder, names))
    try:
        found = read_tokenizer(config.model.tokenizer)
    except ValueError as error:
        raise ValueError(f"config.model.tokenizer={config.model.tokenizer}: {error}") from error
    if found is None:
        raise ValueError(
            f"config.model.tokenizer={config.model.tokenizer}: no tokenizer's file in this folder, "
            "such as tokenizer.json"
        )
    clean = config.model.text_cleaning
    return found if clean is None else dataclasses.replace(found, clean=clean)


def keep_tokenizer(found: FileTokenizer | None, workdir: str | epath.Path) -> None:
    """Copies a tokenizer into the work directory, unless it is there."""
    folder = files.join(os.fspath(workdir), TOKENIZER_DIRECTORY)
    if found is None or jax.process_index() != 0 or is_copy(files.list_names(folder)):
        return
    copy_tokenizer(found, folder)


def _local_folder(folder: str, names: list[str]) -> str:
    """The folder, or a copy of that of a store on this host."""
    if not is_remote(folder):
        return folder
    name = f"tokenizer-{hashlib.sha256(folder.encode()).hexdigest()[:16]}"
    local = pathlib.Path(tempfile.gettempdir()) / f"diht_jax-{os.getuid()}" / name
    for name in names:
        copies.cached_copy(files.join(folder, name), name, folder=local)
    return str(local)
