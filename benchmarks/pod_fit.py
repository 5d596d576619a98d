"""Memory and time bounds of the recipes on their pods, and their growth from 8 to 4,096 chips.

    python -m benchmarks.pod_fit
    python -m benchmarks.pod_fit --parts gpus

Compiles for real pods without needing one: (1) every recipe of `configs/` that names a TPU slice,
and (2) one recipe, with a fixed number of examples per chip, on slices of v5p, which span the whole
range of sizes. Sizes between the compiled ones come from the formula in `extrapolate`, which the
table compares with every compiled row. The part `gpus` compiles (3) the same recipes for H100s, and
needs JAX's CUDA plugin instead of libtpu. Writes `benchmarks/results/pod_fit.json`, or
`pod_fit_gpus.json`, after each row, and prints the tables of `docs/benchmarks/pods.md`. Started
again, it continues with the missing rows. Every row includes the date and the command that made it,
because rows of earlier runs are kept. A row takes minutes.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

# The local devices are not used; JAX reads this when it is imported.
os.environ["JAX_PLATFORMS"] = "cpu"

import ml_collections
from absl import app, flags, logging

from benchmarks.record import RESULTS, command_line, utc_now, write_result
from diht_jax.compile import compile_step
from diht_jax.config import load_recipe
from diht_jax.hardware.report import StepReport
from diht_jax.hardware.topologies import LOCAL, get_topology
from diht_jax.models.zoo import get_architecture

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
NAME, GPU_NAME = "pod_fit", "pod_fit_gpus"
GPU_TOPOLOGIES = ("h100:8", "h100:64x8")

# Chips -> slice of v5p, the family with slices over the whole range.
SLICES = {
    8: "v5p:2x2x2",
    16: "v5p:2x2x4",
    32: "v5p:2x4x4",
    64: "v5p:4x4x4",
    128: "v5p:4x4x8",
    256: "v5p:4x8x8",
    512: "v5p:8x8x8",
    1024: "v5p:8x8x16",
    2048: "v5p:8x16x16",
    4096: "v5p:16x16x16",
}

_RECIPE = flags.DEFINE_string("recipe", "diht_vitb16", "Recipe of the second table.")
_ONLY = flags.DEFINE_list("only", [], "Recipes of tables 1 and 3 to compile now; all by default.")
_EXAMPLES = flags.DEFINE_integer("examples_per_chip", 256, "Local batch of the second table.")
_COMPILED = flags.DEFINE_list("compiled", ["8", "4096"], "Chips to compile for.")
_PARTS = flags.DEFINE_list(
    "parts", ["recipes", "growth"], "What to measure: recipes, growth; or gpus."
)
_GPUS = flags.DEFINE_list("gpus", list(GPU_TOPOLOGIES), "GPUs to compile for in the part `gpus`.")
_FRESH = flags.DEFINE_bool("fresh", False, "Measure again what the results file has.")


def main(_: list[str]) -> None:
    """Compiles the missing rows, writes after every row, and prints both tables."""
    logging.set_verbosity(logging.INFO)
    if "gpus" in _PARTS.value:
        measure_gpus()
        return
    results = _earlier_results(NAME, ("recipes", "growth"))
    if "recipes" in _PARTS.value:
        for name in recipes_for_pods(_ONLY.value):
            _measure(results["recipes"], name, functools.partial(measure_recipe, name))
            write_result(NAME, results)
    if "growth" in _PARTS.value:
        for chips in sorted(int(text) for text in _COMPILED.value):
            row_name = f"{_RECIPE.value}, {chips} chips"
            _measure(results["growth"], row_name, lambda chips=chips: measure_growth(chips))
            write_result(NAME, results)
    print(recipe_table(results["recipes"]))
    print()
    print(growth_table(results))


def recipes_for_pods(only: list[str]) -> list[str]:
    """Returns the recipes that name a slice, or the requested ones of them.

    Returns:
        Names such as `diht_vitb16`, or `diht_vitb16_stages:stage=1` for each of several stages.
    """
    # Recipes for the local machine, which need an argument, and for one node.
    others = ("common", "own_data", "datacomp")
    names = []
    files = [*CONFIGS.glob("*.py"), *CONFIGS.glob("stages/*.py")]
    for path in sorted((p for p in files if p.stem not in others), key=lambda p: p.stem):
        config = load_recipe(path)
        if config.topology in (None, LOCAL):
            continue
        stages = range(1, (config.stage.count or 0) + 1)
        names += [f"{path.stem}:stage={number}" for number in stages] or [path.stem]
    unknown = sorted(set(only) - set(names))
    if unknown:
        raise ValueError(f"--only: no recipe for a slice is called {', '.join(unknown)}")
    return [name for name in names if not only or name in only]


def _load(name: str, argument: str = "") -> ml_collections.ConfigDict:
    stem, _, own = name.partition(":")
    return load_recipe(stem, ",".join(filter(None, (own, argument))))


def measure_recipe(name: str) -> dict[str, Any]:
    """Compiles a recipe for its own topology."""
    config = _load(name)
    return as_row(compile_step(config, get_topology(config.topology)))


def measure_gpus() -> None:
    """Compiles the recipes with their settings for GPUs, and prints the table."""
    results = _earlier_results(GPU_NAME, ("gpus",))
    for topology in _GPUS.value:
        for name in recipes_for_pods(_ONLY.value):
            measure = functools.partial(measure_on_gpus, name, topology)
            _measure(results["gpus"], f"{name}, {topology}", measure)
            write_result(GPU_NAME, results)
    print(gpu_table(results["gpus"]))


def measure_on_gpus(name: str, topology: str) -> dict[str, Any]:
    """Compiles a recipe with its settings for a topology."""
    config = _load(name, f"topology={topology}")
    report = compile_step(config, get_topology(topology))
    return {
        **as_row(report),
        "compiler_options": report.topology.compiler_options,
        "recipe": name,
        "scan_layers": config.model.scan_layers,
        "attention": report.attention,
        "loss_form": report.loss_form[0],
        "loss_form_reason": report.loss_form[1],
    }


def measure_growth(chips: int) -> dict[str, Any]:
    """Compiles the recipe of the second table for a number of chips."""
    config = load_recipe(CONFIGS / f"{_RECIPE.value}.py")
    config.data.batch_size = chips * _EXAMPLES.value
    config.micro_batch = None
    config.mesh.fsdp = 1  # replicates the whole state on every chip, for any number of chips
    return as_row(compile_step(config, get_topology(SLICES[chips])))


def as_row(report: StepReport) -> dict[str, Any]:
    """Converts a report to JSON."""
    estimate = report.roofline
    collectives = report.traffic.collectives if report.traffic else ()
    return {
        "topology": report.topology.name,
        "chips": len(report.topology.devices),
        "mesh": report.mesh,
        "batch_size": report.batch_size,
        "micro_batch": report.micro_batch,
        "remat": report.remat,
        "attention": report.attention,
        "loss_form": report.loss_form[0],
        "fits": report.fits,
        "memory_limit_bytes": report.memory_limit_bytes,
        "argument_bytes": report.argument_bytes,
        "temporary_bytes": report.temporary_bytes,
        "peak_bytes": report.peak_bytes,
        "needed_bytes": report.needed_bytes,
        "matmul_flops": report.flops,
        "model_flops": report.model_flops,
        "memory_traffic_bytes": report.traffic and report.traffic.memory_bytes,
        "traffic_bytes_by_kind": report.traffic and report.traffic.bytes_by_kind,
        "sent_bytes": report.traffic and report.traffic.sent_bytes,
        "ring_bytes": report.traffic and _sent(report, "collective-permute"),
        "reduced_bytes": report.traffic and _sent(report, "all-reduce"),
        "collectives": [dataclasses.asdict(collective) for collective in collectives],
        "compute_secs": estimate and estimate.compute_secs,
        "memory_secs": estimate and estimate.memory_secs,
        "network_secs": estimate and estimate.network_secs,
        "latency_secs": estimate and estimate.latency_secs,
        "step_secs": estimate and estimate.step_secs,
        "mfu_bound": estimate and estimate.mfu,
        "scheduled_secs": estimate and estimate.scheduled_secs,
        "scheduled_secs_by_kind": estimate and estimate.secs_by_kind,
        "scheduled_mfu": estimate and estimate.scheduled_mfu,
        "unknown_kernels": report.traffic and report.traffic.unknown_kernels,
        "trace_secs": round(report.trace_secs, 1),
        "compile_secs": round(report.compile_secs, 1),
    }


def extrapolate(base: dict[str, Any], chips: int, embed_dim: int) -> dict[str, float]:
    """Computes the needs of a chip in a mesh of `chips`, from a row with the same local batch.

    With P chips, n examples per chip and embeddings of size d, the cost of the towers does not
    depend on P. Each chip compares its n images with P blocks of n texts, in four products (the
    logits twice, two gradients), and every block passes every chip. Finally, the gradients of the
    texts and four statistics of each, all float32, return to their chips:

        FLOPs(P) = towers + P 8 n^2 d         ring(P) = P round + 4 n (d + 4)
        sums(P) = 2 (P - 1)/P gradients       memory(P) = constant

    Args:
        base: a row of `as_row`.
        chips: P.
        embed_dim: d.

    Returns:
        `matmul_flops`, `ring_bytes`, `reduced_bytes` and `peak_bytes` per chip.
    """
    local_batch = base["batch_size"] // base["chips"]
    block_flops = 8 * local_batch**2 * embed_dim
    home_bytes = 4 * local_batch * (embed_dim + 4)
    round_bytes = (base["ring_bytes"] - home_bytes) / base["chips"]
    gradient_bytes = base["reduced_bytes"] / (2 * (1 - 1 / base["chips"]))
    return {
        "matmul_flops": base["matmul_flops"] + block_flops * (chips - base["chips"]),
        "ring_bytes": chips * round_bytes + home_bytes,
        "reduced_bytes": 2 * (1 - 1 / chips) * gradient_bytes,
        "peak_bytes": base["peak_bytes"],
    }


def recipe_table(rows: dict[str, dict[str, Any]]) -> str:
    """Formats a Markdown table with one line per recipe."""
    lines = [
        "| recipe | attention | remat | micro-batch | state and batch | temporaries | peak | "
        "FLOPs (of the model) | memory traffic | sent | permutes | step as scheduled, at least | "
        "MFU, at most | all overlapped |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in sorted(rows.items()):
        cells = [
            f"`{name}`",
            row["attention"]["vision"],
            row["remat"],
            f"{row['micro_batch']:,}" if row["micro_batch"] else "-",
            _gib(row["argument_bytes"]),
        ]
        if row["fits"]:
            cells += [_gib(row["temporary_bytes"]), _gib(row["peak_bytes"]), *_cost_cells(row)]
            cells += [f"{permutes(row):,}" if "collectives" in row else "-"]
            cells += _time_cells(row)
        else:
            cells += ["-", f"{_gib(row['needed_bytes'])}: too large"] + ["-"] * 7
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_table(rows: dict[str, dict[str, Any]]) -> str:
    """Formats a Markdown table with one line per recipe and topology."""
    lines = [
        "| recipe | for | micro-batch | fsdp | loss | needed | FLOPs (of the model) | "
        "memory traffic | sent | permutes | latency | step as scheduled, at least | MFU, at most | "
        "all overlapped |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows.values(), key=lambda row: (row["chips"], row["recipe"])):
        cells = [
            f"`{row['recipe']}`",
            f"`{row['topology']}`",
            f"{row['micro_batch']:,}" if row["micro_batch"] else "-",
            str(row["mesh"]["fsdp"]),
            row["loss_form"],
            f"{_gib(row['needed_bytes'])}{'' if row['fits'] else ': too large'}",
            *_cost_cells(row),
            f"{permutes(row):,}",
            f"{1e3 * row['latency_secs']:.1f} ms",
            *_time_cells(row),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def permutes(row: dict[str, Any]) -> int:
    """Returns the number of sequential permutes in a compiled row's program."""
    return sum(
        entry["count"]
        for entry in row.get("collectives", ())
        if entry["kind"] == "collective-permute"
    )


