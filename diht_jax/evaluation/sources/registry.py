"""The way in to evaluation data: what `diht_jax.readers` reads, and layouts of benchmarks.

Beside the texts of `diht_jax.readers`:

    clip_benchmark:DIR[:SPLIT]   CLIP_benchmark's layout (`benchmark_folder`); SPLIT is "test"
    annotations:FILE             ALBEF's JSON, Localized Narratives (`annotations`)
    winoground:FILE              Winoground's examples.jsonl (`annotations`)
    list:FILE                    a list of pictures in folders of classes (`picture_lists`)
    voc:DIR, open_images:DIR     several labels an image (`label_tables`)
    winogavil:FILE               WinoGAViL's winogavil_dataset.csv (`winogavil`)
    objectnet:DIR                ObjectNet's classes that are ImageNet's, too (`objectnet`)
    sugarcrepe:PATH, aro:FILE    captions of which one is right (`caption_choices`)

These hold labels, questions, choices or pairs of pairs, which are nothing to train on. FILE and DIR
may be URLs, and so may a folder of classes (`stored_classes`). Parquet files need no captions here
(`diht_jax.readers.parquet`).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diht_jax.evaluation.sources import (
    annotations,
    caption_choices,
    entry_counts,
    label_tables,
    objectnet,
    picture_lists,
    stored_classes,
    winogavil,
)
from diht_jax.evaluation.sources.benchmark_folder import (
    DEFAULT_SPLIT,
    RETRIEVAL,
    BenchmarkFolder,
    benchmark_units,
    open_benchmark_folder,
)
from diht_jax.evaluation.sources.pictures import Unit
from diht_jax.readers import parquet, registry
from diht_jax.readers.base import Skipped, SourceShard
from diht_jax.records.schema import Pair

BENCHMARK, ANNOTATIONS, WINOGROUND = "clip_benchmark", "annotations", "winoground"

# Few enough that processes can share the table of a small set.
_TABLE_ROWS_PER_UNIT = 256


@dataclasses.dataclass(frozen=True)
class Layout:
    """A form of evaluation data, named by what stands before the colon of a source.

    Attributes:
        units: divides it; takes what is behind the colon, and the options. Raises ValueError.
        options: their names.
        count: entries, without reading an image; None where that is unknown.
        words: what of a task comes with the data, by the field of `Task` (and its `kind`).
    """

    units: Callable[..., list[Unit]]
    options: tuple[str, ...] = ()
    count: Callable[..., int | None] = lambda rest, **options: None
    words: Callable[..., dict[str, Any]] = lambda rest, **options: {}


def find_benchmark_folder(source: str) -> BenchmarkFolder:
    """The folder of "clip_benchmark:DIR[:SPLIT]"; DIR may be a URL."""
    rest = source.removeprefix(f"{BENCHMARK}:")
    folder, _, split = rest.rpartition(":")
    if not folder or "/" in split:  # the colon of a URL, or none
        folder, split = rest, ""
    return open_benchmark_folder(folder, split or DEFAULT_SPLIT)


def _words_of_folder(rest: str) -> dict[str, Any]:
    folder = find_benchmark_folder(rest)
    words: dict[str, Any] = {"kind": folder.type}
    if folder.type != RETRIEVAL:
        found = {"class_names": folder.class_names, "templates": folder.templates}
        words |= {name: value for name, value in found.items() if value is not None}
    return words


LAYOUTS: dict[str, Layout] = {
    BENCHMARK: Layout(
        units=lambda rest: benchmark_units(find_benchmark_folder(rest)),
        count=lambda rest: entry_counts.count_tars(find_benchmark_folder(rest).paths),
        words=_words_of_folder,
    ),
    ANNOTATIONS: Layout(
        units=annotations.annotation_units,
        options=("image_root", "image_column", "image_name"),
        count=annotations.count_annotations,
    ),
    WINOGROUND: Layout(
        units=annotations.winoground_units,
        options=("image_root", "image_name"),
        count=lambda rest, **options: 2 * len(annotations.read_rows(rest)),
    ),
    "winogavil": Layout(
        units=winogavil.winogavil_units,
        options=("image_root", "image_name"),
    ),
    "list": Layout(
        units=picture_lists.list_units,
        options=("image_root", "splits"),
        count=picture_lists.count,
        words=lambda rest, **options: {"class_names": picture_lists.class_names(rest, **options)},
    ),
    "voc": Layout(
        units=label_tables.voc_units,
        words=lambda rest: {"class_names": label_tables.VOC_CLASSES},
    ),
    "open_images": Layout(
        units=label_tables.open_images_units,
        words=lambda rest: {"class_names": label_tables.open_images_class_names(rest)},
    ),
    "objectnet": Layout(
        units=objectnet.objectnet_units,
        words=lambda rest: {"class_names": objectnet.class_names(rest)},
    ),
    "sugarcrepe": Layout(
        units=caption_choices.sugarcrepe_units,
        options=("image_root",),
        count=caption_choices.count_sugarcrepe,
    ),
    "aro": Layout(
        units=caption_choices.aro_units,
        options=("image_root",),
        count=caption_choices.count_aro,
    ),
}
OPTIONS = tuple(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.options))


def check_source(source: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError when there is nothing to read; reads no image."""
    open_units(source, options)


def read_source(source: str, options: Mapping[str, Any]) -> Iterator[Pair | Skipped]:
    """Yields the pairs of a source, with a `Skipped` and its reason for each that is unusable.

    Args:
        source: one of the texts above, or of `readers.list_shards`.
        options: of the source.

    Raises:
        ValueError: it cannot be read; names it.
    """
    for unit in open_units(source, options):
        yield from unit()


def open_units(source: str, options: Mapping[str, Any]) -> list[Unit]:
    """Divides a source into parts that can be read on their own, in the order of their entries.

    Args and errors: as `read_source`.
    """
    kind, _, rest = source.partition(":")
    if kind in LAYOUTS:
        layout = LAYOUTS[kind]
        _refuse_options(source, options, layout.options)
        return layout.units(rest, **options)
    if (units := stored_classes.stored_class_units(source)) is not None:
        _refuse_options(source, options, ())
        return units
    shards = registry.list_shards(source, **{"rows_per_shard": _TABLE_ROWS_PER_UNIT, **options})
    return [functools.partial(_read_shard, shard) for shard in shards]


def count_source(source: str, options: Mapping[str, Any]) -> int | None:
    """Entries of a source for a progress bar, estimated for tars; None where that takes reading."""
    kind, _, rest = source.partition(":")
    if kind in LAYOUTS:
        return LAYOUTS[kind].count(rest, **options)
    if (count := stored_classes.count_stored_classes(source)) is not None:
        return count
    return entry_counts.count_entries(registry.list_shards(source, **options))


def words_of_source(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What of a task comes with its data: `kind`, `class_names` or `templates`; maybe nothing.

    Raises:
        ValueError: the source cannot be read, or has no such option.
    """
    kind, _, rest = source.partition(":")
    if kind not in LAYOUTS:
        return {}
    _refuse_options(source, options, LAYOUTS[kind].options)
    return LAYOUTS[kind].words(rest, **options)


def _read_shard(shard: SourceShard) -> Iterator[Pair | Skipped]:
    if registry.FORMATS[shard.kind] is parquet.FORMAT:
        return parquet.read_parquet(shard, needs_caption=False)
    return registry.read_pairs(shard)


def _refuse_options(source: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(
                f"source '{source}' has no option '{name}'; "
                + (f"it has {', '.join(known)}" if known else "it has none")
            )
