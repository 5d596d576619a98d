"""The results file and the tables on the terminal.

Called by the command `diht_jax.evaluate`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from diht_jax.data.atomic_file import write_atomically

# What the results of a comparison are called; as many as a table has room for.
LETTERS = "ABCDEFGH"

_METRIC_NAMES = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    "mean_average_precision": "mean average precision",
    "auroc": "AUROC",
    "text": "text score",
    "image": "image score",
    "group": "group score",
    "accuracy": "accuracy",
    **{
        f"{direction}_r{k}": f"{arrow} R@{k}"
        for direction, arrow in (("t2i", "text to image"), ("i2t", "image to text"))
        for k in (1, 5, 10)
    },
    "t2i_median_rank": "text to image median rank",
    "i2t_median_rank": "image to text median rank",
}


def metric_label(name: str) -> str:
    """A metric as people call it."""
    return _METRIC_NAMES.get(name, name)


def write_results(path: str | pathlib.Path, results: dict[str, Any]) -> None:
    """Writes the results of a run as JSON; the folder is made when missing."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(results, indent=2, ensure_ascii=False) + "\n").encode())


def read_results(path: str | pathlib.Path) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
        ValueError: no such file, or not such a file.
    """
    try:
        results = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        for result in results["results"]:
            result["task"], result["metrics"].items(), result["counts"]["images"]  # noqa: B018
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a results file of `python -m diht_jax.evaluate --output` "
            f"({type(error).__name__}: {error})"
        ) from error
    return results


def format_results(results: dict[str, Any]) -> str:
    """A table of all tasks and metrics, in percent."""
    rows = []
    for result in results["results"]:
        first = True
        intervals = result.get("intervals", {})
        for name, value in result["metrics"].items():
            counts = result["counts"]
            dropped = sum(counts["dropped"].values())
            about = f"{counts['images']:,} images" + (f", {dropped:,} dropped" if dropped else "")
            rows.append(
                (
                    result["task"] if first else "",
                    metric_label(name),
                    _format_value(name, value),
                    _format_interval(name, intervals[name]) if name in intervals else "",
                    about if first else "",
                )
            )
            first = False
    header = ("task", "metric", "result", "95% interval" if any(row[3] for row in rows) else "", "")
    return f"{describe_model(results)}\n{_format_table(header, rows, 'llrll')}"


def format_comparison(*results: dict[str, Any]) -> str:
    """A table of two or more results, and how the others differ from the first.

    Tasks and metrics that only some of them have are shown with a dash; a task that was not
    measured in the same way in all (other prompts, other number of images) is named below the
    table.
    """
    letters = LETTERS[: len(results)]
    by_task = [{result["task"]: result for result in r["results"]} for r in results]
    rows, notes = [], []
    for task in dict.fromkeys(name for tasks in by_task for name in tasks):
        rows += _compare_metrics(
            task, [tasks.get(task, {}).get("metrics", {}) for tasks in by_task]
        )
        notes += _differing_protocols(task, [tasks[task] for tasks in by_task if task in tasks])
    names = [f"{letter}: {describe_model(r)}" for letter, r in zip(letters, results, strict=True)]
    differences = [f"{letter} - {letters[0]}" for letter in letters[1:]]
    header = ("task", "metric", *letters, *differences)
    table = _format_table(header, rows, "ll" + "r" * (len(header) - 2))
    return "\n".join([*names, table, *notes])


def _compare_metrics(task: str, measured: Sequence[dict[str, float]]) -> list[tuple[str, ...]]:
    rows = []
    first = measured[0]
    for name in dict.fromkeys(name for metrics in measured for name in metrics):
        values = [_format_value(name, x[name]) if name in x else "-" for x in measured]
        differences = [
            _format_difference(name, x[name] - first[name]) if name in x and name in first else "-"
            for x in measured[1:]
        ]
        rows.append(("" if rows else task, metric_label(name), *values, *differences))
    return rows


def _differing_protocols(task: str, results: Sequence[dict[str, Any]]) -> list[str]:
    first, *others = results
    return [
        f"note: '{task}' differs in {key}: {_abridge(first[field][key])} and "
        f"{_abridge(other[field].get(key))}"
        for other in others
        for field in ("protocol", "counts")
        for key in first[field]
        if first[field][key] != other[field].get(key)
    ]


def _abridge(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


def describe_model(results: dict[str, Any]) -> str:
    """Model, step and whether the average was taken, in a line."""
    step = results.get("step")
    average = ", moving average" if results.get("ema") else ""
    return f"{results['model']}" + ("" if step is None else f", step {step:,}") + average


def _format_value(name: str, value: float) -> str:
    return f"{value:,.1f}" if name.endswith("rank") else f"{100 * value:.2f}%"


def _format_interval(name: str, interval: Sequence[float]) -> str:
    low, high = (_format_value(name, value).removesuffix("%") for value in interval)
    return f"{low} to {high}"


def _format_difference(name: str, value: float) -> str:
    value, digits = (value, 1) if name.endswith("rank") else (100 * value, 2)
    # Adding 0.0 turns a -0.0 that rounding left into 0.0.
    return f"{round(value, digits) + 0.0:+,.{digits}f}"


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def format_row(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(row, widths, align, strict=True)
        ]
        return "  ".join(cells).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([format_row(header), rule, *(format_row(row) for row in rows)])
