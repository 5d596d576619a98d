"""Files that our commands write and read again: damage is detected or repaired.

`prepare` writes one small file of every kind. A case copies the files that a command reads, damages
one of them, and runs the command or its reader. The result must be that of the intact files, or an
error that names the file.

A user's edit is accepted if the file stays valid and only states something else: in
`config.json` and `metrics.jsonl` of a run, and in `open_clip_config.json` next to a torch file.

Files that no command of ours reads are left out: pages, pictures, cards and lists for people, and
files for other programs (`dataset_info.json`, StableHLO, ONNX).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging
from hypothesis.strategies import sampled_from as one

from data_prep.captions.mentions import read_mentions
from data_prep.duplicates import image_hashes, precomputed
from data_prep.duplicates import job as duplicates
from data_prep.duplicates.table import Lookup
from data_prep.filter import run_filter
from data_prep.filtering.replay import Replay
from data_prep.label import run_label
from data_prep.labelling import summary
from data_prep.reports.__main__ import merge_reports
from data_prep.text_spotting.readings import Reading, SpotCache
from diht_jax.evaluation.embedding.picture_index import PictureIndex
from diht_jax.evaluation.results import read_results
from diht_jax.loading import read_model
from diht_jax.readers import registry
from diht_jax.readers.parquet import explain_errors, open_parquet, read_rows
from diht_jax.records.formats import open_source
from diht_jax.records.labels.clip_embeddings import ClipEmbeddings
from diht_jax.records.labels.shards import open_labels
from diht_jax.records.vocabulary import find_train_vocabulary
from diht_jax.training.monitoring.metrics import WallTime, read_metrics
from diht_jax.training.workdir.checkpoint import Checkpointer
from diht_jax.weights.source import read_weights
from tests.data_prep.duplicates.jobs import duplicates_config
from tests.data_prep.filtering.jobs import snapshot
from tests.fuzz import outputs
from tests.fuzz.damage import Draw, damage_file
from tests.fuzz.judge import ERROR, SUCCESS, Refused, attempt, require

_INDEXED = r"[^/]*\.(tfrecord|array_record|tar)(\.idx)?|dataset.index"
_BASE = pathlib.Path()  # the intact files: folder "0", and "1" with other contents


class _Use(NamedTuple):
    """A reader of written files."""

    folders: str  # the folders it reads, separated by spaces; a file of the last one is damaged
    files: str  # a pattern of their paths
    run: Callable[[pathlib.Path], Any]  # reads the folder of these folders
    edited: str = "(?!)"  # a pattern of the files that users edit
    stands_alone: bool = False  # another file in its place is valid, not damaged


def prepare(base: pathlib.Path) -> None:
    """Writes all files twice: from different pairs and with different weights."""
    global _BASE
    _BASE = base
    logging.set_verbosity(logging.FATAL)
    summary.draw_curves = lambda heads: None  # drawing takes most of the time, and nothing reads it
    with contextlib.redirect_stdout(io.StringIO()):
        for seed in (0, 1):
            outputs.write_all(base / str(seed), seed)


def _read_shards(name: str, folder: pathlib.Path) -> list[Any]:
    source, found = open_source(folder / name), []
    for index in range(len(source)):
        try:
            found.append(source.decode(source[index]))
        except ValueError as error:  # as callers do
            raise ValueError(f"{source.locate(index)}: {error}") from error
    return found


def _read_table(folder: pathlib.Path) -> Any:
    found = []
    for path in (str(folder / "table" / f"{part}.parquet") for part in range(2)):
        with explain_errors(path, lambda: "damaged"):
            found += read_rows(path, open_parquet(path))
    return found


def _read_merged(folder: pathlib.Path) -> Any:
    return _read_shards("merged", folder), find_train_vocabulary(str(folder / "merged"))


def _succeed(failures: dict[str, str]) -> None:
    """Raises an error with the reasons if any part of a job failed."""
    if failures:
        raise ValueError("\n".join(f"{task}: {reason}" for task, reason in failures.items()))


def _filter_again(name: str, folder: pathlib.Path, **changes: Any) -> Any:
    config = outputs.filter_configs(_BASE / "0", folder)[name]
    config.update(changes)
    _succeed(run_filter(config))
    report = json.loads((folder / name / "report.json").read_text())
    facts = {key: report[key] for key in ("counts", "measures", "samples")}
    # Leave out the statistics, whose damaged parts the job need not read.
    data = {path: data for path, data in snapshot(folder / name).items() if ".json" not in path}
    return facts, data


def _gather(name: str, folder: pathlib.Path) -> Any:
    """Returns the job's report over all parts."""
    (folder / name / "report.json").unlink()
    return _filter_again(name, folder)