def _cost_cells(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['matmul_flops'] / 1e12:,.1f} ({row['model_flops'] / 1e12:,.1f}) TFLOP",
        f"{row['memory_traffic_bytes'] / 1e9:,.0f} GB",
        f"{row['sent_bytes'] / 1e9:.2f} GB",
    ]


def _time_cells(row: dict[str, Any]) -> list[str]:
    """Formats both time bounds; older rows have only the one in which everything overlaps."""
    overlapped = f"{1e3 * row['step_secs']:,.0f} ms"
    if not row.get("scheduled_secs"):
        return ["-", "-", overlapped]
    return [f"{1e3 * row['scheduled_secs']:,.0f} ms", f"{row['scheduled_mfu']:.1%}", overlapped]


def growth_table(results: dict[str, dict[str, Any]]) -> str:
    """Formats a Markdown table by size: the formula, and its error where a size was compiled."""
    compiled = {row["chips"]: row for row in results["growth"].values()}
    if not compiled:
        return f"growth: nothing compiled yet for {_RECIPE.value}"
    base = compiled[min(compiled)]
    arch = get_architecture(load_recipe(CONFIGS / f"{_RECIPE.value}.py").model.name)
    lines = [
        "| chips | global batch | from | peak | FLOPs | sent round the ring | sent for sums | "
        "formula off by |",
        "|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    for chips in SLICES:
        formula = extrapolate(base, chips, arch.embed_dim)
        row, source, error = formula, "formula", ""
        if chips in compiled:
            row, source = compiled[chips], compiled[chips]["topology"]
            parts = ("matmul_flops", "ring_bytes", "reduced_bytes")
            error = f"{max(abs(formula[key] / row[key] - 1) for key in parts):.2%}"
        lines.append(
            f"| {chips:,} | {chips * _EXAMPLES.value:,} | {source} | {_gib(row['peak_bytes'])} | "
            f"{row['matmul_flops'] / 1e12:.2f} TFLOP | {row['ring_bytes'] / 1e9:.3f} GB | "
            f"{row['reduced_bytes'] / 1e9:.3f} GB | {error if row is not base else 'base'} |"
        )
    return "\n".join(lines)


def _measure(rows: dict[str, Any], name: str, measure: Any) -> None:
    if name in rows and not _FRESH.value:
        logging.info("%s: in the results file already", name)
        return
    logging.info("%s: compiling", name)
    rows[name] = {**measure(), "date_utc": utc_now(), "command": command_line()}
    logging.info("%s: %s", name, json.dumps(rows[name]))


def _earlier_results(name: str, parts: Sequence[str]) -> dict[str, dict[str, Any]]:
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    return {part: earlier.get(part, {}) for part in parts}


def _sent(report: StepReport, kind: str) -> int:
    return sum(row.sent_bytes for row in report.traffic.collectives if row.kind == kind)


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.2f} GiB"


if __name__ == "__main__":
    app.run(main)
