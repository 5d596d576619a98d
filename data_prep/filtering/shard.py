"""CAT filtering of one shard: applies the steps to its pairs and writes those that remain.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". Everything that is
recorded about a pair belongs in `data_prep.decisions.log`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ml_collections
import numpy as np
from absl import logging

from data_prep.captions.mentions import CONCEPTS_SUFFIX
from data_prep.decisions import table
from data_prep.decisions.log import ShardLog
from data_prep.filtering import config as filter_config
from data_prep.filtering.resharding import with_common_image
from data_prep.jobs import shards
from data_prep.jobs.engine import Report, WorkRecord
from data_prep.sources import read_download_stats, read_pairs, read_sidecar
from data_prep.steps.base import EVIDENCE, IMAGE_ERROR, Candidate, Columns, Step
from data_prep.steps.cat import ImageStep
from diht_jax.input import transforms
from diht_jax.readers.base import held_bytes
from diht_jax.readers.registry import Skipped, SourceShard
from diht_jax.records import samples, schema
from diht_jax.records.schema import Pair
from diht_jax.records.shard_files import RecordWriter, kind_of
from diht_jax.records.tars import DamagedTarError

_CHUNK_BYTES = 2**28  # of pairs in memory at a time; an ordinary batch takes a tenth of it


def filter_shard(
    task: shards.ShardTask,
    report: Report,
    *,
    config: ml_collections.ConfigDict,
    steps: Sequence[type[Step]],
) -> dict[str, Any]:
    """Filters one input shard with the active steps, and returns its statistics.

    Raises:
        ValueError: the source is damaged.
    """
    # An unexplained death may have been caused by a dropped image that the report would show.
    is_unexplained = task.search is not None and task.search.unexplained > 0
    log = ShardLog(config, pictures=0 if is_unexplained else None)

    def process(source: SourceShard, writer: RecordWriter) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "download": read_download_stats(source),
            "versions": filter_config.package_versions(config),
        }
        is_tar = kind_of(writer.path) == "webdataset"

        def write(data: bytes) -> None:
            writer.write(with_common_image(data) if is_tar else data)

        encode = functools.partial(_encode, config=config)
        chain = Chain(config, steps, source, log, encode, write, report)
        source = dataclasses.replace(source, unneeded=tuple(config.drop_metadata))
        with WorkRecord(task.output, task.search) as work:
            for chunk in _read_chunks(source, config, log, facts):
                chain.run(work.begin(chunk, chain.try_one))
        facts |= chain.close()
        return log.write(writer.path) | facts

    companions = (table.SUFFIX, *((CONCEPTS_SUFFIX,) if config.concepts else ()))
    return shards.run_task(task, process, companions)


def _read_chunks(
    source: SourceShard, config: ml_collections.ConfigDict, log: ShardLog, facts: dict[str, Any]
) -> Iterator[list[Pair | Skipped]]:
    """Yields batches of entries, smaller ones where the entries are large.

    With `config.keep_before_damage`, a damaged archive is recorded in `facts` instead of raised.
    """
    entries = _read_entries(source, config)
    while True:
        chunk: list[Pair | Skipped] = []
        room_bytes = _CHUNK_BYTES
        with log.clock("reading"):
            try:
                while len(chunk) < config.batch_size and room_bytes > 0:
                    chunk.append(entry := next(entries))
                    room_bytes -= held_bytes(entry)
            except StopIteration:
                pass
            except DamagedTarError as error:
                if not config.keep_before_damage:
                    raise
                facts["damaged"] = str(error)
                logging.warning("%s; the pairs before the damage are kept", error)
        if not chunk:
            return
        yield chunk


def _read_entries(
    source: SourceShard, config: ml_collections.ConfigDict
) -> Iterator[Pair | Skipped]:
    """Yields the pairs with captions from metadata columns added, and the kind of every caption.

    Pairs of a tar without metadata take it from img2dataset's parquet file, if there is one. The
    tars of img2dataset contain the same metadata in json members, unless these were left out.
    """
    columns = samples.parse_columns(config.caption_columns, "config.caption_columns")
    is_usual = not columns and config.caption_kind == samples.USUAL_KIND
    sidecar: dict[str, dict[str, Any]] | None = None
    missing = set(columns)
    for entry in read_pairs(source):
        if isinstance(entry, Pair):
            if not entry.metadata and source.kind == "webdataset":
                if sidecar is None:
                    sidecar = read_sidecar(source)
                entry = dataclasses.replace(entry, metadata=sidecar.get(entry.key, {}))
            missing.difference_update(entry.metadata)
            if not is_usual:
                entry = samples.add_columns(entry, columns, config.caption_kind)
        yield entry
    for column in sorted(missing):
        logging.warning(
            "config.caption_columns: no pair of %s has '%s' in its metadata", source, column
        )


def _encode(candidate: Candidate, log: ShardLog, config: ml_collections.ConfigDict) -> bytes | None:
    """Logs and encodes a kept pair; returns None, and logs a drop, if its image is damaged."""
    pair, image_format, c = candidate.pair, candidate.values["format"], config.image
    good = candidate.captions
    if len(good) < len(samples.all_captions(pair)):
        kind_of = samples.caption_kinds(pair)
        pair = samples.with_captions(pair, {text: kind_of[text] for text in good})
    longer = max(candidate.values["width"], candidate.values["height"])
    if c.max_side is not None and longer > c.max_side:
        try:
            image = transforms.decode_rgb(pair.image, max_pixels=c.max_pixels)
        except transforms.ImageError as error:
            candidate.values[IMAGE_ERROR] = error.reason
            log.drop(candidate, ImageStep.name, error.reason)
            return None
        size = (c.max_side, c.max_side)
        image.thumbnail(size, transforms.Image.Resampling.BICUBIC, reducing_gap=None)
        data = transforms.encode(image, "JPEG", quality=c.jpeg_quality, optimize=True)
        image_format, pair = "JPEG", dataclasses.replace(pair, image=data)
    log.keep(candidate, image_format)
    metadata = {k: v for k, v in pair.metadata.items() if k not in config.drop_metadata}
    return schema.encode_record(dataclasses.replace(pair, metadata=metadata))


# Logs a pair that passed all steps and returns what is written for it; None writes nothing.
Encode = Callable[[Candidate, ShardLog], Any]


class Chain:
    """Applies the steps to the entries of one shard."""

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        steps: Sequence[type[Step]],
        source: SourceShard,
        log: ShardLog,
        encode: Encode,
        write: Callable[[Any], object],
        report: Callable[[int], None] = lambda pairs: None,
    ):
        """Loads the steps; every outcome goes to `log`, the results of `encode` go to `write`."""
        self._config, self._log, self._encode, self._write = config, log, encode, write
        self._report = report
        self._first = 0
        self._open_trial = functools.partial(Chain, config, steps, source, encode=encode)
        with log.clock("loading"):
            self._steps = [step(config, source) for step in steps]

    def run(self, entries: Sequence[Pair | Skipped]) -> None:
        """Filters the next entries of the shard."""
        candidates = []
        for row, entry in enumerate(entries, self._first):
            if isinstance(entry, Skipped):
                self._log.skip(entry, row)
            else:
                candidates.append(Candidate.of(entry, row))
        self._first += len(entries)
        self._report(len(entries) - len(candidates))
        self._advance(candidates, self._steps)

    def try_one(self, pair: Pair) -> None:
        """Processes one pair like `run`, without any effect; may kill this process."""
        self._trial._advance([Candidate.of(pair)], self._trial._steps)

    @functools.cached_property
    def _trial(self) -> Chain:
        return self._open_trial(log=ShardLog(self._config), write=lambda encoded: None)

    def close(self) -> dict[str, object]:
        """Ends the shard; returns the facts that the steps report about it."""
        facts: dict[str, object] = {}
        for step in self._steps:
            facts |= step.close()
        return facts

    def _advance(self, candidates: list[Candidate], steps: Sequence[Step]) -> None:
        """Applies the remaining steps to candidates, and writes the pairs that pass.

        Steps with a batch size get smaller groups, which makes the progress of slow steps visible.
        """
        for number, step in enumerate(steps):
            size = step.batch_size(self._config)
            if size is not None and size < len(candidates):
                for start in range(0, len(candidates), size):
                    self._advance(candidates[start : start + size], steps[number:])
                return
            if candidates:
                with self._log.clock(step.timer or step.name):
                    remaining = apply_step(step, candidates, self._config, self._log)
                self._report(len(candidates) - len(remaining))
                candidates = remaining
        with self._log.clock("writing"):
            for candidate in candidates:
                encoded = self._encode(candidate, self._log)
                if encoded is not None:
                    self._write(encoded)
        self._report(len(candidates))


def apply_step(
    step: Step, batch: Sequence[Candidate], config: ml_collections.ConfigDict, log: ShardLog
) -> list[Candidate]:
    """Measures a non-empty batch of pairs that passed the same steps, and drops the bad ones.

    Returns:
        The remaining pairs, with their good captions.
    """
    measured = dict(step.measure(batch))
    evidence = measured.pop(EVIDENCE, None) or [None] * len(batch)
    for name, column in measured.items():
        for candidate, value in zip(batch, column, strict=True):
            candidate.values[name] = value
    deciding: list[type[Step]] = [type(step)]
    if IMAGE_ERROR in measured and not isinstance(step, ImageStep):
        deciding.insert(0, ImageStep)
        for candidate in batch:
            if candidate.values[IMAGE_ERROR] is not None:  # the header stated a wrong size
                candidate.values |= {"width": None, "height": None}
    known = {}
    for name in batch[0].values:
        known[name] = [candidate.values[name] for candidate in batch]
    columns = Columns(known, len(batch))
    drops: list[tuple[str, str] | None] = [None] * len(batch)
    for decider in deciding:
        for reason, holds in decider.decide(columns, config).items():
            for i in np.flatnonzero(holds):
                drops[i] = drops[i] or (decider.name, reason)
    remaining = []
    for candidate, drop, shown in zip(batch, drops, evidence, strict=True):
        if drop is None:
            remaining.append(candidate)
        else:
            log.drop(candidate, *drop, evidence=shown if drop[0] == step.name else None)
    _narrow(step, remaining, config)
    return remaining


def _narrow(step: Step, batch: Sequence[Candidate], config: ml_collections.ConfigDict) -> None:
    """Removes the captions that fail the step from pairs that have several."""
    several = [c for c in batch if c.of_captions and len(c.captions) > 1]
    if several:
        names = several[0].of_captions
        flat = {n: list(itertools.chain(*(c.of_captions[n] for c in several))) for n in names}
        ends = np.cumsum([len(candidate.captions) for candidate in several])
        is_good = np.ones(int(ends[-1]), bool)
        for holds in step.decide(Columns(flat, len(is_good)), config).values():
            is_good &= ~holds
        for candidate, own in zip(several, np.split(is_good, ends[:-1]), strict=True):
            candidate.keep_captions(own.tolist())
    for candidate in batch:
        candidate.of_captions = {}
