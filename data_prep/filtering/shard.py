"""CAT filtering of one shard: every pair goes through the steps, and the others are written.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)".
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.captions.mentions import CONCEPTS_SUFFIX
from data_prep.decisions import table
from data_prep.decisions.log import ShardLog
from data_prep.filtering import config as filter_config
from data_prep.filtering.chain import Chain
from data_prep.filtering.resharding import CommonImageWriter
from data_prep.jobs import shards
from data_prep.jobs.crash_search import WorkRecord
from data_prep.jobs.engine import Report
from data_prep.sources import img2dataset
from data_prep.sources.list import read_pairs
from data_prep.steps.base import IMAGE_ERROR, Candidate, Step
from data_prep.steps.image import ImageStep
from diht_jax.input import decode
from diht_jax.readers.base import held_bytes
from diht_jax.readers.registry import Skipped, SourceShard
from diht_jax.records import captions, catalog, schema
from diht_jax.records.formats.tar_members import DamagedTarError
from diht_jax.records.formats.writer import RecordSink
from diht_jax.records.schema import Pair

_CHUNK_BYTES = 2**28  # of pairs that are held at once; an ordinary batch takes a tenth of it


def filter_shard(
    task: shards.ShardTask,
    report: Report,
    *,
    config: ml_collections.ConfigDict,
    steps: Sequence[type[Step]],
) -> dict[str, Any]:
    """Does one task of the filter.

    Args:
        task: source and output.
        report: called with the number of pairs that are done, now and then.
        config: of `config.default_config`.
        steps: of `steps.registry.active_steps`.

    Returns:
        The shard's statistics.

    Raises:
        ValueError: the source is damaged.
    """
    # A death that led to no pair may have been that of a dropped picture, shown in the report.
    is_unexplained = task.search is not None and task.search.unexplained > 0
    log = ShardLog(config, pictures=0 if is_unexplained else None)

    def process(source: SourceShard, writer: RecordSink) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "download": img2dataset.read_download_stats(source),
            "versions": filter_config.package_versions(config),
        }
        if catalog.kind_of(os.fspath(writer.path)) == "webdataset":
            writer = CommonImageWriter(writer)
        encode = functools.partial(_encode, config=config)
        chain = Chain(config, steps, source, log, encode, writer.write, report)
        source = dataclasses.replace(source, unneeded=tuple(config.drop_metadata))
        entries = _with_more_captions(_with_sidecar(source), source, config)
        if config.keep_before_damage:
            entries = _until_damage(entries, facts)
        with WorkRecord(task.output, task.search) as work:
            while chunk := _next_chunk(entries, config.batch_size, log):
                chain.run(work.begin(chunk, chain.try_one))
        facts |= chain.close()
        return log.write(os.fspath(writer.path)) | facts

    companions = (table.SUFFIX, *((CONCEPTS_SUFFIX,) if config.concepts else ()))
    return shards.run_task(task, process, companions)


def _until_damage(
    entries: Iterator[Pair | Skipped], facts: dict[str, Any]
) -> Iterator[Pair | Skipped]:
    """The entries before the damage of an archive, which is recorded and no error."""
    try:
        yield from entries
    except DamagedTarError as error:
        facts["damaged"] = str(error)
        logging.warning("%s; the pairs before the damage are kept", error)


def _next_chunk(
    entries: Iterator[Pair | Skipped], size: int, log: ShardLog
) -> list[Pair | Skipped]:
    """The next entries, `size` at most; fewer where they would take much memory together."""
    with log.clock("reading"):
        chunk: list[Pair | Skipped] = []
        room_bytes = _CHUNK_BYTES
        while len(chunk) < size and room_bytes > 0 and (entry := next(entries, None)) is not None:
            chunk.append(entry)
            room_bytes -= held_bytes(entry)
        return chunk


def _with_more_captions(
    entries: Iterator[Pair | Skipped], source: SourceShard, config: ml_collections.ConfigDict
) -> Iterator[Pair | Skipped]:
    """The pairs with the captions in columns of their metadata, and the kinds of all of them."""
    columns = filter_config.caption_columns(config)
    if not columns and config.caption_kind == captions.USUAL_KIND:
        yield from entries
        return
    missing = set(columns)
    for entry in entries:
        if isinstance(entry, Pair):
            missing.difference_update(entry.metadata)
            entry = captions.add_columns(entry, columns, config.caption_kind)
        yield entry
    for column in sorted(missing):
        logging.warning(
            "config.caption_columns: no pair of %s has '%s' in its metadata", source, column
        )


def _with_sidecar(source: SourceShard) -> Iterator[Pair | Skipped]:
    """The pairs; those without metadata take it from img2dataset's parquet file, if there is one.

    The tars of img2dataset have the same in their json members, unless somebody left those out.
    """
    sidecar: dict[str, dict[str, Any]] | None = None
    for entry in read_pairs(source):
        if isinstance(entry, Pair) and not entry.metadata and source.kind == "webdataset":
            if sidecar is None:
                sidecar = img2dataset.read_sidecar(source)
            entry = dataclasses.replace(entry, metadata=sidecar.get(entry.key, {}))
        yield entry


def _encode(candidate: Candidate, log: ShardLog, config: ml_collections.ConfigDict) -> bytes | None:
    """The record of a pair, which is logged; None if its image turns out to be damaged."""
    pair, image_format = _narrow(candidate), candidate.values["format"]
    longer = max(candidate.values["width"], candidate.values["height"])
    if config.image.max_side is not None and longer > config.image.max_side:
        try:
            image_format, data = "JPEG", _shrink(pair.image, config)
        except decode.ImageError as error:
            candidate.values[IMAGE_ERROR] = error.reason
            log.drop(candidate, ImageStep.name, error.reason)
            return None
        pair = dataclasses.replace(pair, image=data)
    log.keep(candidate, image_format)
    metadata = {k: v for k, v in pair.metadata.items() if k not in config.drop_metadata}
    return schema.encode_record(dataclasses.replace(pair, metadata=metadata))


def _narrow(candidate: Candidate) -> Pair:
    """The pair without the captions that are no longer good."""
    pair, good = candidate.pair, candidate.captions
    texts = captions.all_captions(pair)
    if len(good) == len(texts):
        return pair
    kind_of = dict(zip(texts, captions.caption_kinds(pair), strict=True))
    return captions.with_captions(pair, good, [kind_of[text] for text in good])


def _shrink(data: bytes, config: ml_collections.ConfigDict) -> bytes:
    image = decode.decode_rgb(data, max_pixels=config.image.max_pixels)
    side = config.image.max_side
    image.thumbnail((side, side), decode.Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=config.image.jpeg_quality, optimize=True)
    return buffer.getvalue()
