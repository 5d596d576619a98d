"""CAT filtering of one shard: every pair goes through the steps, and what is left is written.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". What a step decides
belongs in `steps`, what is recorded in `shard_log`, the config in `config`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
from absl import logging

from data_prep.captions.mentions import CONCEPTS_SUFFIX
from data_prep.filtering import config as filter_config
from data_prep.filtering import decisions
from data_prep.filtering.resharding import CommonImageWriter
from data_prep.filtering.shard_log import ShardLog
from data_prep.jobs import shards
from data_prep.jobs.crash_search import BATCH, PAIR, CrashSearch, WorkRecord, without_crashed
from data_prep.jobs.engine import Report
from data_prep.sources import img2dataset
from data_prep.sources.list import read_pairs
from data_prep.steps.base import Candidate, Drop, Step, begin
from data_prep.steps.image import ImageStep
from diht_jax.input import decode
from diht_jax.readers.base import held_bytes
from diht_jax.readers.registry import Skipped, SourceShard
from diht_jax.records import captions, schema
from diht_jax.records.formats.registry import name_format
from diht_jax.records.formats.tar_members import DamagedTarError
from diht_jax.records.formats.writer import RecordWriter
from diht_jax.records.schema import Pair

# Of pairs that are held at once; an ordinary batch takes a tenth of it.
_CHUNK_BYTES = 2**28


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
    if task.search is not None:  # workers have died of this shard, and left half-written files
        folder, name = os.path.split(task.output)
        shards.remove_temporary_files(folder, [name])
    with WorkRecord(task.output, task.search) as work:
        process = functools.partial(
            _process,
            config=config,
            steps=steps,
            report=report,
            search=task.search or CrashSearch(),
            work=work,
        )
        return shards.run_task(
            task,
            process,
            beside=(decisions.SUFFIX, *((CONCEPTS_SUFFIX,) if config.concepts else ())),
        )


def _process(
    source: SourceShard,
    writer: RecordWriter,
    *,
    config: ml_collections.ConfigDict,
    steps: Sequence[type[Step]],
    report: Report,
    search: CrashSearch,
    work: WorkRecord,
) -> dict[str, Any]:
    if search.unexplained:  # it may have been a dropped picture that the report would show
        config = ml_collections.ConfigDict(config.to_dict() | {"report_samples": 0})
    if name_format(os.fspath(writer.path)) == "webdataset":
        writer = CommonImageWriter(writer)
    log = ShardLog(config)
    log.download = img2dataset.read_download_stats(source)
    with log.clock("loading"):
        opened = [step(config, source) for step in steps]

    def finish(candidates: Sequence[Candidate]) -> None:
        with log.clock("writing"):
            for candidate in candidates:
                _write(candidate, writer, config, log)
        report(len(candidates))

    entries = _with_more_captions(_with_sidecar(source), source, config)
    if config.keep_before_damage:
        entries = _until_damage(entries, log)
    entries = without_crashed(entries, search.crashed)
    first_row = 0
    while chunk := _next_chunk(entries, config.batch_size, log):
        batch = first_row, first_row + len(chunk)
        if search.suspects == batch:
            _try_one_by_one(chunk, first_row, config, steps, source, work)
        work.write(BATCH, *batch)
        pairs, rows = [], []
        for row, entry in enumerate(chunk, first_row):
            if isinstance(entry, Skipped):
                log.skip(entry, row)
            else:
                pairs.append(entry)
                rows.append(row)
        first_row += len(chunk)
        report(len(chunk) - len(pairs))
        _advance(begin(pairs, rows), opened, finish, config, log, report)
    for step in opened:
        step.record(log)
    return log.write(os.fspath(writer.path))


def _until_damage(entries: Iterator[Pair | Skipped], log: ShardLog) -> Iterator[Pair | Skipped]:
    """The entries before the damage of an archive, which is recorded and no error."""
    try:
        yield from entries
    except DamagedTarError as error:
        log.damaged = str(error)
        logging.warning("%s; the pairs before the damage are kept", error)


class _NoWriter:
    """Takes records and writes nothing."""

    def write(self, record: bytes) -> None:
        """Nothing."""


def _try_one_by_one(
    chunk: Sequence[Pair | Skipped],
    first: int,
    config: ml_collections.ConfigDict,
    steps: Sequence[type[Step]],
    source: SourceShard,
    work: WorkRecord,
) -> None:
    """Does to each pair alone what is done to a batch, and keeps nothing: this process may die."""
    log = ShardLog(config)
    opened = [step(config, source) for step in steps]

    def finish(candidates: Sequence[Candidate]) -> None:
        for candidate in candidates:
            _write(candidate, _NoWriter(), config, log)

    for number, entry in enumerate(chunk, first):
        if isinstance(entry, Pair):
            work.write(PAIR, number, number + 1)
            _advance(begin([entry], [number]), opened, finish, config, log, lambda pairs: None)


def _advance(
    candidates: Sequence[Candidate],
    steps: Sequence[Step],
    finish: Callable[[Sequence[Candidate]], None],
    config: ml_collections.ConfigDict,
    log: ShardLog,
    report: Report,
) -> None:
    """Takes candidates through the steps that are left, and `finish` takes those that remain.

    From a step with a batch size on they go in groups, so that a slow step shows its progress.
    """
    for number, step in enumerate(steps):
        size = step.batch_size(config)
        if size is not None and size < len(candidates):
            for start in range(0, len(candidates), size):
                group = candidates[start : start + size]
                _advance(group, steps[number:], finish, config, log, report)
            return
        with log.clock(step.timer or step.name):
            results = list(step.judge(candidates))
            for result in results:
                if isinstance(result, Drop):
                    log.drop_candidate(step.name, result)
        remaining = [result for result in results if isinstance(result, Candidate)]
        report(len(candidates) - len(remaining))
        candidates = remaining
    finish(candidates)


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


def _write(
    candidate: Candidate,
    writer: RecordWriter,
    config: ml_collections.ConfigDict,
    log: ShardLog,
) -> None:
    """Writes the pair, unless it turns out that its image cannot be shrunk."""
    pair = _narrow(candidate)
    name, *size = candidate.header
    original = pair
    if config.image.max_side is not None and max(size) > config.image.max_side:
        try:
            name, data = "JPEG", _shrink(pair.image, config)
        except decode.ImageError as error:
            log.drop_candidate(ImageStep.name, Drop(candidate, error.reason))
            return
        pair = dataclasses.replace(pair, image=data)
    metadata = {k: v for k, v in pair.metadata.items() if k not in config.drop_metadata}
    writer.write(schema.encode_record(dataclasses.replace(pair, metadata=metadata)))
    log.keep(candidate, name, original)


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
