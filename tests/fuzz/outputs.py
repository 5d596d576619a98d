"""Writes one small file of every kind that our commands write and read again, by the commands."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import shutil
import types
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.duplicates import image_hashes
from data_prep.duplicates import job as duplicates
from data_prep.filter import run_filter
from data_prep.label import run_label
from data_prep.text_spotting.readings import Lines, Reading, SpotCache
from diht_jax.caption import CaptionOptions, caption_shards
from diht_jax.evaluation.embedding.files import EmbedOptions, embed_source
from diht_jax.evaluation.embedding.index_update import update_index
from diht_jax.evaluation.embedding.inputs import list_inputs
from diht_jax.evaluation.results import describe_samples, write_results
from diht_jax.records.labels.clip_embeddings import ClipFacts, ClipTeacher, Crops
from diht_jax.training.monitoring.metrics import WallTime
from diht_jax.training.step import TrainState
from diht_jax.training.workdir.checkpoint import Checkpointer
from diht_jax.training.workdir.saved_run import keep_tokenizer, write_config
from diht_jax.training.workdir.stored_run import StagedDirectory
from diht_jax.weights.export import write_model
from diht_jax.weights.source import read_weights
from diht_jax.weights.tensor_files import write_safetensors
from diht_jax.weights.tokenizer_file import read_tokenizer
from tests import make
from tests.data_prep.duplicates.jobs import duplicates_config, scene, write_pictures
from tests.data_prep.filtering.jobs import job_config
from tests.data_prep.labelling.pictures import label_config
from tests.records.labels import write_clip_embeddings

PICTURES = ("abc", "xyz")  # hashes of the images whose text was read, by seed
EXPORTS = ("clip", "open_clip", "huggingface", "safetensors")
KEYS = [f"k{number}" for number in range(8)]
_CAPTIONS = ("a red dog runs", "a blue cat sits", "two green cars", "a man rides a horse")


class Model(make.HashedModel):
    """Stands in for a model that embeds and captions."""

    embed_dim, image_size, context_length = 16, 2, 8
    config = types.SimpleNamespace(model=types.SimpleNamespace(dtype="float32"))

    def fingerprint(self, **_: Any) -> str:
        """Returns a hash of the weights."""
        return "0" * 16

    def caption(self, images: Sequence[np.ndarray], **_: Any) -> list[str]:
        """Returns different texts for different images."""
        return [f"of {int(image.sum())}" for image in images]


POSITION = {"next_example": 7}


def write_all(folder: pathlib.Path, seed: int) -> None:
    """Writes all files; another seed gives other pairs and weights under the same names."""
    _write_inputs(folder / "in", seed)
    for config in filter_configs(folder, folder).values():
        assert run_filter(config) == {}
    assert duplicates.run(duplicates_config(folder / "in", folder / "duplicates")) == {}
    for kind in ("npz", "parquet"):
        embed(folder, folder, kind)
    bring_up_to_date(folder, folder)
    caption(folder)
    assert run_label(labels_config(folder, folder)) == {}
    merged = labels_config(folder, folder, merge=True, heads__load=str(folder / "labels"))
    merged.output = str(folder / "merged")
    assert run_label(merged) == {}
    facts = ClipFacts((ClipTeacher("clip", "f", 6, 16, 100.0),), Crops(0, (0.9, 1.0), 0), "int8")
    vectors = np.random.default_rng(seed).normal(size=(len(KEYS), 2, 6)).astype(np.float32)
    write_clip_embeddings(folder / "clips", folder / "kept", facts, vectors)
    cache = SpotCache(folder / "readings", {}, "0.tar")
    for name in PICTURES[seed]:
        lines = Lines([(1, 20, 3, 30)], [("Grüße", 0.75)])
        cache.put(name, Reading({128: 0.25}, {256: lines}))
    cache.flush()
    index = image_hashes.make_index(_tars(folder))
    image_hashes.write_index(folder / "readings" / "set.npz", index)
    _write_results(folder / "results", seed)
    _write_models(folder, seed)


def _write_inputs(folder: pathlib.Path, seed: int) -> None:
    """Writes two tars, where the last two pairs are copies of the first; and two tables."""
    for part in range(2):
        numbers = {f"k{number}": number % 6 for number in range(4 * part, 4 * part + 4)}
        pictures = {k: make.encoded(scene(n + 20 * seed, 9, (48, 40))) for k, n in numbers.items()}
        captions = {k: f"{_CAPTIONS[(n + seed) % 4]} {seed} {n}" for k, n in numbers.items()}
        write_pictures(folder / f"{part}.tar", pictures, captions)
    (folder / "tables").mkdir()
    for part in range(2):
        texts = [f"a dog runs to tree {number} {seed} {part}" for number in range(20)]
        rows = pyarrow.table({"caption": texts, "url": list(map(str, range(20)))})
        pyarrow.parquet.write_table(rows, folder / "tables" / f"{part}.parquet")


def _tars(state: pathlib.Path) -> str:
    return str(state / "in" / "*.tar")


# The cases run the following again: `state` has the inputs, `output` the outputs.


def filter_configs(
    state: pathlib.Path, output: pathlib.Path
) -> dict[str, ml_collections.ConfigDict]:
    """Returns the configs of the filter jobs by the names of their outputs."""
    tables, form = str(state / "in" / "tables" / "*.parquet"), {"examples_per_shard": 3}
    return {
        "array": job_config(_tars(state), output / "array", output_format="array_record", **form),
        "tars": job_config(_tars(state), output / "tars", output_format="webdataset", **form),
        "kept": job_config(_tars(state), output / "kept", concepts=True, keep_parts=True, **form),
        "table": job_config(tables, output / "table", metadata_only=True),
    }


def embed(state: pathlib.Path, output: pathlib.Path, kind: str) -> Any:
    """Embeds the tars."""
    options = EmbedOptions(shard_size=3, format=kind)
    return embed_source(Model(), _tars(state), output / kind, options)


def bring_up_to_date(state: pathlib.Path, output: pathlib.Path) -> None:
    """Updates the search index of the tars."""
    update_index(Model(), list_inputs(_tars(state)), output / "index")


def caption(folder: pathlib.Path) -> None:
    """Captions the kept records."""
    shards = sorted(map(str, (folder / "kept").glob("*.tfrecord")))
    caption_shards(Model(), shards, folder / "captioned", CaptionOptions())


def labels_config(
    state: pathlib.Path, output: pathlib.Path, **changes: Any
) -> ml_collections.ConfigDict:
    """Returns the config of the labelling job for the kept records."""
    changes = {"merge": False, "vocabulary__min_count": 1, "heads__steps": 5, **changes}
    changes |= {"teacher__kind": "precomputed", "report_images": 0}
    changes["teacher__precomputed__files"] = str(state / "npz")
    return label_config(output / "kept", output / "labels", **changes)


def train_state(step: int, params: Any) -> TrainState:
    """Returns a state in which only the step differs between checkpoints."""
    params = jax.tree.map(jax.numpy.asarray, params)
    key = jax.numpy.array([1, 2], jax.numpy.uint32)
    return TrainState(jax.numpy.int32(step), params, {"mu": params["text"]}, key)


def stage(folder: pathlib.Path, name: str) -> StagedDirectory:
    """Returns the run in a store, staged in a folder of this name."""
    return StagedDirectory(f"file://{folder}/stored", str(folder / name))


def _write_models(folder: pathlib.Path, seed: int) -> None:
    """Writes exports of a model with random weights, and a run with it as its checkpoints."""
    arch = make.small_architecture(vocab_size=600, activation=("gelu", "quick_gelu")[seed])
    write_safetensors(folder / "weights.safetensors", make.clip_tensors(arch, seed))
    model = read_weights(folder / "weights.safetensors")
    pictures = dataclasses.replace(model.preprocessing, mean=(0.5, 0.5, 0.5 + seed / 10))
    model = dataclasses.replace(model, arch=arch, preprocessing=pictures, has_tokenizer=True)
    for form in EXPORTS:
        write_model(folder / form, form, model, card="")
    own = dataclasses.replace(model, tokenizer=read_tokenizer(folder / "huggingface"))
    write_model(folder / "own_tokenizer", "safetensors", own, card="")
    config = make.tiny_config(seed=seed, model__tokenizer=str(folder / "own_tokenizer"))
    config.model.overrides.update({k: v for k, v in dataclasses.asdict(arch).items() if v})
    run = folder / "run"
    run.mkdir()
    write_config(run, config)
    keep_tokenizer(own.tokenizer, run)
    checkpointer = Checkpointer(run, keep_last=2)
    for step in (1, 2):
        checkpointer.save(train_state(step, model.params), POSITION)
    checkpointer.close()
    times = WallTime(run, 0, began=0.0, clock=lambda: 3.0)
    times.save()
    rows = ({"step": 1, "loss": 2.5}, {"step": 2} | times.scalars())
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    staged = stage(folder, "local")
    shutil.copytree(run, staged.folder)
    staged.send()


def _write_results(folder: pathlib.Path, seed: int) -> None:
    samples = describe_samples({"top1": np.random.default_rng(seed).random(9)}, "items", 9)
    entry = {"task": "a", "metrics": {"top1": 0.5}, "counts": {"images": 9, "dropped": {}}}
    results = {"model": str(seed), "step": 1, "results": [{**entry, "resamples": samples}]}
    write_results(folder / "a.json", results)


def plain(value: Any) -> Any:
    """Converts a value for comparison: arrays to digests, dataclasses and dicts to lists."""
    if isinstance(value, np.ndarray | jax.Array):
        value = np.asarray(value)
        return str(value.dtype), value.shape, hashlib.sha256(value.tobytes()).hexdigest()
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = dataclasses.fields(value)
        return [(f.name, plain(getattr(value, f.name))) for f in fields if f.name != "path"]
    if isinstance(value, dict):
        return [(str(key), plain(value[key])) for key in sorted(value, key=str)]
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)
