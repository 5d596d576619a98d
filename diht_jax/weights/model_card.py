"""The model card: architecture, recipe, data and results, as the README.md of an export.

It states only facts from the files of the run, and names what is unknown. The wording is in
`pages/templates/model_card.md`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from diht_jax.pages.render import render
from diht_jax.records.train_data import TrainSource, find_inputs, parse_train
from diht_jax.records.vocabulary import find_train_vocabulary
from diht_jax.storage.files import join, parse_checked_object, read_bytes, read_object
from diht_jax.weights.export import find_lost_scalars
from diht_jax.weights.open_clip_layout import is_timm
from diht_jax.weights.source import ModelFiles

# Sections of the training config that form the recipe, in the order of the card.
_RECIPE = ("loss", "optimizer", "data", "ema", "mesh")
# Sections that belong to the recipe only if one of these keys is set.
_SWITCHED_ON_BY = {
    "matryoshka": ("sizes",),
    "concepts": ("object_weight", "attribute_weight"),
    "affinity": ("weight",),
    "captioning": ("weight",),
    "lora": ("rank",),
}

_SHOWN_CONCEPTS = 40


def model_card(
    format: str,
    model: ModelFiles,
    name: str,
    *,
    members: Sequence[tuple[str, float]] = (),
    results: Sequence[tuple[str, Mapping[str, Any]]],
    heads: Sequence[str] = (),
    license: str | None = None,
    hub_name: str | None = None,
) -> str:
    """Returns the card's text: Markdown with the front matter that model hubs read.

    Args:
        format: of the export; selects the instructions for loading it.
        model: with the origin of its parameters.
        name: the user's name for the model.
        members: (name, weight) of each averaged model; empty for a single model.
        results: (source, {metric: value}) of each evaluation.
        heads: names of the concept heads that were kept.
        license: of the weights, as stated by the user.
        hub_name: `hf-hub:owner/name`, for a model that is written to the hub.
    """
    config, data = None, (None, None)
    if model.step is not None:  # the model of a run
        config = json.loads(model.config.to_json_best_effort())
        data = config["data"]["train"], config["data"].get("labels")
        results = [*_read_run_results(model.path, model.step), *results]
    concepts, vocabulary = [], None
    if model.heads:
        with contextlib.suppress(OSError, ValueError):  # the data may be gone
            vocabulary = find_train_vocabulary(*data)
    for part in vocabulary or ():
        order = sorted(range(len(part)), key=lambda number: -part.counts[number])
        names = ", ".join(part.names[number] for number in order[:_SHOWN_CONCEPTS])
        more = " ..." if len(part) > _SHOWN_CONCEPTS else ""
        concepts.append(f"{part.kind} ({len(part):,}): {names}{more}")
    lost = find_lost_scalars(format, model, name)
    fields = [(field, v) for field, v in dataclasses.asdict(model.arch).items() if v is not None]
    return render(
        "model_card.md",
        format=format,
        whose_names="open_clip" if is_timm(model.arch) else "OpenAI's CLIP and of DiHT",
        has_clips_tokenizer=model.has_tokenizer and model.tokenizer is None,
        license=license,
        hub_name=hub_name,
        repository=hub_name and hub_name.partition(":")[2],
        title=pathlib.PurePath(hub_name or name).name or name,
        architecture=[
            ("parameters", f"{sum(leaf.size for leaf in jax.tree.leaves(model.params)):,}"),
            *fields,
            ("concept heads", ", ".join(heads) or "left out"),
            *((f"{key}, not in the file", f"{model.loss_scalars[key]:.6g}") for key in lost),
        ],
        name=name,
        sha256=model.sha256,
        members=[(f"`{member}`", f"{weight:g}") for member, weight in members],
        recipe=[] if config is None else _recipe_rows(model, config),
        data=_read_data_facts(*data),
        concepts=concepts,
        results=[
            (source, metric, f"{value:.4g}" if isinstance(value, float) else value)
            for source, metrics in results
            for metric, value in metrics.items()
        ],
    )


def _read_data_facts(train: Any, labels: str | None) -> list[dict[str, Any]]:
    """Reads the statistics next to the training data (`config.data.train` and `labels`).

    From a folder of labels or of labelled records it follows to the records that were labelled.

    Returns:
        For each source: `name` ("" for a single source) and `path` as in the config; `labelled`,
        the statistics of `data_prep.label`, if there are any; and `numbers_of_pairs` that the
        filter read, kept and dropped, empty without its statistics.
    """
    facts = []
    for source in parse_train(train, labels) if train else []:
        statistics = [_read_statistics(folder) for folder in _folders_of(source)]
        filtered = next((s["counts"] for s in statistics if "kept" in s.get("counts", {})), {})
        numbers = [(f"pairs {name}", filtered.get(name)) for name in ("read", "kept") if filtered]
        for stage, reasons in filtered.get("dropped", {}).items():
            numbers += [(f"dropped, {stage}: {reason}", n) for reason, n in reasons.items()]
        facts.append(
            {
                "name": source.name,
                "path": str(source.path),
                "labelled": next((stats for stats in statistics if "teacher" in stats), None),
                "numbers_of_pairs": numbers,
            }
        )
    return facts


def _folders_of(source: TrainSource) -> list[str]:
    """Returns folders with possible statistics of a source: its labels, records, their origin."""
    if not isinstance(source.path, str):
        return []
    folders = [source.labels, source.path] if source.labels else [source.path]
    inputs: list[str] = []
    for folder in folders:
        try:
            labelled = find_inputs(folder)
        except (OSError, ValueError):
            labelled = None
        if labelled is None:
            path = _read_statistics(folder).get("config", {}).get("input")
            labelled = [path] if isinstance(path, str) else []
        inputs += labelled
    return [*folders, *inputs]


def _read_statistics(folder: str) -> dict[str, Any]:
    try:
        return read_object(os.path.join(folder, "stats.json")) or {}
    except OSError:
        return {}


def _read_run_results(workdir: str, step: int) -> list[tuple[str, dict[str, float]]]:
    """Reads the last evaluation of a run at or before `step`, as (source, metrics)."""
    last = []
    try:
        lines = read_bytes(join(workdir, "metrics.jsonl")).splitlines()
    except FileNotFoundError:
        return []
    for line in lines:
        row = parse_checked_object(line)
        if row is None:  # the last line of a killed or running run
            continue
        measured = {
            name.removeprefix("evaluation/"): value
            for name, value in row.items()
            if name.startswith("evaluation/")
        }
        if measured and row["step"] <= step:
            last = [(f"in training, at step {row['step']}", measured)]
    return last


def _recipe_rows(model: ModelFiles, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    which = "moving average of the parameters" if model.ema else "parameters"
    rows: list[tuple[str, Any]] = [("checkpoint", f"{which} at step {model.step}")]
    rows += [(key, value) for key, value in config.items() if key.startswith("total_") and value]
    rows += [(f"model.{key}", config["model"][key]) for key in ("dtype", "param_dtype")]
    switched_on = (
        section
        for section, keys in _SWITCHED_ON_BY.items()
        if any(config.get(section, {}).get(key) for key in keys)
    )
    for section in (*_RECIPE, *switched_on):
        rows += [(f"{section}.{key}", value) for key, value in config.get(section, {}).items()]
    rows.append(("seed", config["seed"]))
    return [row for row in rows if row[1] is not None]