def _reshard(folder: pathlib.Path) -> Any:
    _filter_again("kept", folder, examples_per_shard=4)
    return _read_shards("kept", folder), _mentions(folder)


def _mentions(folder: pathlib.Path) -> Any:
    shards = sorted((folder / "kept").glob("*.tfrecord"))
    return [read_mentions(shard, kind) for shard in shards for kind in ("objects", "attributes")]


def _replay(folder: pathlib.Path) -> Any:
    result = Replay(str(folder / "kept")).run(str(folder / "lists"))
    return result, snapshot(folder / "lists")


def _join(folder: pathlib.Path) -> Any:
    records = open_source(folder / "kept")
    labels = open_labels(str(folder / "labels"), records, "labels")
    joined = [labels.join(records.decode(records[i]), i) for i in range(len(records))]
    return joined, find_train_vocabulary(str(folder / "kept"), str(folder / "labels"))


def _join_clips(folder: pathlib.Path) -> Any:
    records = open_source(folder / "kept")
    views = ClipEmbeddings.open(str(folder / "clips"), records, "labels")
    if views is None:
        raise ValueError(f"{folder / 'clips'}: none, as training finds as well")
    return [vars(views.join(records.decode(records[i]), i)) for i in range(len(records))]


def _label_again(folder: pathlib.Path, **changes: Any) -> Any:
    (folder / "labels" / "stats.json").unlink(missing_ok=True)
    _succeed(run_label(outputs.labels_config(_BASE / "0", folder, **changes)))
    return _join(folder), json.loads((folder / "labels" / "stats.json").read_text())["labelled"]


def _search_again(folder: pathlib.Path, **changes: Any) -> Any:
    config = duplicates_config(_BASE / "0" / "in", folder / "duplicates", **changes)
    _succeed(duplicates.run(config))
    return _look_up(folder)


def _look_up(folder: pathlib.Path) -> Any:
    lookup = Lookup(folder / "duplicates")
    return lookup.digest, lookup.find(outputs.KEYS)


def _read_embedded(kind: str, folder: pathlib.Path) -> Any:
    shards = registry.list_shards(str(_BASE / "0" / "in" / "*.tar"))
    return [precomputed.read_of_shard(str(folder / kind), shard) for shard in shards]


def _embed_again(folder: pathlib.Path) -> Any:
    return outputs.embed(_BASE / "0", folder, "npz"), _read_embedded("npz", folder)


def _look_for(folder: pathlib.Path) -> Any:
    index = PictureIndex(folder / "index")
    matches = sum(index.search(outputs.Model().encode_text(["a", "b"]), 8), [])
    found = [(m.key, m.caption, round(m.similarity, 4), index.picture(*m.place)) for m in matches]
    return sorted(found)  # equal ones are in the order of the parts


def _update_again(folder: pathlib.Path) -> Any:
    outputs.bring_up_to_date(_BASE / "0", folder)
    return _look_for(folder)


def _caption_again(folder: pathlib.Path) -> Any:
    outputs.caption(folder)
    return _read_shards("captioned", folder)


