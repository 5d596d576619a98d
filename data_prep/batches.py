"""Caption filter, text spotter and teacher as callables on batches: tables in, more columns out.

Each object is created once per process and called with Arrow tables, as in
`ray.data.Dataset.map_batches`, NeMo Curator or a loop over record batches. The implementations are
in `data_prep.captions`, `.text_spotting` and `.teachers`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from data_prep import captions as captions_module
from data_prep.captions.graph import CaptionGraph, cat_reason
from data_prep.teachers.base import Embedded
from data_prep.teachers.registry import TEACHERS, default_teacher, open_teacher
from data_prep.text_spotting.settings import KEYS, check_spotter, default_spotter
from data_prep.text_spotting.spotter import Verdict, open_spotter
from diht_jax.config.keys import check_ranges
from diht_jax.input.transforms import MAX_PIXELS
from diht_jax.records.schema import Record

__all__ = ["CaptionFilter", "Teacher", "TextSpotter"]


class CaptionFilter:
    """Decides about captions by complexity and action, C and A of CAT (arXiv 2301.02280)."""

    def __init__(
        self,
        min_complexity: int = 1,
        require_action: bool = True,
        *,
        caption_column: str = "caption",
        graphs: bool = False,
    ):
        """Loads the parser.

        Args:
            min_complexity: minimum complexity of a kept caption; 0 disables the check.
            require_action: whether a kept caption must have an action.
            caption_column: name of the column with text; null is an empty caption.
            graphs: whether to append the column `graph`.

        Raises:
            ValueError: the English model of spaCy is not installed.
        """
        self._limits: dict[str, Any] = {
            "min_complexity": min_complexity,
            "require_action": require_action,
        }
        self._caption_column = caption_column
        self._has_graphs = graphs
        captions_module.parse_captions([])

    def judge(self, captions: Sequence[str]) -> list[tuple[CaptionGraph, str | None]]:
        """Returns the graph of each caption, and the reason to drop it (None if it is kept)."""
        graphs = captions_module.parse_captions(captions)
        return [(graph, cat_reason(graph, **self._limits)) for graph in graphs]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Appends the decisions.

        Returns:
            The table with `complexity` and `num_actions` (int32), `drop_reason` (string; null if
            the caption is kept, else one of `captions.GATE_REASONS` and `CAT_REASONS`), and, if
            requested, `graph` (JSON with objects, actions and relations).
        """
        captions = _read_column(table, self._caption_column, "caption_column")
        judged = self.judge([caption or "" for caption in captions])
        columns = {
            "complexity": pa.array([graph.complexity for graph, _ in judged], pa.int32()),
            "num_actions": pa.array([len(graph.actions) for graph, _ in judged], pa.int32()),
            "drop_reason": pa.array([reason for _, reason in judged], pa.string()),
        }
        if self._has_graphs:
            texts = [
                json.dumps(
                    {
                        "objects": {n: list(o.attributes) for n, o in graph.objects.items()},
                        "actions": graph.actions,
                        "relations": graph.relations,
                    },
                    ensure_ascii=False,
                )
                for graph, _ in judged
            ]
            columns["graph"] = pa.array(texts, pa.string())
        return _append_columns(table, columns)


class TextSpotter:
    """Finds captions that appear as text in their image, T of CAT, with as little OCR as needed."""

    def __init__(
        self,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        max_pixels: int = MAX_PIXELS,
        shard: str = "batches",
        **settings: Any,
    ):
        """Checks the settings; the networks of EasyOCR are loaded for the first image.

        Args:
            image_column: name of the column with encoded images; null is an empty image.
            caption_column: name of the column with text, or lists of texts.
            max_pixels: maximum size of an image to decode.
            shard: name of the file in `cache`, if it is set.
            **settings: keys of `config.spotter` of the filter.

        Raises:
            ValueError: a setting is unknown or out of range.
        """
        config = default_spotter()
        _refuse_unknown(settings, config)
        config.update(settings)
        check_ranges(config, KEYS, "config.spotter.")
        check_spotter(config)
        self._spotter = open_spotter(config, max_pixels, shard)
        self._image_column = image_column
        self._caption_column = caption_column

    def judge(self, images: Sequence[bytes], captions: Sequence[Sequence[str]]) -> list[Verdict]:
        """Returns one verdict per image; like `spotter.TextSpotter.judge`."""
        return self._spotter.judge(images, captions)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Appends the decisions.

        Returns:
            The table with `spotted_texts` (list of strings, the lines that were read), `match`
            (string, the line that repeats the first caption; null if any caption is not repeated,
            and the pair is kept) and `image_error` (string, the reason if the image could not be
            decoded, else null).
        """
        images = _read_column(table, self._image_column, "image_column")
        captions = _read_column(table, self._caption_column, "caption_column")
        verdicts = self.judge(
            [image or b"" for image in images],
            [[one or "" for one in (c if isinstance(c, list) else [c])] for c in captions],
        )
        texts = [[spot.text for spot in v.spots if spot.text is not None] for v in verdicts]
        matches = [None if None in v.matches or not v.matches else v.matches[0] for v in verdicts]
        errors = [None if v.error is None else v.error.reason for v in verdicts]
        columns = {
            "spotted_texts": pa.array(texts, pa.list_(pa.string())),
            "match": pa.array(matches, pa.string()),
            "image_error": pa.array(errors, pa.string()),
        }
        return _append_columns(table, columns)


class Teacher:
    """Embeds images with a frozen teacher."""

    def __init__(
        self,
        kind: str = "swag",
        *,
        batch_size: int = 64,
        image_column: str = "image",
        key_column: str | None = None,
        **section: Any,
    ):
        """Finds the teacher, which is loaded for the first batch.

        Args:
            kind: one of `teachers.registry.TEACHERS`.
            batch_size: number of images per forward pass.
            image_column: name of the column with encoded images.
            key_column: name of the column with keys, for teachers that look images up by key.
            **section: keys of `config.teacher.KIND`, such as `weights` of "swag".

        Raises:
            ValueError: the kind or a key is unknown.
        """
        config = default_teacher()
        if kind not in TEACHERS:
            raise ValueError(f"kind='{kind}'; expected a teacher of data_prep.teachers.registry")
        _refuse_unknown(section, config[kind])
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
            The table with `embedding` (list of float32, or null) and `embedding_error` (string, the
            reason if there is no embedding, else null).
        """
        images = _read_column(table, self._image_column, "image_column")
        keys = [""] * len(images)
        if self._key_column is not None:
            keys = _read_column(table, self._key_column, "key_column")
        records = [
            Record(str(key), image or b"", "", {}) for key, image in zip(keys, images, strict=True)
        ]
        results = list(itertools.chain.from_iterable(self.embed(records)))
        vectors = [None if isinstance(result, str) else result for result in results]
        errors = [result if isinstance(result, str) else None for result in results]
        columns = {
            "embedding": pa.array(vectors, pa.list_(pa.float32())),
            "embedding_error": pa.array(errors, pa.string()),
        }
        return _append_columns(table, columns)


def _refuse_unknown(settings: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := sorted(settings.keys() - set(known)):
        raise ValueError(f"{', '.join(unknown)}: expected one of {', '.join(sorted(known))}")


def _read_column(table: pa.Table, name: str, setting: str) -> list[Any]:
    if name not in table.column_names:
        raise ValueError(
            f"{setting}='{name}': no such column; the table has {', '.join(table.column_names)}"
        )
    return table.column(name).to_pylist()


def _append_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Appends columns to a table; replaces columns of the same name."""
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, values)
    return table
