"""CAT filtering of one shard: complexity and action of the caption, the image, the text in it.

Method: DiHT, arXiv 2301.02280, "Complexity, Action, and Text-spotting (CAT)". The command
`data_prep.filter` and `configs/prep/` use it. How captions are parsed belongs in `captions.py`,
how text is spotted in `text_spotting.py`, files in `shards.py`, what concept distillation needs of
the graphs in `concept_files.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import itertools
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import ml_collections
from ml_collections.config_dict import placeholder

from data_prep import shards, text_spotting_stage
from data_prep.caption_graph import CaptionGraph
from data_prep.concept_files import (
    CONCEPTS_SUFFIX,
    ConceptLog,
    concept_path,
    find_mentions,
)
from data_prep.engine import Report
from data_prep.funnel import Funnel
from data_prep.sources import default_source
from data_prep.text_spotting import TextSpotter
from data_prep.text_spotting_weights import easyocr_version
from diht_jax.data import images, schema
from diht_jax.data.readers import Skipped, SourceShard, read_pairs
from diht_jax.data.schema import Pair
from diht_jax.data.tfrecord import TFRecordWriter

_Entry = TypeVar("_Entry")

# Raised whenever the same config comes to mean other records.
_FORMAT_VERSION = 2
# Of the config, what says where and how fast, but not what is written.
_NOT_HASHED = ("input", "output", "num_workers", "batch_size")
_CAPTION_MODULES = ("caption*.py",)
_SPOTTING_MODULES = ("text_spotting.py", "text_spotting_match.py", "text_spotting_ocr.py")


class _Candidate(NamedTuple):
    """A pair on its way.

    Attributes:
        pair: as it came.
        captions: those that are still good.
        graphs: of these captions; none where captions are not parsed.
        header: format, width and height of the image once it was checked.
    """

    pair: Pair
    captions: list[str]
    graphs: list[CaptionGraph]
    header: tuple[str, int, int] | None = None


def default_config() -> ml_collections.ConfigDict:
    """Every key of a filter config, with its default."""
    c = ml_collections.ConfigDict()
    c.input = placeholder(str)  # any source of docs/data.md; several are separated by commas
    c.output = placeholder(str)  # folder of the shards
    c.source = default_source()
    c.dataset_name = "pairs"  # with the split it makes the names of the shards
    c.split = "train"

    c.complexity = True  # C of CAT: drop captions of a complexity under min_complexity
    c.min_complexity = 1
    c.action = True  # A of CAT: drop captions without an action
    c.text_spotting = True  # T of CAT: drop captions that their picture shows as text
    c.spotter = text_spotting_stage.default_spotter()
    c.concepts = True  # count and keep objects and attributes of the captions, for data_prep.label

    c.image = ml_collections.ConfigDict()
    c.image.max_pixels = images.MAX_PIXELS  # width times height; larger ones are not decoded
    c.image.min_side = 1  # px; smaller ones are dropped
    c.image.max_side = placeholder(
        int
    )  # px; larger ones are shrunk and written as JPEG; None keeps all bytes
    c.image.jpeg_quality = 90  # of those that are shrunk

    c.drop_metadata = ("exif",)  # fields that are not worth their bytes
    c.samples_per_outcome = 50  # examples in the statistics, to look at
    c.seed = 0  # of the choice of examples
    c.num_workers = placeholder(int)  # processes; None: one per core, 0: no other process
    c.batch_size = 256  # pairs whose captions are parsed together
    return c


def check_config(config: ml_collections.ConfigDict) -> None:
    """Checks what types cannot tell.

    Raises:
        ValueError: a value is out of its range.
    """
    least = {
        "min_complexity": (config.min_complexity, 0),
        "image.max_pixels": (config.image.max_pixels, 1),
        "image.min_side": (config.image.min_side, 1),
        "image.max_side": (config.image.max_side, 1),
        "samples_per_outcome": (config.samples_per_outcome, 0),
        "batch_size": (config.batch_size, 1),
    }
    for name, (value, minimum) in least.items():
        if value is not None and (not isinstance(value, int) or value < minimum):
            raise ValueError(f"config.{name}={value!r}; expected an integer of at least {minimum}")
    text_spotting_stage.check_spotter(config.spotter)
    if not 1 <= config.image.jpeg_quality <= 95:
        raise ValueError(f"config.image.jpeg_quality={config.image.jpeg_quality}; expected 1 to 95")


def record_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The part of the config that decides what is written, as plain JSON-able values."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _NOT_HASHED}
    spotter = settings.pop("spotter")
    if config.text_spotting:
        not_hashed = text_spotting_stage.NOT_HASHED
        settings["spotter"] = {k: v for k, v in spotter.items() if k not in not_hashed}
    return settings


def hash_config(config: ml_collections.ConfigDict) -> str:
    """The fingerprint of all that decides what is written, the rules included.

    Raises:
        ValueError: text-spotting is asked for, and EasyOCR is not installed.
    """
    settings = record_settings(config)
    settings["format_version"] = _FORMAT_VERSION
    if parses_captions(config):
        settings["caption_rules"] = _hash_modules(_CAPTION_MODULES)
    if config.text_spotting:
        settings["spotting_rules"] = _hash_modules(_SPOTTING_MODULES)
        settings["easyocr"] = easyocr_version()
    return shards.hash_config(settings)


def _hash_modules(patterns: Sequence[str]) -> str:
    # Otherwise a run after a change of the rules would take the shards of before for its own.
    folder = pathlib.Path(__file__).parent
    rules = sorted(path for pattern in patterns for path in folder.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in rules)).hexdigest()


def parses_captions(config: ml_collections.ConfigDict) -> bool:
    """Whether the captions matter; otherwise the parser is not even loaded."""
    return _drops_captions(config) or config.concepts


def caption_limits(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """C and A as arguments of `captions.cat_reason`."""
    return {
        "min_complexity": config.min_complexity if config.complexity else 0,
        "require_action": config.action,
    }


def filter_shard(
    task: shards.ShardTask, report: Report, *, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """Does one task of the filter: the function that `engine.run_tasks` calls.

    Args:
        task: source and output.
        report: told how many pairs are done.
        config: of `default_config`.

    Returns:
        The shard's statistics.

    Raises:
        ValueError: the source is damaged.
    """
    return shards.run_task(
        task,
        functools.partial(_process, config=config, report=report),
        beside=(CONCEPTS_SUFFIX,) if config.concepts else (),
    )


def _process(
    source: SourceShard,
    writer: TFRecordWriter,
    *,
    config: ml_collections.ConfigDict,
    report: Report,
) -> dict[str, Any]:
    funnel = Funnel(config.samples_per_outcome, config.seed)
    concepts = ConceptLog()
    spotter = None
    if config.text_spotting:
        spotter = text_spotting_stage.open_spotter(config.spotter, config.image.max_pixels, source)
    for chunk in _chunks(read_pairs(source), config.batch_size):
        pairs = []
        for entry in chunk:
            if isinstance(entry, Skipped):
                funnel.drop("source", entry.reason, entry.key, entry.detail)
            else:
                pairs.append(entry)
        candidates = list(_check_images(_filter_captions(pairs, config, funnel), config, funnel))
        report(len(chunk) - len(candidates))
        # In smaller groups from here on: text-spotting takes its time.
        for group in _chunks(iter(candidates), config.spotter.batch_size):
            good = group if spotter is None else _spot_text(group, spotter, funnel)
            for candidate in good:
                if _write(candidate, writer, config, funnel) and config.concepts:
                    concepts.add(find_mentions(candidate.graphs))
            report(len(group))
    if not config.concepts:
        return funnel.to_json()
    concepts.write(concept_path(writer.path))
    return funnel.to_json() | {"concepts": concepts.counts()}


def _filter_captions(
    pairs: Sequence[Pair], config: ml_collections.ConfigDict, funnel: Funnel
) -> Iterator[_Candidate]:
    """Pairs with at least one good caption."""
    captions = [_all_captions(pair) for pair in pairs]
    if not parses_captions(config):
        for pair, texts in zip(pairs, captions, strict=True):
            yield _Candidate(pair, texts, [])
        return
    from data_prep.captions import cat_reason, parse_captions

    limits = caption_limits(config)
    parsed = iter(parse_captions(list(itertools.chain(*captions))))
    for pair, texts in zip(pairs, captions, strict=True):
        graphs = list(itertools.islice(parsed, len(texts)))
        reasons = [cat_reason(graph, **limits) for graph in graphs]
        if not _drops_captions(config):
            reasons = [None] * len(texts)
        good = _choose(_Candidate(pair, texts, graphs), [reason is None for reason in reasons])
        if good.captions:
            yield good
        else:
            funnel.drop("caption", reasons[0], pair.key, pair.caption)


def _check_images(
    candidates: Iterable[_Candidate], config: ml_collections.ConfigDict, funnel: Funnel
) -> Iterator[_Candidate]:
    """Those whose image can be decoded and is large enough."""
    limits = config.image
    for candidate in candidates:
        pair = candidate.pair
        try:
            header = images.check_readable(pair.image, max_pixels=limits.max_pixels)
        except images.ImageError as error:
            funnel.drop("image", error.reason, pair.key, pair.caption)
            continue
        if min(header[1:]) < limits.min_side:
            funnel.drop("image", "too_small", pair.key, pair.caption)
        else:
            yield candidate._replace(header=header)


def _spot_text(
    candidates: Sequence[_Candidate], spotter: TextSpotter, funnel: Funnel
) -> Iterator[_Candidate]:
    """Those of whose captions at least one does not stand in the picture."""
    verdicts = spotter.judge([c.pair.image for c in candidates], [c.captions for c in candidates])
    funnel.text_spotting.update(text_spotting_stage.count_verdicts(verdicts))
    for candidate, verdict in zip(candidates, verdicts, strict=True):
        pair = candidate.pair
        good = _choose(candidate, [match is None for match in verdict.matches])
        if verdict.error is not None:
            funnel.drop("image", verdict.error.reason, pair.key, pair.caption)
        elif good.captions:
            yield good
        else:
            funnel.drop(
                text_spotting_stage.STAGE, text_spotting_stage.REASON, pair.key, pair.caption
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


def _drops_captions(config: ml_collections.ConfigDict) -> bool:
    return config.complexity or config.action


def _write(
    candidate: _Candidate,
    writer: TFRecordWriter,
    config: ml_collections.ConfigDict,
    funnel: Funnel,
) -> bool:
    """Whether the pair was written."""
    pair = _narrow(candidate)
    name, *size = candidate.header
    if config.image.max_side is not None and max(size) > config.image.max_side:
        try:
            name, data = "JPEG", _shrink(pair.image, config)
        except images.ImageError as error:
            funnel.drop("image", error.reason, pair.key, pair.caption)
            return False
        pair = dataclasses.replace(pair, image=data)
    metadata = {k: v for k, v in pair.metadata.items() if k not in config.drop_metadata}
    writer.write(schema.encode_record(dataclasses.replace(pair, metadata=metadata)))
    funnel.keep(pair.key, pair.caption, name)
    return True


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
    image = images.decode_rgb(data, max_pixels=config.image.max_pixels)
    side = config.image.max_side
    image.thumbnail((side, side), images.Image.Resampling.BICUBIC, reducing_gap=None)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=config.image.jpeg_quality, optimize=True)
    return buffer.getvalue()


def _chunks(entries: Iterator[_Entry], size: int) -> Iterator[list[_Entry]]:
    while chunk := list(itertools.islice(entries, size)):
        yield chunk
