"""Command: the page of the demo.

    python -m data_prep.reports.demo --input demo_output --output demo_output/index.html

It shows what `run_demo.sh` left in a folder: results with intervals, the funnel, pairs with what
became of them, the curves of all students, and examples of retrieval. It is one file without links
to others.
"""

from __future__ import annotations

import html
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags

from data_prep.reports.funnel import spell_outcome
from data_prep.reports.html import data_uri, render_page, render_table
from data_prep.reports.page import (
    PAGE_STYLE,
    render_card,
    render_funnel,
    render_noise,
)
from data_prep.reports.summary import FilterReport, read_report
from diht_jax import command_line
from diht_jax.evaluation.bootstrap import paired_samples, percentile_interval
from diht_jax.storage.files import write_bytes

# Folder of a student -> what it is; each changes one thing of the one before.
STUDENTS = {
    "raw_infonce": "raw pairs",
    "filtered_infonce": "+ CAT",
    "filtered_hn_nce": "+ HN",
    "filtered_concepts": "+ CD",
}
# (task, metric) -> heading.
METRICS = {
    ("shape", "top1"): "shape, top-1",
    ("color", "top1"): "colour, top-1",
    ("scenes", "t2i_r1"): "text to image, R@1",
    ("scenes", "t2i_r10"): "R@10",
    ("scenes", "i2t_r1"): "image to text, R@1",
    ("scenes", "i2t_r10"): "R@10",
}
_SHOWN_PAIRS = 4  # of each outcome
_STYLE = """
figure { margin: 0; } figure img { width: 100%; border: 1px solid #d0d7de; border-radius: 6px; }
iframe { width: 100%; height: 90vh; border: 1px solid #d0d7de; border-radius: 6px; }
.beyond { font-weight: 600; }
"""


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    flags.DEFINE_string("input", None, "The folder of run_demo.sh.", required=True)
    flags.DEFINE_string("output", None, "The page (HTML).", required=True)


def main() -> None:
    """Writes the page."""
    folder = pathlib.Path(flags.FLAGS.input)
    page = render_demo(folder, read_report(folder / "filtered"))
    write_bytes(pathlib.Path(flags.FLAGS.output), page.encode())


def render_demo(folder: pathlib.Path, report: FilterReport) -> str:
    """The page, as text.

    Args:
        folder: with the work directories and the results files of `STUDENTS`.
        report: of the filter.

    Raises:
        ValueError: a results file or a picture is missing.
    """
    results = {name: _read_results(folder / f"{name}.json") for name in STUDENTS}
    pairs = "".join(
        f"<h3>{html.escape(spell_outcome(outcome))}</h3>"
        f'<div class="images">{"".join(map(render_card, samples[:_SHOWN_PAIRS]))}</div>'
        for outcome, samples in report.samples_by_outcome()
    )
    curves = "".join(
        _picture(folder / name / "curves.png", title) for name, title in STUDENTS.items()
    )
    last = list(STUDENTS)[-1]
    page = folder / f"{last}.html"
    if not page.is_file():
        raise ValueError(f"{page}: no such page; run bash run_demo.sh to the end")
    examples = f'<iframe srcdoc="{html.escape(page.read_text("utf-8"))}"></iframe>'
    parts = [
        "<h1>The demo</h1><p>Noisy pairs are filtered and labelled, and four tiny students are "
        "trained for the same number of samples. Each row of the first table changes one thing of "
        "the row above it.</p>",
        f'<h2>Results</h2><div class="wide">{_results_table(results)}</div>'
        "<p class=note>Zero-shot, on clean scenes that are not in the training data; percent, with "
        "95% intervals over pictures. One seed: the spread between seeds is not in them.</p>",
        f'<h2>What each step changed</h2><div class="wide">{_differences_table(results)}</div>'
        "<p class=note>Points against the row above, with the 95% interval of the paired "
        "bootstrap; bold where 0 lies outside.</p>",
        f"<h2>Funnel</h2>{render_funnel(report)}{render_noise(report)}",
        f"<h2>Pairs</h2>{pairs}",
        f"<h2>Training</h2>{curves}",
        f"<h2>Retrieval and classification, last student</h2>{examples}",
    ]
    return render_page("The demo of diht_jax", parts, PAGE_STYLE + _STYLE)


def _read_results(path: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Task -> its result, of a results file of `diht_jax.evaluate`."""
    try:
        return {result["task"]: result for result in json.loads(path.read_text())["results"]}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such results file; run bash run_demo.sh to the end") from None


def _results_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, tasks in results.items():
        cells = [STUDENTS[name]]
        for task, metric in METRICS:
            low, high = (100 * bound for bound in tasks[task]["intervals"][metric])
            value = 100 * tasks[task]["metrics"][metric]
            cells.append(f"{value:.1f} <span class=note>({low:.1f} to {high:.1f})</span>")
        rows.append(cells)
    return render_table(["", *METRICS.values()], rows)


def _differences_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for before, after in itertools.pairwise(results):
        pairs = [(results[before][task], results[after][task], name) for task, name in METRICS]
        rows.append([STUDENTS[after], *(_difference(*pair) for pair in pairs)])
    return render_table(["", *METRICS.values()], rows)


def _difference(first: Mapping[str, Any], second: Mapping[str, Any], metric: str) -> str:
    change = f"{100 * (second['metrics'][metric] - first['metrics'][metric]):+.1f}"
    samples = paired_samples(first, second, metric)
    if samples is None:
        return change
    low, high = percentile_interval(100 * (samples[1].astype(float) - samples[0]))
    css = "beyond" if low > 0 or high < 0 else ""
    return f'<span class="{css}">{change} ({low:+.1f} to {high:+.1f})</span>'


def _picture(path: pathlib.Path, title: str) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: no such picture; run bash run_demo.sh to the end")
    text = html.escape(title)
    uri = data_uri(path.read_bytes(), "png")
    return f'<figure><h3>{text}</h3><img src="{uri}" alt="{text}"></figure>'


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
