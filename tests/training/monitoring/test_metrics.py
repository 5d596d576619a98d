"""Metrics files: resumed runs have one line a step, and half-written lines do no harm."""

import json

import numpy as np

from diht_jax.training.monitoring.metrics import (
    MetricWriter,
    flatten_results,
    mean_scalars,
    plot_curves,
    read_metrics,
)


def write_steps(workdir, start, steps):
    writer = MetricWriter(workdir, start)
    for step in steps:
        writer.write(step, {"loss": step / 2})
    writer.close()


def test_steps_that_are_trained_again_replace_their_lines(tmp_path):
    write_steps(tmp_path, 0, [1, 2, 3, 4])
    write_steps(tmp_path, 2, [3, 4, 5])
    assert read_metrics(tmp_path) == [{"step": s, "loss": s / 2} for s in (1, 2, 3, 4, 5)]


def test_a_half_written_line_is_skipped(tmp_path):
    write_steps(tmp_path, 0, [1])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1]
    write_steps(tmp_path, 1, [2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_means_and_flattening():
    rows = [{"loss": np.float32(1), "norm": np.float32(2)}, {"loss": np.float32(4), "norm": 4.0}]
    assert mean_scalars(rows) == {"loss": 2.5, "norm": 3.0}
    results = {"a": {"top1": 0.5, "name": "x", "ok": True, "deep": {"n": 3}}}
    assert flatten_results(results) == {"a/top1": 0.5, "a/deep/n": 3.0}


def test_curves_of_a_run_without_lines_are_empty_panels(tmp_path):
    plot_curves(tmp_path)
    assert (tmp_path / "curves.png").exists()


def test_a_run_goes_on_without_an_unwritable_tensorboard(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    write_steps(tmp_path, 0, [1, 2])
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert caplog.text.count("the run goes on without TensorBoard") == 1


def test_lines_that_are_no_rows_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n[2]\n\xff\xfe\n{"loss": 3}\n{"step": 4}\n'
    )
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 4}]
