"""Makes the missing runs of the laboratory, and writes one result file per run.

    python -m benchmarks.lab.run --list
    python -m benchmarks.lab.run --only filter
    python -m benchmarks.lab.run --only 'cat_beta_*,raw_seed3' --workdir runs/lab

`--only` takes patterns of blocks, experiments, or runs (EXPERIMENT_seedN). The lab may be killed at
any time: the same command resumes the work, and a training continues from its last checkpoint. A
failed run is reported, and the others continue. In a job array, add `--task_index=I --num_tasks=N`.
On one machine, start each of these tasks with `taskset -c I`, since a student keeps one core busy.
A result is made again if its recipe, data or experiment has changed.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import hashlib
import importlib.metadata
import json
import pathlib
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags, logging

from benchmarks.lab.data import Data, identity
from benchmarks.lab.experiments import (
    BLOCKS,
    EXPERIMENTS,
    GRIDS,
    RETIRED,
    STUDENTS,
    Experiment,
    block_of,
    blocks_of,
)
from benchmarks.lab.processes import locked, run_command
from benchmarks.lab.variants import CLIPS
from benchmarks.record import RESULTS, write_result
from diht_jax import command_line
from diht_jax.config import default_config, load_recipe
from diht_jax.terminal import ProgressBar

# Test data in addition to those of `--data`, by what is measured.
_TESTS = {
    "scenes": ("web",),
    "sizes": ("web",),
    "averaged": ("web",),
    "composition": ("web",),
    "long": ("web", "long_scenes"),
    "unseen": ("unseen_shots",),
    "unseen_k": ("unseen_shots",),
    "amount": ("web",),
    "clipart": ("clipart",),
    "concepts": ("concepts_{data_seed}",),
}
_PACKAGES = ("jax", "flax", "optax", "numpy", "pillow", "spacy", "easyocr")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: an experiment with a seed."""

    experiment: Experiment
    seed: int

    @property
    def name(self) -> str:
        """Name of the result file and of the folder."""
        return f"{self.experiment.name}_seed{self.seed}"

    @property
    def data(self) -> str:
        """Name of the variant that the student is trained on."""
        return self.experiment.data.format(seed=self.seed)

    @property
    def tests(self) -> dict[str, str]:
        """Variants that the student is measured on; the keys are their names in `measure`."""
        names = _TESTS.get(STUDENTS[self.experiment.student].measured, ())
        # Each draw of concepts has its own tests.
        seed = self.data.rpartition("_")[2]
        return {name.partition("_{")[0]: name.format(data_seed=seed) for name in names}

    @property
    def start(self) -> Run:
        """The run that provides the initial model; needs an experiment with `init_from`."""
        return Run(EXPERIMENTS[self.experiment.init_from], self.seed)


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_list("only", [], "Patterns of blocks, experiments or runs; unset: all but grids.")
    flags.DEFINE_bool("list", False, "Print what is done and what is missing, and run nothing.")
    flags.DEFINE_string("workdir", "runs/lab", "Where data and runs lie.")
    flags.DEFINE_string("data", "runs/data", "Folder with the tars of emoji and CIFAR-10.")
    flags.DEFINE_string("train", None, "Labelled records for the block b32: a path or URL.")
    flags.DEFINE_list("tasks", ["imagenet"], "Of the block b32, as --tasks of diht_jax.evaluate.")
    flags.DEFINE_string("results", str(RESULTS / "lab"), "Folder of the result files.")
    command_line.define_job_array_flags()


def main() -> None:
    """Lists the runs, or makes the missing ones."""
    given = flags.FLAGS
    results = pathlib.Path(given.results)
    runs = select_runs(given.only)
    if given.list:
        print(format_list(runs, results))
        return
    if not 0 <= given.task_index < given.num_tasks:
        raise ValueError(
            f"--task_index={given.task_index}: expected 0 to --num_tasks={given.num_tasks} minus 1"
        )
    # Takes a share of all runs, not of missing ones: these differ when tasks start at other times.
    share = runs[given.task_index :: given.num_tasks]
    missing = [run for run in share if not is_done(run, results)]
    # SIGTERM ends the running command, as ^C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    lab = Lab(
        pathlib.Path(given.workdir), pathlib.Path(given.data), results, given.train, given.tasks
    )
    failed = lab.make(missing)
    if failed:
        raise ValueError(f"{len(failed)} of {len(missing)} runs failed: {', '.join(failed)}")


