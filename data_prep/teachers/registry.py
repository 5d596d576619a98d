"""Table of the kinds of frozen teachers, by `config.teacher.kind`.

To add a teacher, write one file that ends with a `TeacherKind`, and one line in `TEACHERS`. Its
config section is `config.teacher.KIND`.
"""

from __future__ import annotations

import functools

import ml_collections

from data_prep.teachers import precomputed, swag, torch_module
from data_prep.teachers.base import Teacher, TeacherInfo, TeacherKind, open_shared

TEACHERS: dict[str, TeacherKind] = {
    # SWAG's vision transformer in Flax, on all local devices (the paper's teacher, as recalled).
    "swag": swag.TEACHER,
    # A torch module built by a function.
    "torch": torch_module.TEACHER,
    # Embeddings from files, by key.
    "precomputed": precomputed.TEACHER,
}


def default_teacher() -> ml_collections.ConfigDict:
    """Returns the default config section `teacher`."""
    c = ml_collections.ConfigDict()
    c.kind = "swag"  # one of TEACHERS
    c.batch_size = 64  # images per batch, over all devices
    for name, kind in TEACHERS.items():
        c[name] = kind.default_config()
    return c


def describe_teacher(config: ml_collections.ConfigDict) -> TeacherInfo:
    """Describes a teacher, and loads no more than that requires.

    Raises:
        ValueError: the kind is unknown, or a file or function is missing.
    """
    return _find_kind(config).describe(config[config.kind])


def load_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """Returns the teacher of a config section, loaded once per process.

    Raises:
        ValueError: like `describe_teacher`, and if a file or function does not give a teacher.
    """
    return _load_teacher(ml_collections.FrozenConfigDict(config))


@functools.lru_cache(maxsize=1)
def _load_teacher(config: ml_collections.FrozenConfigDict) -> Teacher:
    return _find_kind(config).load(config[config.kind], config.batch_size)


def open_teacher(config: ml_collections.ConfigDict) -> Teacher:
    """Returns the teacher for a task. Errors of a shared one are raised at the first batch."""
    return open_shared(functools.partial(load_teacher, config), config.batch_size)


def _find_kind(config: ml_collections.ConfigDict) -> TeacherKind:
    if config.kind not in TEACHERS:
        raise ValueError(
            f"config.teacher.kind='{config.kind}'; expected one of {', '.join(TEACHERS)}"
        )
    if config.batch_size < 1:
        raise ValueError(f"config.teacher.batch_size={config.batch_size}; expected at least 1")
    return TEACHERS[config.kind]