def _load_run(folder: pathlib.Path) -> Any:
    model = read_model(folder / "run")
    return model, model.tokenizer.tokenize("a red dog", 8)


def _fetch(folder: pathlib.Path) -> Any:
    staged = outputs.stage(folder, "fetched")
    staged.fetch()
    return dataclasses.replace(read_model(staged.folder), step=None)


def _resume(folder: pathlib.Path) -> Any:
    target = outputs.train_state(0, read_weights(_BASE / "0" / "weights.safetensors").params)
    checkpointer = Checkpointer(folder / "run", keep_last=2)
    state, position, _ = checkpointer.restore(target)
    checkpointer.close()
    assert position == outputs.POSITION
    return dataclasses.replace(state, step=None)  # the state of the step before is equal otherwise


def _read_progress(folder: pathlib.Path) -> Any:
    times = WallTime(folder / "run", 2, clock=lambda: 9.0)
    return read_metrics(folder / "run"), times.scalars()


def _read_model(form: str, folder: pathlib.Path) -> Any:
    model = read_weights(folder / form)
    tokens = model.tokenizer and model.tokenizer.tokenize("a red dog", 8)
    return dataclasses.replace(model, sha256=None), tokens


def _read_cache(folder: pathlib.Path) -> Any:
    """Returns the cached readings; missing ones are read again from the images."""
    known, whole = (SpotCache(f / "readings", {}, "0.tar") for f in (folder, _BASE / "0"))
    found = [(known.get(name), whole.get(name)) for name in outputs.PICTURES[0]]
    return [again if own == Reading() else own for own, again in found]


def _read_hashes(folder: pathlib.Path) -> Any:
    image_hashes.open_index.cache_clear()
    index = image_hashes.open_index(str(folder / "readings" / "set.npz"))
    return index.digest(), index.keys.tolist()


_DATA = r".*\.(arrow|idx|index|json|npz|parquet|tfrecord|tsv)"
_PARTS = r"parts/.*\.(json|parquet|tsv)|[^/]*stats\.json|report\.json"
_USES = {
    # Record shards of every format, their indices and vocabulary; filtered tables.
    "records": [
        *(
            _Use(name, _INDEXED, functools.partial(_read_shards, name))
            for name in ("kept", "array", "tars", "captioned")
        ),
        _Use("merged", _INDEXED + r"|.*stats\.json|.*\.tsv", _read_merged),
        _Use("table", r"\d\.parquet", _read_table, stands_alone=True),
    ],
    # Files of a filter job's parts, for resuming, replays and reports.
    "filter": [
        _Use("kept", _PARTS, functools.partial(_gather, "kept")),
        _Use("table", r".*(json|tsv)|decisions/.*", functools.partial(_gather, "table")),
        _Use("kept", r"parts/.*|[^/]*\.tfrecord.*", _reshard),
        _Use("kept", r"[^/]*\.concepts\.npz", _mentions),
        _Use("kept", _PARTS, _replay),
        _Use("kept", "report.json", lambda f: merge_reports([f / "kept"]), stands_alone=True),
        _Use("kept", _PARTS, lambda f: merge_reports([f / "kept"] * 2)["samples"]),
    ],
    # Labels, embeddings and heads, for training and for resuming the job.
    "labels": [
        _Use("kept labels", r"labels/.*(tfrecord|idx|index)|.*\.tsv", _join),
        _Use("kept labels", _DATA, _label_again),
        _Use("kept labels", _DATA, functools.partial(_label_again, top_k=3)),
        _Use("kept clips", _DATA, _join_clips),
    ],
    # Files from which a duplicate search resumes.
    "duplicates": [
        _Use("duplicates", _DATA, _search_again),
        _Use("duplicates", _DATA, functools.partial(_search_again, threshold=0.5)),
    ],
    # Embedding files, the index of a search, captioned shards.
    "embeddings": [
        *(_Use(k, ".*", functools.partial(_read_embedded, k)) for k in ("npz", "parquet")),
        _Use("npz", ".*", _embed_again),
        _Use("index", ".*(arrow|json|thumbnails)", _look_for),
        _Use("index", ".*(arrow|json|thumbnails)", _update_again),
        _Use("kept captioned", "(?!dataset).*(json|tfrecord|idx)", _caption_again),
    ],
    # A training work directory: the model, the state to resume from, the metrics.
    "runs": [
        _Use("run", "config.json|checkpoints/2/.*|tokenizer/.*", _load_run, "config.json"),
        _Use("run", "checkpoints/.*", _resume),
        _Use("stored", "config.json|(manifests|checkpoints|tokenizer)/.*", _fetch, "config.json"),
        _Use("run", "metrics.jsonl|wall_time.json", _read_progress, "metrics.jsonl"),
    ],
    # An exported model with its settings and tokenizer.
    "exports": [
        _Use("clip", ".*(pt|json)", functools.partial(_read_model, "clip"), ".*json", True),
        *(
            _Use(form, ".*(safetensors|json|txt)", functools.partial(_read_model, form))
            for form in ("open_clip", "huggingface", "safetensors", "own_tokenizer")
        ),
    ],
    # The filter's look-ups of duplicates; results, cached readings, image hashes.
    "others": [
        _Use("duplicates", r"dropped\.arrow|duplicates\.json", _look_up),
        _Use("results", ".*", lambda f: read_results(f / "results/a.json"), stands_alone=True),
        _Use("readings", ".*jsonl|settings.json", _read_cache),
        _Use("readings", ".*npz", _read_hashes, stands_alone=True),
    ],
}