def select_runs(patterns: Sequence[str]) -> list[Run]:
    """Returns the runs that match each pattern, ordered by block, then seed, then experiment.

    Raises:
        ValueError: a pattern matches no run.
    """
    current = [e for e in EXPERIMENTS.values() if e.name not in RETIRED]
    runs = [Run(e, seed) for e in current for seed in range(e.seeds)]
    order = list(BLOCKS)
    runs.sort(key=lambda run: (order.index(block_of(run.experiment.name)), run.seed))
    if not patterns:
        return [run for run in runs if block_of(run.experiment.name) not in GRIDS]
    chosen: dict[str, Run] = {}
    for pattern in patterns:
        found = [
            run
            for run in runs
            if any(
                fnmatch.fnmatchcase(name, pattern)
                for name in (*blocks_of(run.experiment.name), run.experiment.name, run.name)
            )
        ]
        if not found:
            raise ValueError(
                f"--only={pattern}: no block, experiment or run of this name; the blocks are "
                f"{', '.join(BLOCKS)}, and --list prints the experiments"
            )
        chosen |= {run.name: run for run in found}
    return list(chosen.values())


def definition(run: Run) -> str:
    """Hashes what determines a run, except the code: recipe, changes, data, measure, seed."""
    student = STUDENTS[run.experiment.student]
    parts = {
        "recipe": _describe_recipe(student.recipe),
        "config": {**student.config, **run.experiment.config},
        "data": identity(run.data),
        "tests": [identity(name) for name in run.tests.values()],
        "measured": student.measured,
        "seed": run.seed,
    }
    if run.experiment.init_from is not None:
        parts["init_from"] = definition(run.start)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


@functools.cache
def _describe_recipe(path: str) -> dict[str, str]:
    """Returns the non-default keys of a recipe: new keys of the defaults do not change them."""
    defaults = _flatten(default_config())
    recipe = _flatten(load_recipe(RESULTS.parents[1] / path))
    return {
        key: str(value)
        for key, value in sorted(recipe.items())
        if value is not None and value != defaults.get(key)
    }


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if hasattr(value, "items"):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_result(run: Run, results: pathlib.Path) -> dict[str, Any] | None:
    """Reads a run's result; None if it is missing or has another definition."""
    path = results / f"{run.name}.json"
    if not path.exists():
        return None
    result = json.loads(path.read_text())
    return result if result["definition"] == definition(run) else None


def is_done(run: Run, results: pathlib.Path) -> bool:
    """Returns whether the run already has a result of its current definition."""
    return read_result(run, results) is not None


