"""Opens evaluation data: the sources of `diht_jax.readers`, and layouts of benchmarks.

Besides the sources of `diht_jax.readers` there are `LAYOUTS`, such as "clip_benchmark:DIR" and
"voc:DIR", described in docs/reference/tasks.md. They hold labels, questions, choices or pairs of
pairs, which are no training data. Files and folders, and also folders of classes, may be URLs.
Parquet files need no captions here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from diht_jax.evaluation.embedding.entries import Units
from diht_jax.evaluation.sources import annotations, labels
from diht_jax.evaluation.sources.benchmark_folder import open_benchmark_folder
from diht_jax.readers import registry
from diht_jax.readers.base import SourceShard
from diht_jax.storage.stores import input_size, is_remote

BENCHMARK, ANNOTATIONS = "clip_benchmark", "annotations"

# Small enough that processes can share the table of a small set.
_TABLE_ROWS_PER_UNIT = 256


class Layout(NamedTuple):
    """A format of evaluation data, named by the prefix of a source before its colon."""

    # Makes units from the text after the colon and the options. Raises ValueError.
    units: Callable[..., Units]
    options: tuple[str, ...] = ()  # names of its options
    # Class names that come with the data, from the same arguments; None for a layout without.
    class_names: Callable[..., tuple[str, ...]] | None = None


LAYOUTS: dict[str, Layout] = {
    BENCHMARK: Layout(lambda rest: open_benchmark_folder(rest)[0]),
    ANNOTATIONS: Layout(annotations.annotation_units, ("image_root", "image_column", "image_name")),
    "winoground": Layout(annotations.winoground_units, ("image_root", "image_name")),
    "winogavil": Layout(annotations.winogavil_units, ("image_root", "image_name")),
    "list": Layout(labels.list_units, ("image_root", "splits"), labels.list_class_names),
    "voc": Layout(labels.voc_units, class_names=lambda rest: labels.VOC_CLASSES),
    "open_images": Layout(labels.open_images_units, class_names=labels.open_images_class_names),
    "objectnet": Layout(labels.objectnet_units, class_names=labels.objectnet_class_names),
    "sugarcrepe": Layout(annotations.sugarcrepe_units, ("image_root",)),
    "aro": Layout(annotations.aro_units, ("image_root",)),
}
OPTIONS = tuple(dict.fromkeys(name for layout in LAYOUTS.values() for name in layout.options))


def open_units(source: str, options: Mapping[str, Any]) -> Units:
    """Divides a source into units that can be read independently, in source order.

    Reads no image.

    Args:
        source: "LAYOUT:PATH", or a source for `readers.list_shards`.
        options: options of the source.

    Raises:
        ValueError: the source cannot be read; the message names it.
    """
    kind, _, rest = source.partition(":")
    if kind in LAYOUTS:
        _refuse_options(source, options, LAYOUTS[kind].options)
        return LAYOUTS[kind].units(rest, **options)
    options = dict(options)
    if split := options.pop("split", None):
        source = registry.enter_split(source, split)
    if is_remote(source) and (units := labels.stored_class_units(source)) is not None:
        _refuse_options(source, options, ())
        return units
    shards = registry.list_shards(source, **{"rows_per_shard": _TABLE_ROWS_PER_UNIT, **options})
    units = []
    for shard in shards:
        # In parquet files labels are enough, as in data sets of Hugging Face.
        shard = dataclasses.replace(shard, needs_caption=shard.kind != "parquet")
        units.append(functools.partial(registry.read_pairs, shard))
    return Units(units, functools.partial(count_shards, shards))


def count_shards(shards: Sequence[SourceShard]) -> int | None:
    """Estimates the number of entries of shards, for progress bars; None if unknown.

    Shards of formats that can be counted without reading are counted. Otherwise the first one is
    counted, and the others are estimated from their size in bytes.
    """
    total = 0
    for shard in shards:
        form = registry.FORMATS[shard.kind]
        count = None if form.count_reads_file else form.count(shard)
        if count is None:
            first = registry.FORMATS[shards[0].kind].count(shards[0])
            sizes = [input_size(shard.path) for shard in shards]
            return None if first is None else round(first * sum(sizes) / max(1, sizes[0]))
        total += count
    return total


def words_of_source(source: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns task fields that come with the data: `kind`, `class_names`, `templates`.

    Applies to sources in one of `LAYOUTS`; errors as in `open_units`.
    """
    kind, _, rest = source.partition(":")
    _refuse_options(source, options, LAYOUTS[kind].options)
    if kind == BENCHMARK:
        return open_benchmark_folder(rest)[1]
    read_class_names = LAYOUTS[kind].class_names
    return {"class_names": read_class_names(rest, **options)} if read_class_names else {}


def _refuse_options(source: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(
                f"source '{source}' has no option '{name}'; "
                + (f"it has {', '.join(known)}" if known else "it has none")
            )
