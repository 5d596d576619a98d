"""The model card: architecture, recipe, data and results, as the README.md of an export.

It states what the files of the run hold and nothing else; what is not known is named as such.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from diht_jax.models.zoo import Architecture

# Sections of the training config that make the recipe, in the order of the card.
_RECIPE = ("loss", "optimizer", "data", "ema", "mesh")

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


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where the parameters come from.

    Attributes:
        name: how the user called the model.
        step: of a run of `diht_jax.train`; None for a weight file.
        ema: whether they are the moving average.
        sha256: of a weight file, in hex, or None.
    """

    name: str
    step: int | None
    ema: bool
    sha256: str | None


def model_card(
    format: str,
    *,
    arch: Architecture,
    num_parameters: int,
    origin: Origin,
    config: Mapping[str, Any] | None,
    data: Mapping[str, Any] | None,
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
        data: statistics of the training set, `stats.json` of data_prep; None where unknown.
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
        _data_section(config, data),
        _results_section(results),
    ]
    return "\n\n".join(parts) + "\n"


def read_data_statistics(train: str | None) -> dict[str, Any] | None:
    """`stats.json` of the training set, where the path in the config leads to one."""
    path = pathlib.Path(train or "") / "stats.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if train else None
    except (OSError, ValueError):
        return None


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
    for section in _RECIPE:
        rows += [(f"{section}.{key}", value) for key, value in config.get(section, {}).items()]
    rows.append(("seed", config["seed"]))
    text = _table(("key", "value"), [row for row in rows if row[1] is not None])
    return f"## Recipe\n\nTrained by `diht_jax.train` (method: DiHT, arXiv 2301.02280).\n\n{text}"


def _data_section(config: Mapping[str, Any] | None, data: Mapping[str, Any] | None) -> str:
    if config is None:
        return "## Data\n\nNot known to `diht_jax`."
    text = f"## Data\n\n`{config['data']['train']}`"
    counts = (data or {}).get("counts", {})
    if "kept" not in counts:
        return f"{text}. Statistics of the set were not found at this path."
    rows = [("pairs read", counts.get("read")), ("pairs kept", counts["kept"])]
    for stage, reasons in counts.get("dropped", {}).items():
        rows += [(f"dropped, {stage}: {reason}", n) for reason, n in reasons.items()]
    return f"{text}\n\n" + _table(("pairs", "number"), rows)


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
