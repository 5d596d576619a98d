"""Command: writes the HTML page of the demo.

    python -m data_prep.reports.demo --input demo_output --output demo_output/index.html

The page shows the results of `run_demo.sh` in a folder: metrics with intervals, the funnel, sample
pairs with their outcomes, the learning curves of all students, and retrieval examples. It is a
single file without links to others.
"""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from data_prep.decisions.report import Report, read_report
from data_prep.reports.page import funnel_data, pairs_to_show
from diht_jax import command_line
from diht_jax.evaluation.results import paired_differences, percentile_interval
from diht_jax.pages.render import data_uri, render

# Folder of a student -> its title. Each student changes one thing compared to the one before.
STUDENTS = {
    "raw_infonce": "raw pairs",
    "filtered_infonce": "+ CAT",
    "filtered_hn_nce": "+ HN",
    "filtered_concepts": "+ CD",
}
# (task, metric) -> column heading.
METRICS = {
    ("shape", "top1"): "shape, top-1",
    ("color", "top1"): "colour, top-1",
    ("scenes", "t2i_r1"): "text to image, R@1",
    ("scenes", "t2i_r10"): "R@10",
    ("scenes", "i2t_r1"): "image to text, R@1",
    ("scenes", "i2t_r10"): "R@10",
}
_SHOWN_PAIRS = 4  # per outcome


def define_flags() -> None:
    """Defines this command's flags; not at import, because commands share flag names."""
    flags.DEFINE_string("input", None, "The folder of run_demo.sh.", required=True)
    flags.DEFINE_string("output", None, "The page (HTML).", required=True)


def main() -> None:
    """Writes the page."""
    folder = pathlib.Path(flags.FLAGS.input)
    try:
        render_demo(folder, read_report(folder / "filtered"), flags.FLAGS.output)
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename}: no such file; run bash run_demo.sh to the end"
        ) from None


def render_demo(folder: pathlib.Path, report: Report, path: str | None = None) -> str:
    """Renders the page of a folder with the results of all `STUDENTS`, and writes it to `path`.

    Raises:
        FileNotFoundError: a results file, a page or a picture is missing.
    """
    results = {name: _read_results(folder / f"{name}.json") for name in STUDENTS}
    return render(
        "demo.html",
        path,
        title="The demo of diht_jax",
        header=["", *METRICS.values()],
        results=_describe_results(results),
        differences=_describe_differences(results),
        report=funnel_data(report),
        outcomes=pairs_to_show(report, _SHOWN_PAIRS),
        curves=[
            (title, data_uri((folder / name / "curves.png").read_bytes()))
            for name, title in STUDENTS.items()
        ],
        examples=(folder / f"{list(STUDENTS)[-1]}.html").read_text("utf-8"),
    )


def _read_results(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Reads a results file of `diht_jax.evaluate` as task -> result."""
    return {result["task"]: result for result in json.loads(path.read_text())["results"]}


def _describe_results(results: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Returns the rows of the first table: metrics with their intervals."""
    from markupsafe import Markup

    cell = Markup('{:.1f} <span class="note">({:.1f} to {:.1f})</span>')
    rows = []
    for name, tasks in results.items():
        cells: list[Any] = [STUDENTS[name]]
        for task, metric in METRICS:
            low, high = (100 * bound for bound in tasks[task]["intervals"][metric])
            cells.append(cell.format(100 * tasks[task]["metrics"][metric], low, high))
        rows.append(cells)
    return rows


def _describe_differences(results: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """Returns the rows of the second table: differences to the student in the row above."""
    rows = []
    for before, after in itertools.pairwise(results):
        pairs = [(results[before][task], results[after][task], name) for task, name in METRICS]
        rows.append([STUDENTS[after], *(_difference(*pair) for pair in pairs)])
    return rows


def _difference(first: Mapping[str, Any], second: Mapping[str, Any], metric: str) -> str:
    from markupsafe import Markup

    change = f"{100 * (second['metrics'][metric] - first['metrics'][metric]):+.1f}"
    samples = paired_differences(first, second, metric)
    if samples is None:
        return change
    low, high = percentile_interval(100 * samples)
    css = "beyond" if low > 0 or high < 0 else ""
    cell = Markup('<span class="{}">{} ({:+.1f} to {:+.1f})</span>')
    return cell.format(css, change, low, high)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