@functools.cache
def _expected(use: _Use) -> Any:
    """Returns the result of the intact files."""
    folder = _BASE / "whole"
    try:
        for name in use.folders.split():
            shutil.copytree(_BASE / "0" / name, folder / name)
        return outputs.plain(use.run(folder))
    finally:
        shutil.rmtree(folder)


@functools.cache
def _kinds(use: _Use) -> dict[str, list[str]]:
    """Groups the files that a use reads by kind: the path without numbers and hashes."""
    found: dict[str, list[str]] = {}
    base = _BASE / "0"
    for path in sorted((base / use.folders.split()[-1]).rglob("*")):
        name = path.relative_to(base).as_posix()
        if path.is_file() and re.fullmatch(use.files, name.partition("/")[2]):
            found.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "#", name), []).append(name)
    return found


def _judge(uses: str, draw: Draw, folder: pathlib.Path) -> str:
    """Judges one damaged file that one of the uses reads."""
    use = draw(one(_USES[uses]))
    for name in use.folders.split():
        shutil.copytree(_BASE / "0" / name, folder / name)
    expected = _expected(use)
    kinds = _kinds(use)
    names = kinds[draw(one(sorted(kinds)))]
    name = draw(one(names))
    path, foreign = folder / name, _BASE / "1" / name
    others = [folder / other for other in names if other != name]
    others = others or ([foreign] if foreign.exists() else [])
    damage_file(draw, path, [] if use.stands_alone else others)

    def run() -> Any:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return outputs.plain(use.run(folder))
        except OSError as error:
            raise ValueError(str(error)) from error

    names = [path.name]
    if not path.exists():  # a folder that lacks a file is reported as incomplete
        names.append(str(folder / use.folders.split()[-1]))
    names += re.findall(r"^.*/checkpoints/\d+/", str(path))  # Orbax's files count as one
    found = attempt(run, *names)
    if isinstance(found, Refused):
        return ERROR
    is_edit = re.search(use.edited, path.name)
    require(found == expected or bool(is_edit), f"{path} was damaged in silence")
    return SUCCESS


# The properties by name: `check_runs` is the property "runs".
globals().update({f"check_{uses}": functools.partial(_judge, uses) for uses in _USES})
