r"""Command: average models: WiSE-FT, uniform and greedy soups.

    python -m diht_jax.average --models runs/base,runs/tuned --method wise_ft --output averaged \
        --tasks cifar10,retrieval:photos.tar --target cifar10/top1 --reference retrieval/t2i_r1

Writes a model directory like `diht_jax.export`, with `average.json` and, for WiSE-FT with tasks,
the plot `average.png`. `docs/guides/train/finetuning.md` describes the methods.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import operator
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from diht_jax import command_line
from diht_jax.models.zoo import parse_fields
from diht_jax.terminal import format_table, print_escaped

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.base import Metric, Task
    from diht_jax.weights.inference import LoadedModel
    from diht_jax.weights.source import ModelFiles

METHODS = ("uniform", "greedy", "wise_ft")
RECORD_FILE = "average.json"


def define_flags() -> None:
    """Defines this command's flags; not at import, since commands share names."""
    command_line.define_encoding_flags()
    command_line.define_prompt_flags()
    command_line.define_task_flags()
    flags.DEFINE_list("models", [], "Released names, work directories or weight files: A,B,...")
    flags.DEFINE_enum(
        "method", "uniform", METHODS, "greedy needs --tasks, wise_ft is of two models."
    )
    flags.DEFINE_float(
        "alpha",
        0.5,
        "wise_ft: weight of the second model in what is written.",
        lower_bound=0,
        upper_bound=1,
    )
    flags.DEFINE_list(
        "alphas",
        [f"{i / 10:g}" for i in range(11)],
        "wise_ft: weights of the second model that are evaluated.",
    )
    flags.DEFINE_string(
        "target", None, "TASK/METRIC that the soup is chosen by, or that was fine-tuned for."
    )
    flags.DEFINE_string("reference", None, "wise_ft: TASK/METRIC of what should not be lost.")
    flags.DEFINE_bool("ema", False, "Of work directories: take the parameters' moving average.")
    flags.DEFINE_list(
        "architecture", [], "What a bare weight file does not hold: activation=quick_gelu,..."
    )
    flags.DEFINE_string("output", None, "Directory to make.")
    flags.DEFINE_string("format", "safetensors", "clip, open_clip, huggingface or safetensors.")
    flags.DEFINE_string("dtype", "float32", "Of the parameters: float32, bfloat16 or float16.")
    flags.DEFINE_string("license", None, "Licence of the weights, for the card.")


def main() -> None:
    """Averages the models of the flags."""
    from diht_jax.evaluation.task_parsing import open_source, parse_tasks

    given = flags.FLAGS
    command_line.require_flags("models", "output")
    tasks = parse_tasks(given.tasks, **command_line.task_defaults()) if given.tasks else []
    for task in tasks:
        open_source(task)  # reports a missing file before the models are loaded
    average_models(
        given.models,
        given.method,
        given.output,
        tasks=tasks,
        alphas=command_line.fractions("alphas"),
        architecture=parse_fields(given.architecture),
        **command_line.values("alpha", "target", "reference", "ema", "format", "dtype", "license"),
        **command_line.values("batch_size", "num_threads", "limit"),
    )


