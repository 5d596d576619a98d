"""Units of work for the `input` of a preparation config.

The readers themselves are in `diht_jax.readers`, where the evaluation finds them too; this
module holds what only offline jobs need: the config section, the check of the output folder, and
the share of one job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NoReturn, TypeVar

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep.jobs.manifest import Input
from diht_jax.readers import registry
from diht_jax.readers.registry import Skipped, SourceShard
from diht_jax.records.formats.tar_members import DamagedTarError
from diht_jax.records.schema import Pair
from diht_jax.storage.files import check_writable
from diht_jax.storage.stores import is_remote

_ONE_SLASH = re.compile(r"([a-z0-9]+):/([^/].*)", re.DOTALL)

_Task = TypeVar("_Task")


def default_source() -> ml_collections.ConfigDict:
    """The config section `source`: the options of all source formats, with their defaults.

    Their meaning is in the formats' own options, such as `readers.columns.ColumnOptions`.
    """
    c = ml_collections.ConfigDict()
    for name, field in registry.option_defaults().items():
        c[name] = placeholder(str) if field.default is None else field.default
    return c


def list_inputs(pairs: str | None, source: ml_collections.ConfigDict) -> Sequence[Input]:
    """Divides the input into units of work, in a fixed order.

    Args:
        pairs: `config.input`: any source of `diht_jax.readers`, TFRecord shards by their URL,
            or several with commas between them.
        source: the section of `default_source`.

    Raises:
        ValueError: no input is set or found.
    """
    if not pairs:
        raise ValueError(
            "config.input is not set: expected tars, tables, a folder, TFRecord shards or "
            "tfds:NAME:SPLIT, such as --config.input='/data/*.tar'"
        )
    inputs = []
    for text in typed_texts(pairs):
        root = find_root(text)
        try:
            inputs += [
                Input(shard, root) for shard in registry.list_shards(text, **source.to_dict())
            ]
        except ValueError as error:
            _raise_as_typed(error)
    return inputs


def typed_texts(pairs: str) -> list[str]:
    """The sources that one `config.input` names, which are separated by commas."""
    texts = [pairs] if os.path.exists(pairs) else pairs.split(",")
    return [text.strip() for text in texts]


def find_root(text: str) -> str:
    """The folder part of a typed source before its first wildcard; a folder is its own root."""
    path = re.sub(r"\?\w+=.*", "", text, flags=re.DOTALL)  # without its options
    before = re.split(r"[*?\[]", path, maxsplit=1)[0]
    if is_remote(path):
        is_folder = before == path and not os.path.splitext(path)[1]
    else:
        is_folder = os.path.isdir(path)
    return path if is_folder else before.rpartition("/")[0]


def read_pairs(shard: SourceShard) -> Iterator[Pair | Skipped]:
    """Like `readers.registry.read_pairs`; errors name options as keys of the config."""
    try:
        yield from registry.read_pairs(shard)
    except ValueError as error:
        _raise_as_typed(error)


def _raise_as_typed(error: ValueError) -> NoReturn:
    if isinstance(error, OSError | DamagedTarError):
        raise error
    message = registry.name_options(str(error), "--config.source.{}")
    if message == str(error):
        raise error
    raise ValueError(message) from error


def check_output(output: str | os.PathLike[str] | None, sources: Iterable[SourceShard]) -> str:
    """The output folder, once it is sure that writing there destroys no input.

    Returns:
        A path or URL without a slash at its end.

    Raises:
        ValueError: errors of `check_folder`, or it is a folder that is being read.
    """
    folder = check_folder(output)
    check_not_input(folder, sources)
    return folder


def check_folder(output: str | os.PathLike[str] | None) -> str:
    """The output folder, once it is sure that it can be written; before the input is listed.

    Returns:
        A path or URL without a slash at its end.

    Raises:
        ValueError: it is not set, is mistyped, or takes no file.
    """
    if not output:
        raise ValueError("config.output is not set: expected a folder, which is made if missing")
    folder = os.fspath(output).removeprefix("file://")
    if match := _ONE_SLASH.fullmatch(folder):
        raise ValueError(
            f"config.output='{output}': expected a local folder, or a URL with two slashes, such "
            f"as {match[1]}://{match[2]}; a local folder of this name is ./{folder}"
        )
    folder = folder.rstrip("/") or folder
    if is_remote(folder):
        check_writable(folder, "config.output")
        return folder
    present = os.path.abspath(folder)
    while not os.path.lexists(present):
        present = os.path.dirname(present)
    if not os.path.isdir(present) or not os.access(present, os.W_OK | os.X_OK):
        raise ValueError(
            f"config.output='{folder}': nothing can be written to '{present}'; expected a folder "
            "that may be written to, or the name of a new one in such a folder"
        )
    return folder


def check_not_input(folder: str, sources: Iterable[SourceShard]) -> None:
    """Raises ValueError where the output folder is one that is being read."""
    plain = _plain_path(folder)
    for source in sources:
        if os.path.dirname(_plain_path(source.path)) == plain:
            raise ValueError(f"config.output='{folder}' is the folder of the input '{source.path}'")


def _plain_path(path: str) -> str:
    """A path or URL in the one form in which they are compared."""
    if not is_remote(path):
        return os.path.realpath(path)
    protocol, _, name = path.partition("://")
    return f"{protocol}://{name.strip('/')}"


def shards_of_task(tasks: Sequence[_Task], task_index: int, num_tasks: int) -> Sequence[_Task]:
    """The tasks of one job of a job array: every `num_tasks`-th.

    Raises:
        ValueError: the number is not in [0, num_tasks).
    """
    if not 0 <= task_index < num_tasks:
        raise ValueError(
            f"--task_index={task_index} with --num_tasks={num_tasks}; expected an index from 0 to "
            f"{num_tasks - 1}"
        )
    return tasks if num_tasks == 1 else tasks[task_index::num_tasks]
