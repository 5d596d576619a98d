"""The expensive stages as plain classes of batches: an Arrow table in, decision columns out.

Each is made once per process and then called with tables, as `ray.data.Dataset.map_batches`, NeMo
Curator and any loop over record batches do it. How captions are parsed, text is spotted and
pictures are embedded belongs in `data_prep.captions`, `.text_spotting` and `.teachers`.
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
            min_complexity: least complexity of a caption that is kept; 0 for any.
            require_action: whether a caption that is kept must have an action.
            caption_column: of the tables; text, where null is an empty caption.
            graphs: whether the column `graph` is appended.

        Raises:
            ValueError: spaCy has no English model.
        """
        self._limits: dict[str, Any] = {
            "min_complexity": min_complexity,
            "require_action": require_action,
        }
        self._caption_column = caption_column
        self._has_graphs = graphs
        captions_module.parse_captions([])

    def judge(self, captions: Sequence[str]) -> list[tuple[CaptionGraph, str | None]]:
        """The graph of each caption, and the reason to drop it (None where it is kept)."""
        graphs = captions_module.parse_captions(captions)
        return [(graph, cat_reason(graph, **self._limits)) for graph in graphs]

    def __call__(self, table: pa.Table) -> pa.Table:
        """Appends the decisions.

        Returns:
            The table with `complexity` and `num_actions` (int32), `drop_reason` (string, null where
            the caption is kept, else one of `captions.GATE_REASONS` and `CAT_REASONS`), and `graph`
            (JSON with objects, actions and relations) where that was asked for.
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
    """Finds captions that stand in their picture, T of CAT, and reads no more than that needs."""

    def __init__(
        self,
        *,
        image_column: str = "image",
        caption_column: str = "caption",
        max_pixels: int = MAX_PIXELS,
        shard: str = "batches",
        **settings: Any,
    ):
        """Checks the settings; EasyOCR's networks are loaded for the first picture.

        Args:
            image_column: of the tables; encoded images, where null is an empty one.
            caption_column: of the tables; text, or several of them in a list.
            max_pixels: of a picture that is still decoded.
            shard: name of the file in `cache`, where there is one.
            **settings: keys of `config.spotter` of the filter.

        Raises:
            ValueError: an unknown setting, or a value out of its range.
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
        """Gives one verdict per picture; arguments and errors of `spotter.TextSpotter.judge`."""
        return self._spotter.judge(images, captions)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Appends the decisions.

        Returns:
            The table with `spotted_texts` (list of strings, the lines that were read), `match`
            (string: the line that repeats the caption, of several captions the first one's; null
            where some caption is not repeated, and the pair is kept) and `image_error` (string,
            why the picture could not be decoded, else null).
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
    """Embeds pictures by a frozen teacher."""

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
            The table with `embedding` (list of float32, null where there is none) and
            `embedding_error` (string, why there is none, else null).
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
    """The table with more columns; one of the same name is replaced."""
    for name, values in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        table = table.append_column(name, values)
    return table
