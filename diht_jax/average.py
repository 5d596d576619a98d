r"""Command: average models: WiSE-FT, uniform and greedy soups.

    python -m diht_jax.average --models runs/base,runs/tuned --method wise_ft --output averaged \
        --tasks cifar10,retrieval:photos.tar --target cifar10/top1 --reference retrieval/t2i_r1

Writes a model directory as `diht_jax.export` does, `average.json` in it, and for WiSE-FT with tasks
the plot `average.png`. `docs/guides/train/finetuning.md` describes the methods.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import operator
import pathlib
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from diht_jax import command_line
from diht_jax.models.zoo import parse_fields
from diht_jax.terminal import format_table, print_escaped

if TYPE_CHECKING:
    from diht_jax.evaluation.protocols.base import Metric, Task
    from diht_jax.extras.soups import Ingredient
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
    flags.DEFINE_string(
        "method", "uniform", "uniform, greedy (needs --tasks), or wise_ft (of two models)."
    )
    flags.DEFINE_float("alpha", 0.5, "wise_ft: weight of the second model in what is written.")
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
    from diht_jax.evaluation.task_parsing import check_source, parse_tasks

    given = flags.FLAGS
    command_line.require_flags("models", "output")
    tasks = parse_tasks(given.tasks, **command_line.task_defaults()) if given.tasks else []
    for task in tasks:
        check_source(task)  # a missing file should not have to wait for the models
    average_models(
        given.models,
        given.method,
        given.output,
        alpha=given.alpha,
        alphas=command_line.numbers("alphas"),
        tasks=tasks,
        target=given.target,
        reference=given.reference,
        ema=given.ema,
        architecture=parse_fields(given.architecture),
        format=given.format,
        dtype=given.dtype,
        license=given.license,
        batch_size=given.batch_size,
        num_threads=given.num_threads,
        limit=given.limit,
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
    """Writes a weighted mean of models, and how good it is.

    Args:
        models: as `load_model` takes them; of WiSE-FT the zero-shot one, then the fine-tuned one.
        method: one of `METHODS`.
        output: directory to make; must be empty where it exists.
        alpha, alphas: of WiSE-FT, weights of the fine-tuned model: written, and evaluated.
        tasks: of `parse_tasks`, to evaluate on.
        target, reference: "TASK/METRIC", see the flags.
        ema: take the moving average of the parameters of those models that are work directories.
        architecture: of `load_model`, for those that are not.
        format, dtype, license: of `diht_jax.export`.
        batch_size, **evaluation: of `evaluate_task`; also `num_threads` and `limit`.

    Returns:
        What `average.json` holds.

    Raises:
        ValueError: a model cannot be read, the models are not of one architecture, the method
            lacks what it needs, or `ema` or `architecture` applies to none of the models.
    """
    from diht_jax.weights.export import check_target

    output = pathlib.Path(output)
    check_target(output, format, dtype)
    metrics = _check(models, method, [alpha, *alphas], tasks, target, reference)
    evaluation = {"batch_size": batch_size, **evaluation}
    pool = _Models(models, ema, architecture, tasks, evaluation, (target, reference))
    if method == "greedy" and target is not None:
        from diht_jax.extras.soups import greedy_soup

        model, trials = greedy_soup(
            models,
            pool.read,
            lambda candidate: pool.measure(candidate)[target],
            lower_is_better=metrics[target].lower_is_better,
        )
        members = [(trial.name, 1.0) for trial in trials if trial.kept]
        found: dict[str, Any] = {"trials": [vars(trial) for trial in trials]}
    else:
        weights = [1 - alpha, alpha] if method == "wise_ft" else [1.0] * len(models)
        is_measured = method == "wise_ft" and bool(tasks)
        model, found = _mix(pool, models, weights, alphas if is_measured else ())
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
    _write(output, format, dtype, model, pool.sources[model.name], record, metrics, license)
    return record


def _mix(
    pool: _Models, models: Sequence[str], weights: Sequence[float], alphas: Sequence[float]
) -> tuple[Ingredient, dict[str, Any]]:
    """The mean of models; and for alphas, "grid": what the means of the two models reach."""
    from diht_jax.extras import soups

    # The two models of WiSE-FT stay in memory for all alphas.
    read = functools.cache(pool.read) if alphas else pool.read
    found: dict[str, Any] = {"grid": []} if alphas else {}
    for alpha in alphas:
        measured = pool.measure(soups.average_models(models, [1 - alpha, alpha], read))
        shown = ", ".join(f"{name} {number:.4f}" for name, number in measured.items())
        logging.info("alpha %g: %s", alpha, shown)
        found["grid"].append({"alpha": alpha, "metrics": measured})
    return soups.average_models(models, weights, read), found


def _write(
    output: pathlib.Path,
    format: str,
    dtype: str,
    model: Ingredient,
    source: ModelFiles,
    record: dict[str, Any],
    metrics: dict[str, Metric],
    license: str | None,
) -> None:
    """Writes the model with its card, the record and the plot, and prints the record."""
    from diht_jax.evaluation.charts import draw_trade_off
    from diht_jax.evaluation.results import write_results
    from diht_jax.weights.export import find_lost_scalars, write_model
    from diht_jax.weights.model_card import model_card

    loss_scalars = record.get("loss_scalars", {})
    mean = dataclasses.replace(
        source,
        arch=model.arch,
        params=model.params,
        loss_scalars=loss_scalars,
        step=None,
        ema=False,
        sha256=None,
    )
    card = model_card(
        format,
        mean,
        output.name,
        members=[(member["model"], member["weight"]) for member in record["members"]],
        results=[("diht_jax.average", record["metrics"])] if "metrics" in record else [],
        lost=find_lost_scalars(format, model.arch, loss_scalars, output.name),
        license=license,
    )
    write_model(output, format, mean, card=card, dtype=dtype)
    write_results(output / RECORD_FILE, record)
    if "grid" in record and record["target"]:
        draw_trade_off(record, metrics, output / "average.png")
    logging.info("wrote %s", output)
    print_escaped(_format(record, metrics))


def _check(
    models: Sequence[str],
    method: str,
    alphas: Sequence[float],
    tasks: Sequence[Task],
    target: str | None,
    reference: str | None,
) -> dict[str, Metric]:
    """The metrics of the tasks, by "TASK/METRIC", once the arguments are known to be right."""
    from diht_jax.evaluation.task_parsing import check_task

    if method not in METHODS:
        raise ValueError(f"--method={method}: expected one of {', '.join(METHODS)}")
    if len(models) < 2 or (method == "wise_ft" and len(models) != 2):
        wanted = "two models, the zero-shot one first" if method == "wise_ft" else "several models"
        raise ValueError(f"--models={','.join(models)}: --method={method} needs {wanted}")
    for alpha in alphas:
        if not 0 <= alpha <= 1:
            raise ValueError(f"--alpha, --alphas: expected numbers from 0 to 1, got {alpha:g}")
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
    """Raises ValueError for a target or a reference that is none of some metrics."""
    for flag, name in (("target", target), ("reference", reference)):
        if name is not None and name not in metrics:
            known = ", ".join(metrics) or "none, as there are no --tasks"
            raise ValueError(f"--{flag}={name}: not among the metrics of --tasks: {known}")


class _Models:
    """Reads models, and measures averages of them; the programs are compiled once.

    Attributes:
        sources: what the models that were read come with, except their parameters, by name.
    """

    def __init__(
        self,
        names: Sequence[str],
        ema: bool,
        architecture: dict[str, Any] | None,
        tasks: Sequence[Task],
        evaluation: dict[str, Any],
        chosen: tuple[str | None, str | None],
    ):
        """Checks that the two options of `read_model` apply to one of the models at least."""
        from diht_jax.training.workdir.stored_run import local_run
        from diht_jax.training.workdir.trained_model import is_run

        self._runs = {name for name in names if is_run(local_run(name))}
        given = f"--models={','.join(names)}"
        if ema and not self._runs:
            raise ValueError(f"--ema: only work directories of diht_jax.train have one; {given}")
        if architecture and self._runs.issuperset(names):
            raise ValueError(f"--architecture: work directories know theirs; none for {given}")
        self._ema, self._architecture = ema, architecture
        self._tasks, self._evaluation, self._chosen = tasks, evaluation, chosen
        self._loaded: LoadedModel | None = None
        self.sources: dict[str, ModelFiles] = {}

    def read(self, name: str) -> Ingredient:
        """Reads a model."""
        import jax
        import numpy as np

        from diht_jax.extras.soups import Ingredient
        from diht_jax.loading import read_model

        if name in self._runs:
            model = read_model(name, ema=self._ema)
        else:
            model = read_model(name, architecture=self._architecture)
        if model.decoder is not None and name not in self.sources:
            logging.warning("%s: the caption decoder is left out, no format has one", name)
        self.sources[name] = dataclasses.replace(model, params={}, heads={}, decoder=None)
        params = jax.tree.map(np.asarray, model.params)
        tokenizer = None if model.tokenizer is None else model.tokenizer.describe()
        return Ingredient(name, model.arch, params, model.preprocessing, tokenizer)

    def mean_loss_scalars(self, members: Sequence[tuple[str, float]]) -> dict[str, float]:
        """The weighted mean of what the losses of the models have learnt; of each that all have."""
        weights = [weight for _, weight in members if weight]
        found = [self.sources[name].loss_scalars for name, weight in members if weight]
        means = {}
        for name in sorted(set().union(*found)):
            values = [scalars[name] for scalars in found if name in scalars]
            if len(values) < len(found):
                logging.warning("%s: left out, since not all models have learnt it", name)
                continue
            means[name] = math.fsum(map(operator.mul, weights, values)) / math.fsum(weights)
        return means

    def measure(self, model: Ingredient) -> dict[str, float]:
        """The metrics of a model by "TASK/METRIC"."""
        import jax

        from diht_jax import sharding
        from diht_jax.evaluation.tasks import evaluate_task
        from diht_jax.loading import put_on_devices

        mesh = sharding.create_mesh(data=-1, fsdp=1, devices=jax.local_devices())
        if self._loaded is None:
            files = dataclasses.replace(self.sources[model.name], params=model.params)
            batch_size = self._evaluation["batch_size"]
            self._loaded = put_on_devices(files, mesh, batch_size=batch_size)
        shardings = sharding.tree_shardings(model.params, mesh)
        self._loaded.update(jax.device_put(model.params, shardings), step=None)
        measured = {}
        for task in self._tasks:
            result = evaluate_task(self._loaded, task, **self._evaluation)
            measured |= {f"{task.name}/{name}": x for name, x in result["metrics"].items()}
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
