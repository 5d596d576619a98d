"""CAT filtering of one shard: complexity and action of the caption, the image, the text in it.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". The command
`data_prep.filter` uses it. How captions are parsed belongs in `captions.py`, how text is spotted in
`text_spotting.py`, files in `shards.py`, what is recorded in `shard_log.py`, the config in
`cat_config.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections

from data_prep.captions.cache import CaptionMemo
from data_prep.captions.graph import CaptionGraph, cat_reason
from data_prep.captions.mentions import CONCEPTS_SUFFIX
from data_prep.filtering import config as filter_config
from data_prep.filtering.kept import KEPT_SUFFIX
from data_prep.filtering.shard_log import DROPPED_SUFFIX, ShardLog
from data_prep.jobs import shards
from data_prep.jobs.engine import Report
from data_prep.sources import img2dataset
from data_prep.text_spotting import config as spotter_config
from data_prep.text_spotting.spotter import Spot, TextSpotter
from diht_jax.data.images import decode
from diht_jax.data.readers.registry import Skipped, SourceShard, read_pairs
from diht_jax.data.records import schema
from diht_jax.data.records.schema import Pair
from diht_jax.data.records.tfrecord import TFRecordWriter


class _Candidate(NamedTuple):
    """A pair on its way.

    Attributes:
        pair: as it came.
        captions: those that are still good.
        graphs: of these captions; none where captions are not parsed.
        first_graph: of the first caption of all; None where captions are not parsed.
        header: format, width and height of the image once it was checked.
        spots: what was spotted in the image.
    """

    pair: Pair
    captions: list[str]
    graphs: list[CaptionGraph]
    first_graph: CaptionGraph | None = None
    header: tuple[str, int, int] | None = None
    spots: tuple[Spot, ...] = ()


def process_shard(
    source: SourceShard,
    output: str,
    *,
    config: ml_collections.ConfigDict,
    report: Report = lambda pairs: None,
) -> dict[str, Any]:
    """One source shard in, one TFRecord shard out, with its index and statistics.

    Nothing of the output is visible until it is complete, and what is complete already is not done
    again.

    Args:
        source: of `sources.list_sources`.
        output: path of the shard; files with the same name and further endings lie beside it.
        config: of `config.default_config`.
        report: told how many pairs are done, now and then.

    Returns:
        The shard's statistics, as they lie in OUTPUT.stats.json.

    Raises:
        ValueError: the source is damaged.
    """
    task = shards.ShardTask(source, output, filter_config.hash_config(config))
    return shards.load_finished(task) or filter_shard(task, report, config=config)


def filter_shard(
    task: shards.ShardTask, report: Report, *, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Does one task of the filter: the function that `engine.run_tasks` calls.

    Args:
        task: source and output.
        report: told how many pairs are done.
        config: of `config.default_config`.

    Returns:
        The shard's statistics.

    Raises:
        ValueError: the source is damaged.
    """
    return shards.run_task(
        task,
        functools.partial(_process, config=config, report=report),
        beside=(KEPT_SUFFIX, DROPPED_SUFFIX, *((CONCEPTS_SUFFIX,) if config.concepts else ())),
    )


def _process(
    source: SourceShard,
    writer: TFRecordWriter,
    *,
    config: ml_collections.ConfigDict,
    report: Report,
) -> dict[str, Any]:
    log = ShardLog(config)
    log.download = img2dataset.read_download_stats(source)
    memo = CaptionMemo()
    if filter_config.parses_captions(config):
        with log.clock("loading"):
            memo.parse([])
    spotter = None
    if config.text_spotting:
        spotter = spotter_config.open_spotter(config.spotter, config.image.max_pixels, source)
    entries = _with_sidecar(source)
    while chunk := _next_chunk(entries, config.batch_size, log):
        pairs = []
        for entry in chunk:
            if isinstance(entry, Skipped):
                log.skip(entry)
            else:
                pairs.append(entry)
        with log.clock("captions"):
            parsed = list(_filter_captions(pairs, memo, config, log))
        with log.clock("images"):
            candidates = list(_check_images(parsed, config, log))
        report(len(chunk) - len(candidates))
        # In smaller groups from here on: text-spotting takes its time.
        size = config.spotter.batch_size
        for start in range(0, len(candidates), size):
            group = candidates[start : start + size]
            with log.clock("text"):
                good = group if spotter is None else list(_spot_text(group, spotter, log))
            with log.clock("writing"):
                for candidate in good:
                    _write(candidate, writer, config, log)
            report(len(group))
    return log.write(writer.path)


def _next_chunk(
    entries: Iterator[Pair | Skipped], size: int, log: ShardLog
) -> list[Pair | Skipped]:
    with log.clock("reading"):
        return list(itertools.islice(entries, size))


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


