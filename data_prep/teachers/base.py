"""Interface of frozen teachers, with decoding and batching for teachers that use images.

Each teacher's file defines a `TeacherKind`; `registry.py` lists the teachers.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import ml_collections
import numpy as np

from data_prep.jobs.models import is_shared, open_model
from diht_jax.input import transforms
from diht_jax.input.transforms import ImageError, decode_rgb
from diht_jax.input.workers import usable_cores
from diht_jax.records.schema import Record
from diht_jax.storage.files import map_many

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_DECODING_THREADS = 16

# The embedding of a record, or the reason why it has none.
Embedded = np.ndarray | str


@dataclasses.dataclass(frozen=True)
class TeacherInfo:
    """Description of a teacher that is not loaded yet.

    Attributes:
        identity: everything that embeddings depend on, as JSON, with the kind first. If its hash
            changes, shards are embedded and labelled again.
        in_this_process: whether the teacher needs the whole machine (its devices or memory)
            instead of one core of many.
        name: name for messages.
        licence: licence of the teacher's outputs, if they are restricted.
        data_keys: keys of the identity that belong to one data set. Heads trained with other
            values of these can still be loaded (`config.heads.load`).
    """

    identity: dict[str, Any]
    in_this_process: bool
    name: str
    licence: str | None = None
    data_keys: tuple[str, ...] = ()


class Teacher(abc.ABC):
    """A frozen model that embeds records.

    Attributes:
        info: description of the teacher.
    """

    info: TeacherInfo

    @abc.abstractmethod
    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """Yields chunks of results, in order: float32 [d], or the reason why there is none."""

    def embed_all(self, records: Iterable[Record]) -> list[Embedded]:
        """Returns the results of `embed` as one list."""
        return list(itertools.chain.from_iterable(self.embed(records)))

    def example_keys(self) -> list[str]:
        """Returns some keys of known records, or [] if the teacher embeds the images themselves."""
        return []


class _SharedTeacher(Teacher):
    """Proxy of a teacher in other processes. Sends one batch of records at a time."""

    def __init__(self, load: Callable[[], Teacher], batch_size: int):
        self._batch_size = batch_size
        self._teacher = open_model(load)

    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """See `Teacher.embed`."""
        records = iter(records)
        chunks = iter(lambda: list(itertools.islice(records, self._batch_size)), [])
        return self._teacher.map("embed_all", ((chunk,) for chunk in chunks))


def open_shared(load: Callable[[], Teacher], batch_size: int) -> Teacher:
    """Returns the teacher for a task: loaded here, or a proxy if workers share it."""
    return _SharedTeacher(load, batch_size) if is_shared() else load()


@dataclasses.dataclass(frozen=True)
class TeacherKind:
    """A kind of teacher, defined at the end of its file. Its config is `config.teacher.KIND`.

    Attributes:
        default_config: returns the section with all keys and their defaults.
        describe: checks a section and describes the teacher, quickly and with little memory.
            Raises ValueError if a value is wrong, or a file or package is missing.
        load: loads the teacher of a section, for the given batch size.
    """

    default_config: Callable[[], ml_collections.ConfigDict]
    describe: Callable[[ml_collections.ConfigDict], TeacherInfo]
    load: Callable[[ml_collections.ConfigDict, int], Teacher]


class ImageTeacher(Teacher):
    """A teacher that embeds images. Decodes the next batch while the model runs."""

    def __init__(
        self,
        encode: Callable[[np.ndarray], Any],
        info: TeacherInfo,
        *,
        image_size: int,
        batch_size: int,
    ):
        """Wraps a function that embeds a batch of images.

        Args:
            encode: maps uint8 [batch_size, size, size, 3] to float [batch_size, d].
            image_size: side of the images in px.
            batch_size: images per batch; the last batch is padded.
        """
        self.info = info
        self.encode = encode
        self._image_size = image_size
        self._batch_size = batch_size

    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """See `Teacher.embed`."""
        threads = MAX_DECODING_THREADS if self.info.in_this_process else 1
        for _, results in prepare_ahead(records, self._batch_size, threads, self._prepare):
            good = [i for i, result in enumerate(results) if not isinstance(result, str)]
            side = self._image_size
            images = np.zeros((self._batch_size, side, side, 3), np.uint8)
            for row, i in enumerate(good):
                images[row] = results[i]
            if good:
                embeddings = np.asarray(self.encode(images), np.float32)
                self._check(embeddings, len(good))
                for row, i in enumerate(good):
                    results[i] = embeddings[row]
            yield results

    def _prepare(self, record: Record) -> np.ndarray | str:
        try:
            return transforms.eval_transform(decode_rgb(record.image), self._image_size)
        except ImageError as error:
            return f"image_{error.reason}"

    def _check(self, embeddings: np.ndarray, num_good: int) -> None:
        if embeddings.ndim != 2 or len(embeddings) != self._batch_size:
            raise ValueError(
                f"the teacher {self.info.name} gave {list(embeddings.shape)} for "
                f"{self._batch_size} images; expected [{self._batch_size}, d]: one vector an image"
            )
        if not np.isfinite(embeddings[:num_good]).all():
            raise ValueError(
                f"the teacher {self.info.name} gave values that are not finite; its "
                "weights or its dtype are wrong"
            )


def prepare_ahead(
    records: Iterable[Record],
    batch_size: int,
    max_threads: int,
    prepare: Callable[[Record], Any],
) -> Iterator[tuple[list[Record], list[Any]]]:
    """Yields batches of records with their prepared values, and prepares the next meanwhile."""
    threads = min(max_threads, usable_cores())
    prepared = map_many(
        lambda record: (record, prepare(record)), records, num_threads=threads, ahead=batch_size
    )
    with contextlib.closing(prepared):
        while chunk := list(itertools.islice(prepared, batch_size)):
            done, values = zip(*chunk, strict=True)
            yield list(done), list(values)
