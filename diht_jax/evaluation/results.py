"""The results file: metrics, confidence intervals, means over suites, and its table.

Values are formatted by the unit of their metric (`protocols.base.Metric`), which the file records
next to the metrics. Intervals come from bootstrap resampling: a protocol computes its metrics from
the number of times that each item was drawn.
"""

from __future__ import annotations

import base64
import collections
import datetime
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diht_jax.evaluation.suite import (
    BENCHMARK_PREFIX,
    CAPTION_SLOT,
    CLASSIFICATION,
    DATACOMP,
    DATACOMP_MEANS,
    SUITE,
    SUITE_MEANS,
    TASKS_BY_NAME,
    Number,
)
from diht_jax.storage.files import parse_checked_object, write_object
from diht_jax.storage.locks import check_writable
from diht_jax.terminal import ProgressBar, format_table

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.base import Metric
    from diht_jax.weights.inference import LoadedModel

LEVEL = 0.95
NUM_RESAMPLES = 1000
SEED = 0
_MOMENT_SECS = 2.0


def begin_results(name: str, model: LoadedModel, *, ema: bool) -> dict[str, Any]:
    """Returns the model's part of a results file, with the model named as the user typed it."""
    return {
        "model": name,
        "step": model.step,
        "ema": ema,
        "fingerprint": model.fingerprint(),
        "image_size": model.image_size,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write_results(path: str | pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the results of a run as JSON with a checksum; creates the folder if missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_object(str(path), results, with_checksum=True, indent=2, sort_keys=False)


def drawn_path(path: pathlib.Path, suffix: str) -> pathlib.Path:
    """Returns the path of the page or plot next to a results file: its name without ".json"."""
    name = path.name.removesuffix(".json").removesuffix(suffix)
    return path.with_name(name + suffix)


def check_output(path: pathlib.Path, drawn: pathlib.Path | None) -> None:
    """Raises ValueError if results cannot be written there; called before measuring.

    Args:
        path: results file; its folder is created if missing.
        drawn: page or plot written next to it, if any.
    """
    if path.is_dir():
        raise ValueError(f"--output={path}: a folder; name a file, such as {path}/results.json")
    if path == drawn:
        raise ValueError(
            f"--output={path}: what is drawn takes this name; name the results otherwise, such as "
            f"{path.with_suffix('.json')}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(str(path.parent), "--output")


def read_results(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads a results file; one without a checksum is accepted unchecked.

    Raises ValueError for a file that is missing, is no results file, or was modified.
    """
    try:
        text = pathlib.Path(path).read_bytes()
        results = parse_checked_object(text)
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
    """Formats a table of all tasks and metrics with their units, and the means over the suite."""
    rows = result_rows(results)
    header = ("task", "metric", "result", "95% interval" if any(row[3] for row in rows) else "", "")
    return f"{describe_model(results)}\n{format_table(header, rows, 'llrll')}"


def result_rows(results: dict[str, Any]) -> list[tuple[str, str, str, str, str]]:
    """Returns (task, metric, value, interval, note) for every metric and every suite mean."""
    rows, by_task = [], {}
    for result in results["results"]:
        by_task[result["task"]] = result
        counts, intervals = result["counts"], result.get("intervals", {})
        dropped = sum(counts["dropped"].values())
        about = f"{counts['images']:,} images" + (f", {dropped:,} dropped" if dropped else "")
        equal = counts.get("equal_captions", 0)
        about += f", {equal:,} captions equal to one of another image" if equal else ""
        protocol = result.get("protocol", {})
        template = protocol.get("caption_template")
        templates = [template] if template else protocol.get("templates", [])
        if templates:
            many = f", {len(templates)} prompts"
            about += many if len(templates) > 1 else f', prompt "{templates[0]}"'
        task = result["task"]
        for name, value in result["metrics"].items():
            metric = metric_of(result, name)
            unit, bounds = metric.unit, intervals.get(name, ())
            interval = " to ".join(format_value(unit, x).removesuffix("%") for x in bounds)
            shown = (metric.label, format_value(unit, value), interval)
            rows.append((task, *shown, about))
            task = about = ""
    for mean in suite_means([by_task]):
        value = format_value("share", mean.values[0])
        rows.append(("suite", mean.name, value, "", mean.missing))
    return rows


def named_metrics(results: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Returns the metrics of all results, keyed by "TASK/METRIC"."""
    return {
        f"{result['task']}/{name}": value
        for result in results
        for name, value in result["metrics"].items()
    }


def describe_metrics(result: dict[str, Any]) -> str:
    """Formats the metrics of one task on a line: "cifar10: top-1 51.24%, top-5 90.00%"."""
    shown = []
    for name, value in result["metrics"].items():
        metric = metric_of(result, name)
        shown.append(f"{metric.label} {format_value(metric.unit, value)}")
    return f"{result['task']}: {', '.join(shown)}"


def describe_model(results: dict[str, Any]) -> str:
    """Formats model, step and the use of the moving average on a line."""
    step = results.get("step")
    average = ", moving average" if results.get("ema") else ""
    return f"{results['model']}" + ("" if step is None else f", step {step:,}") + average


def metric_of(result: Mapping[str, Any], name: str) -> Metric:
    """Returns the unit and label of a metric of one task's result.

    The unit comes from the file, the label from the task's kind. A metric that is unknown to this
    version is a score labelled with its own name.
    """
    # Imported here because it imports JAX, which would slow down the command's --help.
    from diht_jax.evaluation.protocols.base import Metric
    from diht_jax.evaluation.protocols.registry import PROTOCOLS

    protocol = PROTOCOLS.get(result.get("kind", ""))
    known = (protocol.metrics if protocol else {}).get(name, Metric("score"))
    return Metric(result.get("units", {}).get(name, known.unit), known.label or name)


def format_value(unit: str, value: float) -> str:
    """Formats a metric's value by its unit: share "51.24%", score "0.2874", rank "1,203.5"."""
    if unit == "share":
        return f"{100 * value:.2f}%"
    return f"{value:,.1f}" if unit == "rank" else f"{value:,.4f}"


class Mean(NamedTuple):
    """A mean over those numbers of a group that all compared results have."""

    name: str
    numbers: list[Number]
    values: list[float]  # one per results file
    missing: str  # note such as "3 missing"; empty if none is


def suite_means(by_task: Sequence[Mapping[str, Mapping[str, Any]]]) -> list[Mean]:
    """Returns the means over DiHT's suite, plus DataComp's if any task is only on its list.

    Args:
        by_task: for each results file, its results by task. Groups without a number are left out.
    """
    tasks = set().union(*by_task)
    if TASKS_BY_NAME.keys().isdisjoint(tasks):
        return []
    has_others = not tasks.isdisjoint(set(DATACOMP.values()) - set(SUITE))
    means = []
    for name, numbers in (SUITE_MEANS | DATACOMP_MEANS if has_others else SUITE_MEANS).items():
        present, found = [], []
        for task, metrics in numbers:
            one = [_value(results.get(task, {}), metrics, name) for results in by_task]
            if None not in one:
                present.append((task, metrics))
                found.append(one)
        if present:
            missing = len(numbers) - len(present)
            values = np.mean(found, axis=0).tolist()
            means.append(Mean(name, present, values, f"{missing} missing" if missing else ""))
    return means


def _value(result: Mapping[str, Any], metrics: Sequence[str], mean: str) -> float | None:
    """Returns a task's number for a mean; None if missing or measured by another protocol."""
    measured = result.get("metrics", {})
    if any(name not in measured for name in metrics):
        return None
    if mean in DATACOMP_MEANS:
        if result.get("kind") == CLASSIFICATION:
            is_as_there = result.get("source", "").startswith(BENCHMARK_PREFIX)
        else:
            template = result.get("protocol", {}).get("caption_template", CAPTION_SLOT)
            is_as_there = template == CAPTION_SLOT
        if not is_as_there:
            return None
    return sum(measured[name] for name in metrics) / len(metrics)


def resample(
    measure: Callable[[np.ndarray], dict[str, float]],
    num_items: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
    progress: bool = False,
) -> dict[str, np.ndarray]:
    """Computes metrics on bootstrap resamples (Efron 1979) of `num_items` draws with replacement.

    The draws depend on the counts alone, so two models measured on the same items are measured on
    the same resamples. Slow computations show a progress bar.

    Args:
        measure: computes metrics from int [num_items], the number of draws of each item.
        num_items: number of independent items, which are images in most protocols.
        num_resamples: number of resamples.
        progress: show a bar on stderr.

    Returns:
        Metric -> float64 [num_resamples].
    """
    rng = np.random.default_rng(SEED)
    found: dict[str, list[float]] = collections.defaultdict(list)
    bar: dict[str, Any] = {"unit": " resamples", "disable": not progress, "delay": _MOMENT_SECS}
    for _ in ProgressBar(range(num_resamples), "bootstrap", **bar):
        counts = np.bincount(rng.integers(0, num_items, num_items), minlength=num_items)
        for name, value in measure(counts).items():
            found[name].append(value)
    return dict(zip(found, map(np.array, found.values()), strict=True))


def percentile_interval(samples: np.ndarray) -> list[float]:
    """Returns the central [low, high] that holds `LEVEL` of the resamples; NaNs are ignored."""
    tail = 50 * (1 - LEVEL)
    return np.nanpercentile(samples, [tail, 100 - tail]).tolist()


def describe_samples(samples: dict[str, np.ndarray], items: str, num_items: int) -> dict[str, Any]:
    """Encodes resamples for the results file; `items` is a digest that identifies the items."""
    texts = {}
    for name, values in samples.items():
        texts[name] = base64.b64encode(values.astype("<f4").tobytes()).decode()
    draws = [items, num_items, len(next(iter(samples.values()))), SEED]
    return {"draws": draws, "values": texts}


def paired_differences(
    first: Mapping[str, Any], second: Mapping[str, Any], name: str
) -> np.ndarray | None:
    """Returns the second result's resamples of a metric minus the first's, float64 [resamples].

    None if either has no resamples, or if their draws or items differ.
    """
    one, other = (result.get("resamples", {"values": {}}) for result in (first, second))
    if not (name in one["values"] and name in other["values"] and one["draws"] == other["draws"]):
        return None
    return decode_resamples(second)[name].astype(float) - decode_resamples(first)[name]


def decode_resamples(result: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Decodes the resamples of each metric, float32 [n]; raises ValueError if damaged."""
    described = result.get("resamples", {"values": {}})
    decoded = {
        name: np.frombuffer(base64.b64decode(text, validate=True), "<f4")
        for name, text in described["values"].items()
    }
    if any(len(values) != described["draws"][2] for values in decoded.values()):
        raise ValueError("some resamples are missing")
    return decoded
