"""Command: add model-generated captions to the records of a data set.

    python -m diht_jax.caption --model runs/captioner --input filtered --output recaptioned

`--model` is a work directory of a run with `config.captioning.weight`. Each shard of `--input`
(TFRecord, ArrayRecord or tars; also a URL) becomes a shard of the same name in `--output`. The new
captions follow the existing ones and have the kind `--kind`; training with
`config.data.captions=sample` draws one of all captions. Existing shards are skipped unless their
input has changed; to resume, run the same command again. `--task_index` and `--num_tasks` divide
the shards among the jobs of an array. All other fields are unchanged, including concept labels in
the records, and their vocabulary is copied. Label files next to the input shards are not copied;
they belong to the original records.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from concurrent import futures
from typing import Any

import numpy as np
from absl import flags, logging

from diht_jax import command_line
from diht_jax.data.index import update_index
from diht_jax.evaluation.embedding.files import check_settings
from diht_jax.input.transforms import ImageError, decode_rgb
from diht_jax.records.catalog import find_shards
from diht_jax.records.dataset_index import INDEX_NAME
from diht_jax.records.dataset_info import STATS_SUFFIX
from diht_jax.records.formats import open_source, open_writer
from diht_jax.records.samples import SampleError, caption_kinds, check_kind, with_captions
from diht_jax.records.schema import Record, encode_record
from diht_jax.records.shard_files import is_of_one_record
from diht_jax.records.sharded import ShardedRecords
from diht_jax.records.train_data import find_inputs, fingerprint_records
from diht_jax.records.vocabulary import STATS_KEY, find_vocabulary, write_vocabulary
from diht_jax.storage.files import read_object, remove_temporary_files, write_bytes
from diht_jax.storage.locks import lock_folder
from diht_jax.terminal import ProgressBar

SETTINGS_FILE = "captions.json"
# Images of a call of the model; captions do not depend on `--batch_size`.
_AT_ONCE = 1024


@dataclasses.dataclass(frozen=True)
class CaptionOptions:
    """Settings of the captions to write; `LoadedModel.caption` describes the last four."""

    kind: str = "synthetic"  # name of their kind in `config.data.caption_weights`
    num_captions: int = 1  # for each image; duplicates are dropped
    max_tokens: int | None = None
    top_k: int | None = None
    temperature: float = 1.0
    seed: int = 0

    def __post_init__(self):
        check_kind(self.kind, "--kind")
        if self.num_captions > 1 and self.top_k is None:
            raise ValueError(
                f"--num_captions={self.num_captions}: the likeliest caption is one; give --top_k, "
                "such as 10, for others"
            )


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_model_flags()
    command_line.define_encoding_flags()
    command_line.define_job_array_flags()
    flags.DEFINE_list("input", None, "Shards: a folder, a glob, files or URLs, or several.")
    flags.DEFINE_string("output", None, "Folder of the new shards.")
    flags.DEFINE_string("kind", "synthetic", "Of the new captions.")
    flags.DEFINE_integer(
        "num_captions", 1, "New captions of a picture; several need --top_k.", lower_bound=1
    )
    flags.DEFINE_integer("max_tokens", None, "Most tokens of a caption; unset: as in training.")
    flags.DEFINE_integer("top_k", None, "Likeliest tokens to draw from; unset: the likeliest.")
    flags.DEFINE_float("temperature", 1.0, "Logits are divided by it before a draw.")
    flags.DEFINE_integer("seed", 0, "Of the draws.", lower_bound=0)


def main() -> None:
    """Captions the shards of the flags."""
    given = flags.FLAGS
    command_line.require_flags("model", "input", "output")
    fields = [field.name for field in dataclasses.fields(CaptionOptions)]
    options = CaptionOptions(**command_line.values(*fields))
    shards = find_shards(given.input)  # reports a missing file before the model is loaded
    from diht_jax.loading import load_model

    model = load_model(given.model, **command_line.model_options(), batch_size=given.batch_size)
    caption_shards(
        model,
        shards,
        pathlib.Path(given.output),
        options,
        **command_line.values("task_index", "num_tasks", "num_threads"),
    )


def caption_shards(
    model: Any,
    shards: Iterable[str],
    output: pathlib.Path,
    options: CaptionOptions,
    *,
    task_index: int = 0,
    num_tasks: int = 1,
    num_threads: int | None = None,
) -> None:
    """Writes a shard with new captions for each input shard that is new or has changed.

    Args:
        model: a `LoadedModel` with a caption decoder.
        shards: paths or URLs of the input; new shards have the same names.
        output: folder of the new shards.
        task_index, num_tasks: this task writes every `num_tasks`-th shard from `task_index` on.

    Raises:
        ValueError: the model has no decoder, an option is out of range, two shards have the same
            name, an input shard is in `output`, `output` has captions of another model or of
            other options, another process works on this task, or a whole shard is damaged.
    """
    shards = list(shards)
    targets = {str(output / pathlib.PurePosixPath(shard).name): shard for shard in shards}
    if len(targets) < len(shards):
        raise ValueError("--input: two shards have the same name, and would be one in --output")
    for target, shard in targets.items():
        if pathlib.Path(target).absolute() == pathlib.Path(shard).absolute():
            raise ValueError(f"--output={output}: holds the input, {shard}; name another folder")
    # Raises ValueError without a decoder, and for an option that is out of range.
    model.caption(
        [], max_tokens=options.max_tokens, top_k=options.top_k, temperature=options.temperature
    )
    settings = {"model": model.fingerprint(decoder=True), **dataclasses.asdict(options)}
    check_settings(output, settings, name=SETTINGS_FILE, what="captions")
    own = list(targets)[task_index::num_tasks]
    names = tuple(f"{pathlib.Path(target).name}." for target in own)
    with lock_folder(output, "--output", f".task-{task_index}-of-{num_tasks}.lock"):
        remove_temporary_files(str(output), lambda name: f"{name}.".startswith(names))
        _describe_shards(own, [targets[target] for target in own], _copy_vocabulary(shards, output))
        missing = [target for target in own if not pathlib.Path(target).exists()]
        logging.info("%d shards, of which %d are there", len(own), len(own) - len(missing))
        if missing:
            (output / INDEX_NAME).unlink(missing_ok=True)
            sources = [targets[target] for target in missing]
            _write_shards(model, sources, missing, options, num_threads)
    if all(map(os.path.exists, targets)):  # the last job of an array
        update_index(output)


def _write_shards(
    model: Any,
    shards: Sequence[str],
    targets: Sequence[str],
    options: CaptionOptions,
    num_threads: int | None,
) -> None:
    source = open_source(list(shards))
    ends = np.cumsum(source.shard_lengths).tolist()
    write = functools.partial(_captions_of, model, options)
    unreadable, left_out = 0, collections.Counter[str]()
    with (
        futures.ThreadPoolExecutor(num_threads) as pool,
        ProgressBar(total=len(source), unit="image", desc="captions") as bar,
    ):
        for target, first, end in zip(targets, [0, *ends], ends, strict=False):
            with open_writer(target) as writer:
                for start in range(first, end, _AT_ONCE):
                    indices = range(start, min(start + _AT_ONCE, end))
                    records = _read_records(source, indices, left_out)
                    pictures = list(pool.map(functools.partial(_preprocess, model), records))
                    unreadable += sum(picture is None for picture in pictures)
                    for record, texts in zip(records, write(pictures, start - first), strict=True):
                        writer.write(encode_record(add_captions(record, texts, options.kind)))
                    bar.update(len(indices))
    if unreadable:
        logging.warning("%d pictures cannot be decoded: their records stay as they are", unreadable)
    if left_out:
        counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(left_out.items()))
        logging.warning("%d records are left out: %s", left_out.total(), counts)


def add_captions(record: Record, texts: Iterable[str], kind: str) -> Record:
    """Appends captions to a record, without empty ones and duplicates."""
    kind_of = caption_kinds(record)
    new = [text for text in dict.fromkeys(texts) if text and text not in kind_of]
    if not new:
        return record
    kind_of |= dict.fromkeys(new, kind)
    kind_of.pop("", None)  # if the caption was empty, the new one replaces it
    return with_captions(record, kind_of)


def _read_records(
    source: ShardedRecords, indices: Iterable[int], left_out: collections.Counter[str]
) -> list[Record]:
    """Reads the records that are pairs; counts others by reason, and logs the first of each reason.

    Raises errors that concern a whole shard.
    """
    records = []
    for index in indices:
        try:
            record = source.decode(source[index])
            caption_kinds(record)  # raises where captions or kinds are damaged
        except ValueError as error:
            if not is_of_one_record(error):
                raise
            reason = error.skipped.reason if isinstance(error, SampleError) else "damaged"
            if not left_out[reason]:
                logging.warning("left out: %s: record %d: %s", *source.locate(index), error)
            left_out[reason] += 1
        else:
            records.append(record)
    return records


def _describe_shards(
    targets: Sequence[str], sources: Sequence[str], counts: dict[str, Any]
) -> None:
    """Writes the statistics of new shards: `counts`, and the fingerprint of the input shard.

    A shard is removed if it was made from another version of its input shard.
    """
    made_of = fingerprint_records(open_source(sources)).shards if sources else ()
    for target, source, shard in zip(targets, sources, made_of, strict=True):
        path = f"{target}{STATS_SUFFIX}"
        before = (read_object(path) or {}).get("input", {}).get("shard", list(shard))
        if before != list(shard) and os.path.exists(target):
            logging.warning("%s: made again, since %s has changed", target, source)
            os.unlink(target)
        stats = {"counts": counts, "input": {"shard": shard}}
        write_bytes(path, json.dumps(stats).encode())


def _copy_vocabulary(shards: Sequence[str], output: pathlib.Path) -> dict[str, Any]:
    """Copies the vocabulary of concept labels within records to the folder of the new shards.

    Label files next to `shards` are ignored, because they belong only to these. Returns the
    `counts` of the new shards' statistics, which name the vocabulary, if there is one.
    """
    by_folder = collections.defaultdict(list)
    for shard in shards:
        by_folder[os.path.dirname(shard)].append(shard)
    within = []
    for folder, its_shards in by_folder.items():
        within += its_shards if find_inputs(folder) is None else ()
    vocabulary = find_vocabulary(within) if within else None
    if vocabulary is None:
        return {}
    write_vocabulary(output, vocabulary)
    return {STATS_KEY: vocabulary.describe()}


def _preprocess(model: Any, record: Record) -> np.ndarray | None:
    try:
        return model.preprocess(decode_rgb(record.image))
    except ImageError:
        return None


def _captions_of(
    model: Any, options: CaptionOptions, pictures: Sequence[np.ndarray | None], start: int
) -> list[list[str]]:
    """Generates captions of the images from index `start` of a shard on; none for a missing one."""
    found: list[list[str]] = [[] for _ in pictures]
    readable = [i for i, picture in enumerate(pictures) if picture is not None]
    pixels = [pictures[i] for i in readable]
    for number in range(options.num_captions):
        # The seed differs for each part of a shard and each caption of an image.
        seed = np.random.SeedSequence([options.seed, start, number]).generate_state(1)[0]
        texts = model.caption(
            pixels,
            max_tokens=options.max_tokens,
            top_k=options.top_k,
            temperature=options.temperature,
            seed=int(seed),
        )
        for i, text in zip(readable, texts, strict=True):
            found[i].append(text)
    return found


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
