"""The model card: architecture, recipe, data and results, as the README.md of an export.

It states what the files of the run hold and nothing else; what is not known is named as such.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diht_jax.models.zoo import Architecture
from diht_jax.records.labels.shards import find_inputs
from diht_jax.records.train_data import TrainSource, parse_train
from diht_jax.records.vocabulary import ConceptList, Vocabulary, find_train_vocabulary
from diht_jax.storage.files import read_bytes

# Sections of the training config that make the recipe, in the order of the card.
_RECIPE = ("loss", "optimizer", "data", "ema", "mesh")
# And those that are part of it where one of these keys is set.
_SWITCHED_ON_BY = {
    "matryoshka": ("sizes",),
    "concepts": ("object_weight", "attribute_weight"),
    "affinity": ("weight",),
    "captioning": ("weight",),
    "lora": ("rank",),
}

_USAGE = {
    "clip": """import torch
state_dict = torch.load("model.pt", weights_only=True)   # names of OpenAI's CLIP and of DiHT""",
    "open_clip": """import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIRECTORY")
tokenizer = open_clip.get_tokenizer("local-dir:DIRECTORY")""",
    "huggingface": """from transformers import CLIPModel, CLIPProcessor
model = CLIPModel.from_pretrained("DIRECTORY")
processor = CLIPProcessor.from_pretrained("DIRECTORY")""",
    "safetensors": """from safetensors.numpy import load_file
tensors = load_file("model.safetensors")                 # names of OpenAI's CLIP and of DiHT""",
}


# What another program does otherwise than `diht_jax`.
_LIMITS = {
    "huggingface": (
        "## Texts and pictures\n\nThe normaliser of `tokenizer.json` replaces typographic quotes, "
        "ligatures, wide characters and the common HTML entities as `diht_jax` does. It cannot "
        "repair broken encodings (`â€™` for an apostrophe), nor does it know every entity: for web "
        "texts call `ftfy.fix_text` and `html.unescape` first. Do not load the folder with "
        "`CLIPTokenizer`, which has a normaliser of its own. Compose transparent pictures on white "
        "before the processor, which drops their transparency.",
    ),
    "open_clip": (
        "## Pictures\n\nCompose transparent pictures on white before `preprocess`, which drops "
        "their transparency.",
    ),
}
_SHOWN_CONCEPTS = 40


@dataclasses.dataclass(frozen=True)
class Origin:
    """The origin of the parameters.

    Attributes:
        name: how the user called the model.
        step: of a run of `diht_jax.train`; None for a weight file.
        ema: whether they are the moving average.
        sha256: of a weight file, in hex, or None.
        members: (name, weight) of the models that they are a mean of; empty of a model by itself.
    """

    name: str
    step: int | None
    ema: bool
    sha256: str | None
    members: tuple[tuple[str, float], ...] = ()


def model_card(
    format: str,
    *,
    arch: Architecture,
    num_parameters: int,
    origin: Origin,
    config: Mapping[str, Any] | None,
    data: Sequence[SourceFacts] = (),
    concepts: Vocabulary | None = None,
    results: Sequence[tuple[str, Mapping[str, Any]]],
    heads: Sequence[str] = (),
    license: str | None = None,
) -> str:
    """The card's text, Markdown with the front matter that model hubs read.

    Args:
        format: of the export; decides the lines that show how to load it.
        arch, num_parameters: of the model.
        origin: of the parameters.
        config: the training config as plain dicts; None for weights not trained here.
        data: of `read_data_facts`.
        concepts: that a distilled model was trained with.
        results: (source, {metric: value}) of each evaluation.
        heads: names of the concept heads that were kept.
        license: of the weights, as the user states it.
    """
    front = ["---", "library_name: diht_jax", "pipeline_tag: zero-shot-image-classification"]
    front += [f"license: {license}"] if license else []
    front += ["tags: [clip, diht, image-text]", "---"]
    parts = [
        "\n".join(front),
        f"# {pathlib.PurePath(origin.name).name or origin.name}",
        "A dual encoder of images and texts, exported by `diht_jax`.",
        f"```python\n{_USAGE[format]}\n```",
        _architecture_section(arch, num_parameters, heads),
        _recipe_section(origin, config),
        _data_section(config, data, concepts),
        *_LIMITS.get(format, ()),
        _results_section(results),
    ]
    return "\n\n".join(parts) + "\n"


@dataclasses.dataclass(frozen=True)
class SourceFacts:
    """Facts about one source of the training data.

    Attributes:
        name: its key in `config.data.train`; "" of the only one.
        path: as the config names it.
        labelled: statistics of `data_prep.label`, where its records were labelled.
        filtered: statistics of `data_prep.filter`, of the records or of what was labelled.
    """

    name: str
    path: str
    labelled: Mapping[str, Any] | None
    filtered: Mapping[str, Any] | None


def read_data_facts(train: Any, labels: str | None) -> list[SourceFacts]:
    """Reads the statistics next to the training data, where the config leads to them.

    A folder of labels or of labelled records leads on to the records that were labelled.

    Args:
        train, labels: `config.data.train` and `config.data.labels`.
    """
    facts = []
    for source in parse_train(train, labels) if train else []:
        statistics = [_read_statistics(folder) for folder in _folders_of(source)]
        found = [stats for stats in statistics if stats is not None]
        facts.append(
            SourceFacts(
                source.name,
                str(source.path),
                next((stats for stats in found if "teacher" in stats), None),
                next((stats for stats in found if "kept" in stats.get("counts", {})), None),
            )
        )
    return facts


