"""Metrics files: resumed runs have one line a step, and half-written lines do no harm."""

from tensorboard.compat.proto import event_pb2

from diht_jax.records.shard_files import read_records
from diht_jax.training.monitoring.metrics import (
    MetricWriter,
    plot_curves,
    read_metrics,
)
from tests.records.stores import BucketStore


def test_a_run_goes_on_without_an_unwritable_tensorboard(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    writer = MetricWriter(tmp_path, 0)
    for step in (1, 2):
        writer.write(step, {"loss": step / 2})
    writer.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]
    assert caplog.text.count("the run goes on without TensorBoard") == 1


def event_files(bucket, folder):
    """The events of a run in a bucket, by file, in the order in which TensorBoard reads them."""
    files = []
    for path in sorted(BucketStore().find(f"{bucket}/run/tensorboard")):
        copy = folder / path.rsplit("/", 1)[1]
        copy.write_bytes(BucketStore().cat_file(path))
        files.append([event_pb2.Event.FromString(event) for event in read_records(copy)])
    return files


def test_a_run_in_a_bucket_can_be_watched(bucket, tmp_path):
    writer = MetricWriter(f"{bucket}/run", 4)
    for step in (5, 6):
        writer.write(step, {"loss": step / 2})
        # The writer is open, and could be killed now.
        assert read_metrics(f"{bucket}/run")[-1] == {"step": step, "loss": step / 2}
        [[version, start, *events]] = event_files(bucket, tmp_path)
        assert (version.file_version, start.step) == ("brain.Event:2", 5)
        values = [(event.step, event.summary.value[0].simple_value) for event in events]
        assert values == [(s, s / 2) for s in range(5, step + 1)]
    writer.close()
    plot_curves(f"{bucket}/run")
    assert BucketStore().exists(f"{bucket}/run/curves.png")


def test_a_bucket_that_fails_for_a_while_costs_no_line(bucket, tmp_path, caplog):
    writer = MetricWriter(f"{bucket}/run", 0)
    for step in range(1, 5):
        # An object of lines and one of events are written for each step.
        BucketStore.failures = 2 if step in (2, 4) else 0
        writer.write(step, {"loss": step / 2})
        assert read_metrics(f"{bucket}/run")[-1]["step"] == (step if step in (1, 3) else step - 1)
    assert caplog.text.count("kept for later, it cannot be written: 503 backend error") == 4
    writer.sync()
    assert [row["step"] for row in read_metrics(f"{bucket}/run")] == [1, 2, 3, 4]
    writer.close()
    [events] = event_files(bucket, tmp_path)
    assert [event.step for event in events[2:]] == [1, 2, 3, 4]
    BucketStore.failures = 1
    plot_curves(f"{bucket}/run")
    assert "curves.png cannot be written: 503 backend error" in caplog.text


def test_lines_that_are_no_rows_are_skipped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1}\n[2]\n\xff\xfe\n{"loss": 3}\n{"step": 4}\n'
    )
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 4}]
