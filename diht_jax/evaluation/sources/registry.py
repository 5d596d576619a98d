"""The way in to evaluation data: what `diht_jax.data.readers` reads, and layouts of benchmarks.

Beside the texts of `diht_jax.data.readers`:

    clip_benchmark:DIR[:SPLIT]   CLIP_benchmark's layout (`benchmark_folder`); SPLIT is "test"
    annotations:FILE             ALBEF's JSON, Localized Narratives (`annotations`)
    winoground:FILE              Winoground's examples.jsonl (`annotations`)

These hold labels, questions or pairs of pairs, which are nothing to train on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from diht_jax.data.readers import registry
from diht_jax.data.readers.base import Skipped
from diht_jax.data.records.schema import Pair
from diht_jax.evaluation.sources import annotations, entry_counts
from diht_jax.evaluation.sources.benchmark_folder import (
    DEFAULT_SPLIT,
    BenchmarkFolder,
    open_benchmark_folder,
    read_benchmark_folder,
)

BENCHMARK, ANNOTATIONS, WINOGROUND = "clip_benchmark", "annotations", "winoground"

_Reader = Callable[..., Iterator[Pair | Skipped]]
_FILE_READERS: dict[str, tuple[_Reader, tuple[str, ...]]] = {
    ANNOTATIONS: (
        annotations.read_annotations,
        ("image_root", "image_column", "image_name"),
    ),
    WINOGROUND: (annotations.read_winoground, ("image_root", "image_name")),
}


def check_source(source: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError when there is nothing to read; reads no image."""
    kind, _, rest = source.partition(":")
    if kind == BENCHMARK:
        _refuse_options(source, options, ())
        find_benchmark_folder(source)
    elif kind in _FILE_READERS:
        _refuse_options(source, options, _FILE_READERS[kind][1])
        if not os.path.isfile(rest):
            raise ValueError(f"nothing at '{rest}'; expected a .json or .jsonl file")
    else:
        registry.list_shards(source, **options)


def read_source(source: str, options: Mapping[str, Any]) -> Iterator[Pair | Skipped]:
    """Yields the pairs of a source, with a `Skipped` and its reason for each that is unusable.

    Args:
        source: one of the texts above, or of `readers.list_shards`.
        options: of the source.

    Raises:
        ValueError: it cannot be read; names it.
    """
    kind, _, rest = source.partition(":")
    if kind == BENCHMARK:
        yield from read_benchmark_folder(find_benchmark_folder(source))
    elif kind in _FILE_READERS:
        yield from _FILE_READERS[kind][0](rest, **options)
    else:
        for shard in registry.list_shards(source, **options):
            yield from registry.read_pairs(shard)


def count_source(source: str, options: Mapping[str, Any]) -> int | None:
    """Entries of a source for a progress bar, estimated for tars; None where that takes reading."""
    kind, _, rest = source.partition(":")
    if kind == BENCHMARK:
        return entry_counts.count_tars(find_benchmark_folder(source).paths)
    if kind == WINOGROUND:
        return 2 * len(annotations.read_rows(rest))
    if kind == ANNOTATIONS:
        column = options.get("image_column", annotations.IMAGE_COLUMN)
        return len({str(row.get(column)) for row in annotations.read_rows(rest)})
    return entry_counts.count_entries(registry.list_shards(source, **options))


def find_benchmark_folder(source: str) -> BenchmarkFolder:
    """The folder of "clip_benchmark:DIR[:SPLIT]"."""
    folder, _, split = source.removeprefix(f"{BENCHMARK}:").partition(":")
    return open_benchmark_folder(folder, split or DEFAULT_SPLIT)


def _refuse_options(source: str, options: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for name in options:
        if name not in known:
            raise ValueError(
                f"source '{source}' has no option '{name}'; "
                + (f"it has {', '.join(known)}" if known else "it has none")
            )
