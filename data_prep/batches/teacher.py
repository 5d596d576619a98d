"""Embeddings of pictures by a frozen teacher, for batches.

The teachers are in `data_prep.teachers`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from data_prep.batches.columns import append_columns, read_column
from data_prep.teachers.base import Embedded
from data_prep.teachers.registry import default_teacher, open_teacher
from diht_jax.records.schema import Record


class Teacher:
    """Embeds pictures."""

    def __init__(
        self,
        kind: str = "swag",
        *,
        batch_size: int = 64,
        image_column: str = "image",
        key_column: str | None = None,
        **section: Any,
    ):
        """Finds the teacher; it is loaded for the first batch.

        Args:
            kind: one of `teachers.registry.TEACHERS`.
            batch_size: images that it takes at once.
            image_column: of the tables; encoded images.
            key_column: of the tables, for a teacher that goes by the key; None: none has one.
            **section: keys of `config.teacher.KIND`, such as `weights` of "swag".

        Raises:
            ValueError: an unknown kind or key.
        """
        config = default_teacher()
        if kind not in config or kind in ("kind", "batch_size"):
            raise ValueError(f"kind='{kind}'; expected a teacher of data_prep.teachers.registry")
        unknown = sorted(section.keys() - config[kind].keys())
        if unknown:
            expected = ", ".join(sorted(config[kind]))
            raise ValueError(f"{', '.join(unknown)}: expected one of {expected}")
        config.update({"kind": kind, "batch_size": batch_size})
        config[kind].update(section)
        self._config = config
        self._image_column = image_column
        self._key_column = key_column

    def embed(self, records: Iterable[Record]) -> Iterator[list[Embedded]]:
        """Like `teachers.base.Teacher.embed`."""
        return open_teacher(self._config).embed(records)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Appends the embeddings.

        Returns:
            The table with `embedding` (list of float32, null where there is none) and
            `embedding_error` (string, why there is none, else null).
        """
        images = read_column(table, self._image_column, "image_column")
        keys = [""] * len(images)
        if self._key_column is not None:
            keys = read_column(table, self._key_column, "key_column")
        records = [
            Record(key, image or b"", "", {}) for key, image in zip(keys, images, strict=True)
        ]
        results = list(itertools.chain.from_iterable(self.embed(records)))
        vectors = [None if isinstance(result, str) else result for result in results]
        errors = [result if isinstance(result, str) else None for result in results]
        return append_columns(
            table,
            {
                "embedding": pa.array(vectors, pa.list_(pa.float32())),
                "embedding_error": pa.array(errors, pa.string()),
            },
        )