def average_models(
    models: Sequence[str],
    method: str,
    output: str | pathlib.Path,
    *,
    alpha: float = 0.5,
    alphas: Sequence[float] = (),
    tasks: Sequence[Task] = (),
    target: str | None = None,
    reference: str | None = None,
    ema: bool = False,
    architecture: dict[str, Any] | None = None,
    format: str = "safetensors",
    dtype: str = "float32",
    license: str | None = None,
    batch_size: int = 256,
    **evaluation: Any,
) -> dict[str, Any]:
    """Writes a weighted mean of models, with its metrics.

    Arguments have the names of the command's flags, see `define_flags`. For WiSE-FT the zero-shot
    model comes first. The output directory must be empty or missing, and tasks are those of
    `parse_tasks`. `evaluation` has further arguments of `evaluate_task`.

    Returns:
        The contents of `average.json`.

    Raises:
        ValueError: a model cannot be read, the models have different architectures, an argument
            of the method is missing, or `ema` or `architecture` applies to none of the models.
    """
    from diht_jax.weights import soups
    from diht_jax.weights.export import check_target

    output = pathlib.Path(output)
    check_target(output, format, dtype)
    metrics = _check(models, method, tasks, target, reference)
    evaluation = {"batch_size": batch_size, **evaluation}
    pool = _Models(models, ema, architecture, tasks, evaluation, (target, reference))
    found: dict[str, Any] = {}
    if method == "greedy" and target is not None:
        model, trials = soups.greedy_soup(
            models,
            pool.read,
            lambda candidate: pool.measure(candidate)[target],
            lower_is_better=metrics[target].lower_is_better,
        )
        members = [(trial.name, 1.0) for trial in trials if trial.kept]
        found["trials"] = [trial._asdict() for trial in trials]
    else:
        read, weights = pool.read, [1.0] * len(models)
        if method == "wise_ft":
            weights = [1 - alpha, alpha]
        if method == "wise_ft" and tasks and alphas:
            read = functools.cache(read)  # keeps the two models in memory for all alphas
            found["grid"] = [pool.measure_mean(models, each, read) for each in alphas]
        model = soups.average_models(models, weights, read)
        members = list(zip(models, weights, strict=True))
    if tasks:
        found["metrics"] = pool.measure(model)
    loss_scalars = pool.mean_loss_scalars(members)
    record = {
        "method": method,
        "members": [{"model": name, "weight": weight} for name, weight in members],
        "target": target,
        "reference": reference,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **({"loss_scalars": loss_scalars} if loss_scalars else {}),
        **found,
    }
    model = dataclasses.replace(model, loss_scalars=loss_scalars, step=None, ema=False, sha256=None)
    _write(output, format, dtype, model, record, metrics, license)
    return record


def _write(
    output: pathlib.Path,
    format: str,
    dtype: str,
    model: ModelFiles,
    record: dict[str, Any],
    metrics: dict[str, Metric],
    license: str | None,
) -> None:
    """Writes the model with its card, the record and the plot, and prints the record."""
    from diht_jax.evaluation.charts import draw_trade_off
    from diht_jax.evaluation.results import write_results
    from diht_jax.weights.export import write_model
    from diht_jax.weights.model_card import model_card

    card = model_card(
        format,
        model,
        output.name,
        members=[(member["model"], member["weight"]) for member in record["members"]],
        results=[("diht_jax.average", record["metrics"])] if "metrics" in record else [],
        license=license,
    )
    write_model(output, format, model, card=card, dtype=dtype)
    write_results(output / RECORD_FILE, record)
    if "grid" in record and record["target"]:
        draw_trade_off(record, metrics, output / "average.png")
    logging.info("wrote %s", output)
    print_escaped(_format(record, metrics))


def _check(
    models: Sequence[str],
    method: str,
    tasks: Sequence[Task],
    target: str | None,
    reference: str | None,
) -> dict[str, Metric]:
    """Checks the arguments, and returns the metrics of the tasks by "TASK/METRIC"."""
    from diht_jax.evaluation.task_parsing import check_task

    if len(models) < 2 or (method == "wise_ft" and len(models) != 2):
        wanted = "two models, the zero-shot one first" if method == "wise_ft" else "several models"
        raise ValueError(f"--models={','.join(models)}: --method={method} needs {wanted}")
    metrics = {}
    for task in tasks:
        metrics |= {f"{task.name}/{name}": m for name, m in check_task(task).metrics.items()}
    if method == "greedy" and not (tasks and target):
        raise ValueError("--method=greedy needs --tasks and --target, held out for the choice")
    _check_chosen(target, reference, metrics)
    if (reference is None) != (target is None) and method == "wise_ft":
        raise ValueError("--target and --reference go together: one is drawn against the other")
    return metrics


def _check_chosen(target: str | None, reference: str | None, metrics: Collection[str]) -> None:
    """Raises ValueError if the target or the reference is not among `metrics`."""
    for flag, name in (("target", target), ("reference", reference)):
        if name is not None and name not in metrics:
            known = ", ".join(metrics) or "none, as there are no --tasks"
            raise ValueError(f"--{flag}={name}: not among the metrics of --tasks: {known}")