class Lab:
    """Makes runs one after the other."""

    def __init__(
        self,
        workdir: pathlib.Path,
        shared: pathlib.Path,
        results: pathlib.Path,
        given: str | None = None,
        tasks: Sequence[str] = (),
    ):
        """Starts no run yet.

        Args:
            workdir: folder for data and runs.
            shared: folder of the public tars.
            results: folder of the result files.
            given: records for the block b32.
            tasks: evaluation tasks for the block b32.
        """
        self.workdir, self.shared, self.results = workdir, shared, results
        self.tasks = tasks
        self.data = Data(workdir, shared, self.trained, given)

    def make(self, runs: Sequence[Run]) -> list[str]:
        """Makes runs; returns the names of those that failed."""
        failed = []
        secs = estimate_secs(self.results)
        estimates = [round(secs[run.experiment.student]) for run in runs]
        with ProgressBar(total=sum(estimates), unit="s", desc="lab") as progress:
            for run, estimate in zip(runs, estimates, strict=True):
                progress.set_postfix_str(run.name)
                try:
                    self.make_one(run)
                except (RuntimeError, ValueError, OSError) as error:
                    failed.append(run.name)
                    logging.error("%s failed: %s", run.name, error)
                progress.update(estimate)
        return failed

    def make_one(self, run: Run) -> None:
        """Makes the data, trains and measures the student, and writes the result file."""
        folder = self.folder_of(run)
        student = STUDENTS[run.experiment.student]
        tests = {name: str(self.data.make(made)) for name, made in run.tests.items()}
        with locked(folder.with_name(f"{run.name}.lock")):
            secs = self.train(run)
            measured = folder / "measured.json"
            if run.experiment.init_from is not None:
                tests["start"] = str(self.folder_of(run.start))
            begin = time.monotonic()
            run_command(
                "benchmarks.lab.measure",
                f"--measured={student.measured}",
                f"--model={folder}",
                f"--tests={json.dumps({**tests, 'shared': str(self.shared)})}",
                f"--tasks={','.join(self.tasks)}",
                f"--output={measured}",
                log=folder / "lab.log",
            )
            payload = {
                "experiment": dataclasses.asdict(run.experiment),
                "seed": run.seed,
                "definition": definition(run),
                "revision": revision(),
                "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
                "training_secs": round(secs, 1),
                "measuring_secs": round(time.monotonic() - begin, 1),
                **json.loads(measured.read_text()),
            }
            command = f"python -m benchmarks.lab.run --only {run.name}"
            write_result(run.name, payload, self.results, command)
            if not run.experiment.keep_model:
                shutil.rmtree(folder)

    def train(self, run: Run) -> float:
        """Trains or resumes a student; returns the seconds that this call took."""
        folder, data = self.folder_of(run), self.data.make(run.data)
        student = STUDENTS[run.experiment.student]
        changes = {**student.config, **run.experiment.config, "seed": run.seed}
        clips = pathlib.Path(data) / CLIPS
        if clips.exists():
            changes["data.labels"] = str(clips)
        if run.experiment.init_from is not None:
            changes["model.init_from"] = self.trained(run.experiment.init_from, run.seed)
        marker = folder / "definition"
        if folder.exists() and (not marker.exists() or marker.read_text() != definition(run)):
            shutil.rmtree(folder)  # begun with another definition
        folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(definition(run))
        begin = time.monotonic()
        run_command(
            "diht_jax.train",
            f"--config={student.recipe}",
            f"--config.data.train={data}",
            *(f"--config.{key}={value}" for key, value in changes.items()),
            f"--workdir={folder}",
            log=folder / "lab.log",
        )
        return time.monotonic() - begin

    def trained(self, name: str, seed: int) -> pathlib.Path:
        """Returns the work directory of a student with `keep_model`; trains it first if needed."""
        run = Run(EXPERIMENTS[name], seed)
        folder = self.folder_of(run)
        with locked(folder.with_name(f"{run.name}.lock")):
            self.train(run)
        return folder

    def folder_of(self, run: Run) -> pathlib.Path:
        """Returns the work directory of a run."""
        return self.workdir / "runs" / run.name


def revision() -> str:
    """Returns the commit of the code, with "+changes" if tracked files of the code differ."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=RESULTS, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", ":/", ":(exclude,top)docs")
    # New result files are not changes of the code.
    is_changed = any("benchmarks/results/" not in line for line in changed.splitlines())
    return git("rev-parse", "HEAD") + ("+changes" if is_changed else "")


def estimate_secs(results: pathlib.Path) -> dict[str, float]:
    """Estimates seconds per run for each student: the median of its results, else `run_secs`."""
    known: dict[str, list[float]] = {name: [] for name in STUDENTS}
    for run in select_runs(["*"]):
        path = results / f"{run.name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            secs = result["training_secs"] + result["measuring_secs"]
            known[run.experiment.student].append(secs)
    return {
        name: statistics.median(found) if found else STUDENTS[name].run_secs
        for name, found in known.items()
    }


def format_list(runs: Sequence[Run], results: pathlib.Path) -> str:
    """Lists done and missing runs by block and experiment, with the estimated time left."""
    lines, total = [], 0.0
    done = {run.name: is_done(run, results) for run in runs}
    secs = estimate_secs(results)
    for block, (title, _) in BLOCKS.items():
        inside = [run for run in runs if block_of(run.experiment.name) == block]
        if not inside:
            continue
        left = sum(secs[run.experiment.student] for run in inside if not done[run.name])
        total += left
        finished = sum(done[run.name] for run in inside)
        minutes = f", {left / 60:.0f} minutes left" if block != "b32" else ""
        lines.append(f"{block} ({title}): {finished} of {len(inside)} runs{minutes}")
        for name in dict.fromkeys(run.experiment.name for run in inside):
            marks = "".join(
                "x" if done[run.name] else "." for run in inside if run.experiment.name == name
            )
            lines.append(f"    {marks:8s} {name}")
    lines.append(
        f"{total / 3600:.1f} hours of a machine with two idle cores are left, beside the data"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
