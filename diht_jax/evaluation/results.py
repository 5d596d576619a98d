"""The results file, its table on the terminal, and the published numbers of the released weights.

Every number is shown by its unit (`protocols.base.Metric`), which the file states next to the
metrics.
"""

from __future__ import annotations

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diht_jax.evaluation.benchmarks import suite_means
from diht_jax.evaluation.bootstrap import decode_resamples
from diht_jax.storage.files import add_checksum, parse_object, write_bytes

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.base import Metric
    from diht_jax.weights.inference import LoadedModel

# Names of the results of a comparison; a table has room for these.
LETTERS = "ABCDEFGH"

# Zero-shot numbers of the released DiHT weights, in percent, from the official repository
# (facebookresearch/diht): top-1 on ImageNet, recall at 1 on COCO and Flickr30K.
_PUBLISHED_METRICS = (
    ("imagenet", "top1"),
    ("coco_retrieval", "t2i_r1"),
    ("coco_retrieval", "i2t_r1"),
    ("flickr30k_retrieval", "t2i_r1"),
    ("flickr30k_retrieval", "i2t_r1"),
)
_PUBLISHED_PERCENT = {
    "diht_vitb32_224px": (68.0, 40.6, 59.3, 68.6, 84.4),
    "diht_vitb16_224px": (72.2, 43.3, 60.3, 72.9, 89.8),
    "diht_vitl14_224px": (77.0, 48.0, 65.1, 76.7, 92.0),
    "diht_vitl14_336px": (77.9, 49.3, 65.3, 78.2, 91.1),
}


def metric_of(result: Mapping[str, Any], name: str) -> Metric:
    """The unit and the label of a metric of one task's result.

    The unit is the one that the file states, the label that of the protocol. Metrics that this
    version does not know are scores under their own name.
    """
    # Here, since it imports JAX, and the command's --help should not have to wait for that.
    from diht_jax.evaluation.protocols.base import Metric
    from diht_jax.evaluation.protocols.registry import PROTOCOLS

    own = [PROTOCOLS[result["kind"]]] if result.get("kind") in PROTOCOLS else []
    found = [p.metrics[name] for p in (*own, *PROTOCOLS.values()) if name in p.metrics]
    known = found[0] if found else Metric("score")
    return Metric(result.get("units", {}).get(name, known.unit), known.label or name)


def begin_results(name: str, model: LoadedModel, *, ema: bool) -> dict[str, Any]:
    """The part of a results file that is about the model, named as the user typed it."""
    return {
        "model": name,
        "step": model.step,
        "ema": ema,
        "fingerprint": model.fingerprint(),
        "image_size": model.image_size,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_results(path: str | pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the results of a run as JSON with a checksum; the folder is made when missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(add_checksum(results), indent=2, ensure_ascii=False)
    write_bytes(path, f"{text}\n".encode())


def read_results(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads what `write_results` wrote; a file without a checksum is taken as it is.

    Raises:
        ValueError: no such file, not such a file, or one that was changed.
    """
    try:
        text = pathlib.Path(path).read_bytes()
        results = parse_object(text)
        if results is None:
            raise ValueError(
                "its checksum differs: it is damaged; remove 'checksum' if you edited it"
                if isinstance(json.loads(text), dict)
                else "it holds no object"
            )
        for result in results["results"]:
            result["task"], result["metrics"].items(), result["counts"]["images"]  # noqa: B018
            decode_resamples(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a results file of `python -m diht_jax.evaluate --output` "
            f"({type(error).__name__}: {error})"
        ) from error
    return results


def format_results(results: dict[str, Any]) -> str:
    """Formats all tasks and metrics, each by its unit, and the means over the suite, as a table."""
    rows = result_rows(results)
    header = ("task", "metric", "result", "95% interval" if any(row[3] for row in rows) else "", "")
    return f"{describe_model(results)}\n{format_table(header, rows, 'llrll')}"


def result_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Task, metric, value, interval and a note of every metric, and of the means over the suite."""
    rows = []
    for result in results["results"]:
        counts, intervals = result["counts"], result.get("intervals", {})
        dropped = sum(counts["dropped"].values())
        about = f"{counts['images']:,} images" + (f", {dropped:,} dropped" if dropped else "")
        equal = counts.get("equal_captions", 0)
        about += f", {equal:,} captions equal to one of another image" if equal else ""
        about += _describe_prompt(result.get("protocol", {}))
        task = result["task"]
        for name, value in result["metrics"].items():
            metric = metric_of(result, name)
            unit, bounds = metric.unit, intervals.get(name, ())
            interval = " to ".join(format_value(unit, x).removesuffix("%") for x in bounds)
            shown = (metric.label or name, format_value(unit, value), interval)
            rows.append((task, *shown, about))
            task = about = ""
    for mean in suite_means([{result["task"]: result for result in results["results"]}]):
        value = format_value("share", mean.values[0])
        rows.append(("suite", mean.name, value, "", mean.missing))
    return rows


def _describe_prompt(protocol: Mapping[str, Any]) -> str:
    """The prompt of captions or class names, or the number of prompts; begins with a comma."""
    caption_template = protocol.get("caption_template")
    templates = [caption_template] if caption_template else protocol.get("templates", [])
    if len(templates) == 1:
        return f', prompt "{templates[0]}"'
    return f", {len(templates)} prompts" if templates else ""


def published_results(model: str) -> dict[str, Any] | None:
    """The published numbers in the form of a results file; None for another model."""
    if model not in _PUBLISHED_PERCENT:
        return None
    results: dict[str, dict[str, Any]] = {}
    for (task, metric), percent in zip(_PUBLISHED_METRICS, _PUBLISHED_PERCENT[model], strict=True):
        result = results.setdefault(
            task, {"task": task, "metrics": {}, "protocol": {}, "counts": {}}
        )
        result["metrics"][metric] = percent / 100
    return {"model": f"{model}, as published", "results": list(results.values())}


def describe_metrics(result: dict[str, Any]) -> str:
    """The metrics of one task in a line, such as "cifar10: top-1 51.24%, top-5 90.00%"."""
    shown = []
    for name, value in result["metrics"].items():
        metric = metric_of(result, name)
        shown.append(f"{metric.label} {format_value(metric.unit, value)}")
    return f"{result['task']}: {', '.join(shown)}"


def describe_model(results: dict[str, Any]) -> str:
    """Model, step and whether the average was taken, in a line."""
    step = results.get("step")
    average = ", moving average" if results.get("ema") else ""
    return f"{results['model']}" + ("" if step is None else f", step {step:,}") + average


def format_value(unit: str, value: float) -> str:
    """A metric's value by its unit: "51.24%", "0.2874", rank "1,203.5"."""
    if unit == "share":
        return f"{100 * value:.2f}%"
    return f"{value:,.1f}" if unit == "rank" else f"{value:,.4f}"


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Rows of texts under a header, each column as wide as it must be; "r" aligns to the right."""
    columns = []
    for side, (head, *cells) in zip(align, zip(header, *rows, strict=True), strict=True):
        width = max(map(len, [head, *cells]))
        lines = [head, "-" * width, *cells]
        columns.append([x.rjust(width) if side == "r" else x.ljust(width) for x in lines])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