class _Models:
    """Reads models and evaluates averages of them; programs are compiled only once."""

    def __init__(
        self,
        names: Sequence[str],
        ema: bool,
        architecture: dict[str, Any] | None,
        tasks: Sequence[Task],
        evaluation: dict[str, Any],
        chosen: tuple[str | None, str | None],
    ):
        """Checks that `ema` and `architecture`, if given, apply to at least one of the models."""
        from diht_jax.training.workdir.saved_run import is_run
        from diht_jax.training.workdir.stored_run import local_run

        self._runs = {name for name in names if is_run(local_run(name))}
        given = f"--models={','.join(names)}"
        if ema and not self._runs:
            raise ValueError(f"--ema: only work directories of diht_jax.train have one; {given}")
        if architecture and self._runs.issuperset(names):
            raise ValueError(f"--architecture: work directories know theirs; none for {given}")
        self._ema, self._architecture = ema, architecture
        self._tasks, self._evaluation, self._chosen = tasks, evaluation, chosen
        self._loaded: LoadedModel | None = None
        self._loss_scalars: dict[str, Mapping[str, float]] = {}

    def read(self, name: str) -> ModelFiles:
        """Reads a model with NumPy arrays, named as the user typed it."""
        import jax
        import numpy as np

        from diht_jax.loading import read_model

        if name in self._runs:
            model = read_model(name, ema=self._ema)
        else:
            model = read_model(name, architecture=self._architecture)
        if model.decoder is not None and name not in self._loss_scalars:
            logging.warning("%s: the caption decoder is left out, no format has one", name)
        self._loss_scalars[name] = model.loss_scalars
        params = jax.tree.map(np.asarray, model.params)
        return dataclasses.replace(model, params=params, path=name, heads={}, decoder=None)

    def mean_loss_scalars(self, members: Sequence[tuple[str, float]]) -> dict[str, float]:
        """Returns weighted means of the learnt loss scalars that all models have."""
        weights = [weight for _, weight in members if weight]
        found = [self._loss_scalars[name] for name, weight in members if weight]
        means = {}
        for name in sorted(set().union(*found)):
            values = [scalars[name] for scalars in found if name in scalars]
            if len(values) < len(found):
                logging.warning("%s: left out, since not all models have learnt it", name)
                continue
            means[name] = math.fsum(map(operator.mul, weights, values)) / math.fsum(weights)
        return means

    def measure_mean(
        self, models: Sequence[str], alpha: float, read: Callable[[str], ModelFiles]
    ) -> dict[str, Any]:
        """Evaluates the mean of two models in which the second one has the weight `alpha`."""
        from diht_jax.weights.soups import average_models

        measured = self.measure(average_models(models, [1 - alpha, alpha], read))
        shown = ", ".join(f"{name} {number:.4f}" for name, number in measured.items())
        logging.info("alpha %g: %s", alpha, shown)
        return {"alpha": alpha, "metrics": measured}

    def measure(self, model: ModelFiles) -> dict[str, float]:
        """Evaluates a model, and returns its metrics by "TASK/METRIC"."""
        import jax

        from diht_jax import sharding
        from diht_jax.evaluation.results import named_metrics
        from diht_jax.evaluation.tasks import evaluate_task
        from diht_jax.loading import put_on_devices

        mesh = sharding.create_mesh(data=-1, fsdp=1, devices=jax.local_devices())
        if self._loaded is None:
            batch_size = self._evaluation["batch_size"]
            self._loaded = put_on_devices(model, mesh, batch_size=batch_size)
        shardings = sharding.tree_shardings(model.params, mesh)
        self._loaded.update(jax.device_put(model.params, shardings), step=None)
        measured = named_metrics(
            evaluate_task(self._loaded, task, **self._evaluation) for task in self._tasks
        )
        _check_chosen(*self._chosen, measured)  # top-5 of few classes is not measured
        return measured


def _format(record: dict[str, Any], metrics: dict[str, Metric]) -> str:
    """Formats the measurements as tables."""
    from diht_jax.evaluation.results import format_value

    def value(name: str, number: float) -> str:
        return "" if math.isnan(number) else format_value(metrics[name].unit, number)

    target, lines = record["target"], []
    if "trials" in record:
        rows: list[tuple[str, ...]] = []
        for trial in record["trials"]:
            reached = [value(target, trial[name]) for name in ("alone", "with_it")]
            rows.append((trial["name"], *reached, "kept" if trial["kept"] else "left out"))
        lines.append(format_table(("model", "alone", "soup with it", ""), rows, "lrrl"))
    if "grid" in record:
        names = list(record["grid"][0]["metrics"])
        rows = []
        for row in record["grid"]:
            cells = [value(name, row["metrics"][name]) for name in names]
            rows.append((f"{row['alpha']:g}", *cells))
        lines.append(format_table(("alpha", *names), rows, "r" * (1 + len(names))))
    weights = ", ".join(f"{m['weight']:g} x {m['model']}" for m in record["members"])
    lines.append(f"written: the mean of {weights}")
    lines += [f"{name}: {value(name, x)}" for name, x in record.get("metrics", {}).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    command_line.run(main)