def read_concepts(train: Any, labels: str | None) -> Vocabulary | None:
    """The concepts that the training data are labelled with, where they can be read."""
    try:
        return find_train_vocabulary(train, labels)
    except (OSError, ValueError):
        return None


def _folders_of(source: TrainSource) -> list[str]:
    """Folders that may have statistics of a source: its labels, its records, the labelled ones."""
    if not isinstance(source.path, str):
        return []
    folders = [source.labels, source.path] if source.labels else [source.path]
    inputs = []
    for folder in folders:
        try:
            labelled_inputs = find_inputs(folder)
        except (OSError, ValueError):
            labelled_inputs = None
        if labelled_inputs is not None:
            inputs += labelled_inputs
        else:
            labelled = (_read_statistics(folder) or {}).get("config", {}).get("input")
            inputs += [labelled] if isinstance(labelled, str) else []
    return [*folders, *inputs]


def _read_statistics(folder: str) -> dict[str, Any] | None:
    try:
        found = json.loads(read_bytes(os.path.join(folder, "stats.json")))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def read_run_results(workdir: pathlib.Path, step: int) -> list[tuple[str, dict[str, float]]]:
    """The last evaluation in a run's `metrics.jsonl` at or before `step`, as (source, metrics)."""
    path = workdir / "metrics.jsonl"
    last: tuple[str, dict[str, float]] | None = None
    if not path.is_file():
        return []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        measured = {
            name.removeprefix("evaluation/"): value
            for name, value in row.items()
            if name.startswith("evaluation/")
        }
        if measured and row["step"] <= step:
            last = (f"in training, at step {row['step']}", measured)
    return [last] if last else []


def _architecture_section(arch: Architecture, num_parameters: int, heads: Sequence[str]) -> str:
    fields = [(name, v) for name, v in dataclasses.asdict(arch).items() if v is not None]
    rows = [("parameters", f"{num_parameters:,}"), *fields]
    rows += [("concept heads", ", ".join(heads) or "left out")]
    return "## Architecture\n\n" + _table(("what", "value"), rows)


def _recipe_section(origin: Origin, config: Mapping[str, Any] | None) -> str:
    if origin.members:
        rows = [(f"`{name}`", f"{weight:g}") for name, weight in origin.members]
        return (
            "## Recipe\n\nA weighted mean of the parameters of models, by `diht_jax.average`.\n\n"
            + _table(("model", "weight"), rows)
        )
    if config is None:
        source = f"`{origin.name}`"
        if origin.sha256:
            source += f", SHA-256 `{origin.sha256}`"
        return (
            f"## Recipe\n\nNot trained by `diht_jax`: converted from {source}. For recipe, data, "
            "licence and limits see the source of that file."
        )
    which = "moving average of the parameters" if origin.ema else "parameters"
    rows: list[tuple[str, Any]] = [("checkpoint", f"{which} at step {origin.step}")]
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
    text = _table(("key", "value"), [row for row in rows if row[1] is not None])
    return f"## Recipe\n\nTrained by `diht_jax.train` (method: DiHT, arXiv 2301.02280).\n\n{text}"


def _data_section(
    config: Mapping[str, Any] | None, data: Sequence[SourceFacts], concepts: Vocabulary | None
) -> str:
    if config is None:
        return "## Data\n\nNot known to `diht_jax`."
    parts = ["## Data", *map(_source_section, data)]
    if concepts is not None:
        names = [f"{part.kind} ({len(part):,}): {_most_frequent(part)}" for part in concepts]
        parts.append(
            "Labelled with concepts of the captions, the most frequent first: " + "; ".join(names)
        )
    return "\n\n".join(parts)


def _source_section(source: SourceFacts) -> str:
    title = f"{source.name}: `{source.path}`" if source.name else f"`{source.path}`"
    if source.filtered is None and source.labelled is None:
        return f"{title}. Statistics of the set were not found at this path."
    rows: list[tuple[str, Any]] = []
    if source.filtered is not None:
        counts = source.filtered["counts"]
        rows += [("pairs read", counts.get("read")), ("pairs kept", counts["kept"])]
        for stage, reasons in counts.get("dropped", {}).items():
            rows += [(f"dropped, {stage}: {reason}", n) for reason, n in reasons.items()]
    text = f"{title}\n\n" + _table(("pairs", "number"), rows) if rows else title
    if source.labelled is not None:
        teacher = source.labelled["teacher"].get("kind", "unknown")
        text += f"\n\nTeacher of the labels: {teacher}; labelled {source.labelled['labelled']:,}."
    return text


def _most_frequent(part: ConceptList) -> str:
    order = sorted(range(len(part)), key=lambda number: -part.counts[number])
    names = [part.names[number] for number in order[:_SHOWN_CONCEPTS]]
    return ", ".join(names) + (" ..." if len(part) > _SHOWN_CONCEPTS else "")


def _results_section(results: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    if not results:
        return "## Results\n\nNone were given to the export."
    rows = [
        (source, name, f"{value:.4g}" if isinstance(value, float) else value)
        for source, metrics in results
        for name, value in metrics.items()
    ]
    return "## Results\n\nZero-shot; shares are fractions of 1, ranks count from 1.\n\n" + _table(
        ("source", "metric", "value"), rows
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    cells = ([str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in lines)
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)
