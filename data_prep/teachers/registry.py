"""The kinds of frozen teachers, by `config.teacher.kind`.

A teacher is one file that ends with a `TeacherKind`, and one line in `TEACHERS`. Its config section
is `config.teacher.KIND`.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator

import ml_collections

from data_prep.jobs.models import is_shared, open_model
from data_prep.teachers import precomputed, swag, torch_module
from data_prep.teachers.base import Embedded, Teacher, TeacherInfo, TeacherKind
from diht_jax.records.schema import Record

TEACHERS: dict[str, TeacherKind] = {
    # SWAG's vision transformer in Flax, on all local devices (the paper's teacher).
    "swag": swag.TEACHER,
    # Any torch module that a function builds.
    "torch": torch_module.TEACHER,
    # Embeddings from files, by key.
    "precomputed": precomputed.TEACHER,
}


def default_teacher() -> ml_collections.ConfigDict:
    """The config section `teacher`."""
    c = ml_collections.ConfigDict()
    c.kind = "swag"  # one of TEACHERS
    c.batch_size = 64  # images at once, over all devices
    for name, kind in TEACHERS.items():
        c[name] = kind.default_config()
    return c


def describe_teacher(config: ml_collections.ConfigDict) -> TeacherInfo:
    """Describes a teacher without loading more than that needs.

    Args:
        config: of `default_teacher`.

    Raises:
        ValueError: an unknown kind, or files or functions that are missing.
    """
    return _find_kind(config).describe(config[config.kind])


def load_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher of a config section; loaded once per process.

    Args:
        config: of `default_teacher`.

    Raises:
        ValueError: as `describe_teacher`, and for files or functions that are no teacher.
    """
    return _load_teacher(json.dumps(config.to_dict(), sort_keys=True))


def open_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """The teacher that a task should embed with: of this process, or one that workers share.

    Args:
        config: of `default_teacher`.

    Raises:
        ValueError: as `load_teacher`; of a shared one at the first batch.
    """
    if is_shared():
        return SharedTeacher(functools.partial(load_teacher, config), config.batch_size)
    return load_teacher(config)


class SharedTeacher(Teacher):
    """Stands for a teacher in other processes; sends it as many records as it takes at once."""

    def __init__(self, load: Callable[[], Teacher], batch_size: int):
        """Args: what makes the teacher ready there, and how many records it takes at once."""
        self._batch_size = batch_size
        self._teacher = open_model(load)

    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """See `Teacher.embed`."""
        records = iter(records)
        chunks = iter(lambda: list(itertools.islice(records, self._batch_size)), [])
        yield from self._teacher.map("embed_all", ((chunk,) for chunk in chunks))


@functools.lru_cache(maxsize=1)
def _load_teacher(settings: str) -> Teacher:
    config = ml_collections.ConfigDict(json.loads(settings))
    if config.batch_size < 1:
        raise ValueError(f"config.teacher.batch_size={config.batch_size}; expected at least 1")
    return _find_kind(config).load(config[config.kind], config.batch_size)


def _find_kind(config: ml_collections.ConfigDict) -> TeacherKind:
    if config.kind not in TEACHERS:
        raise ValueError(
            f"config.teacher.kind='{config.kind}'; expected one of {', '.join(TEACHERS)}"
        )
    return TEACHERS[config.kind]