def _filter_captions(
    pairs: Sequence[Pair], memo: CaptionMemo, config: ml_collections.ConfigDict, log: ShardLog
) -> Iterator[_Candidate]:
    """Pairs with at least one good caption."""
    captions = [_all_captions(pair) for pair in pairs]
    if not filter_config.parses_captions(config):
        for pair, texts in zip(pairs, captions, strict=True):
            yield _Candidate(pair, texts, [])
        return
    limits = filter_config.caption_limits(config)
    parsed = iter(memo.parse(list(itertools.chain(*captions))))
    for pair, texts in zip(pairs, captions, strict=True):
        graphs = list(itertools.islice(parsed, len(texts)))
        reasons = [cat_reason(graph, **limits) for graph in graphs]
        if not filter_config.drops_captions(config):
            reasons = [None] * len(texts)
        candidate = _Candidate(pair, texts, graphs, graphs[0])
        good = _choose(candidate, [reason is None for reason in reasons])
        if good.captions:
            yield good
        else:
            log.drop("caption", reasons[0], pair, graphs[0])


def _check_images(
    candidates: Iterable[_Candidate], config: ml_collections.ConfigDict, log: ShardLog
) -> Iterator[_Candidate]:
    """Those whose image can be decoded and is large enough."""
    limits = config.image
    for candidate in candidates:
        pair = candidate.pair
        try:
            header = decode.check_readable(pair.image, max_pixels=limits.max_pixels)
        except decode.ImageError as error:
            log.drop("image", error.reason, pair, candidate.first_graph)
            continue
        if min(header[1:]) < limits.min_side:
            log.drop("image", "too_small", pair, candidate.first_graph, size=header[1:])
        else:
            yield candidate._replace(header=header)


def _spot_text(
    candidates: Sequence[_Candidate], spotter: TextSpotter, log: ShardLog
) -> Iterator[_Candidate]:
    """Those of whose captions at least one does not stand in the picture."""
    verdicts = spotter.judge([c.pair.image for c in candidates], [c.captions for c in candidates])
    counts = spotter_config.count_verdicts(verdicts)
    log.funnel.text_spotting.update(counts)
    if log.spotter is None and (counts["gated"] or counts["read"]):
        log.spotter = spotter_config.describe_machine(spotter.settings)
    for candidate, verdict in zip(candidates, verdicts, strict=True):
        pair, graph = candidate.pair, candidate.first_graph
        good = _choose(candidate, [match is None for match in verdict.matches])
        if verdict.error is not None:
            log.drop("image", verdict.error.reason, pair, graph)
        elif good.captions:
            yield good._replace(spots=verdict.spots)
        else:
            log.drop(
                spotter_config.STAGE,
                spotter_config.REASON,
                pair,
                graph,
                size=candidate.header[1:],
                spots=verdict.spots,
                match=verdict.matches[0],
            )


def _choose(candidate: _Candidate, is_good: Sequence[bool]) -> _Candidate:
    """The candidate with its good captions only."""
    graphs = candidate.graphs and list(itertools.compress(candidate.graphs, is_good))
    return candidate._replace(
        captions=list(itertools.compress(candidate.captions, is_good)), graphs=graphs
    )


def _all_captions(pair: Pair) -> list[str]:
    several = pair.metadata.get("captions", ())
    return [pair.caption, *(text for text in several if text != pair.caption)]


def _write(
    candidate: _Candidate,
    writer: TFRecordWriter,
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
            log.drop("image", error.reason, pair, candidate.first_graph)
            return
        pair = dataclasses.replace(pair, image=data)
    metadata = {k: v for k, v in pair.metadata.items() if k not in config.drop_metadata}
    writer.write(schema.encode_record(dataclasses.replace(pair, metadata=metadata)))
    log.keep(original, candidate.graphs, name, tuple(size), candidate.spots)


def _narrow(candidate: _Candidate) -> Pair:
    """The pair without the captions that are no longer good."""
    pair, captions = candidate.pair, candidate.captions
    if len(captions) == len(_all_captions(pair)):
        return pair
    metadata = {k: v for k, v in pair.metadata.items() if k != "captions"}
    if len(captions) > 1:
        metadata["captions"] = captions
    return dataclasses.replace(pair, caption=captions[0], metadata=metadata)


def _shrink(data: bytes, config: ml_collections.ConfigDict) -> bytes:
    image = decode.decode_rgb(data, max_pixels=config.image.max_pixels)
    side = config.image.max_side
    image.thumbnail((side, side), decode.Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=config.image.jpeg_quality, optimize=True)
    return buffer.getvalue()
