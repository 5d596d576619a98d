"""Trackers get the contents of metrics.jsonl, in one run despite interruptions."""

import io
import json

import jax
import pytest
from PIL import Image

from diht_jax.training import loop
from diht_jax.training.loop import train
from diht_jax.training.monitoring.metrics import MetricWriter, plot_curves, read_metrics
from diht_jax.training.monitoring.trackers import TRACKERS, Tracker, check_trackers
from tests import make


@pytest.fixture
def recorder(monkeypatch):
    """A tracker "recorder" that keeps its calls, and fails in `recorder.fails_in`."""

    class Recorder(Tracker):
        title = "the recorder"
        runs, rows, pictures, ends, fails_in = [], [], [], [], ""

        def __init__(self, run):
            if self.fails_in == "start":
                raise ConnectionError("no route to host")
            self.runs.append(run)

        def write(self, step, scalars):
            if self.fails_in == "write":
                raise ConnectionError("no route to host")
            self.rows.append({"step": step, **scalars})

        def write_picture(self, step, name, picture):
            self.pictures.append((step, name, Image.open(io.BytesIO(picture))))

        def close(self, failed):
            self.ends.append(failed)

    monkeypatch.setitem(TRACKERS, "recorder", Recorder)
    return Recorder


def test_training_is_tracked_with_its_pictures(config, squares, tmp_path, recorder, monkeypatch):
    monkeypatch.setattr(loop, "plot_curves", plot_curves)
    config.trackers = ("recorder",)
    config.tracking.project = "shapes"
    config.evaluation.tasks = f"colors=retrieval:{squares}?caption_template={{caption}}"
    train(config, tmp_path / "run", devices=jax.devices()[:1])
    [run] = recorder.runs
    assert (run.start_step, run.name, run.project) == (0, "run", "shapes")
    assert run.config["data"]["batch_size"] == 16
    assert recorder.rows == read_metrics(tmp_path / "run")
    assert recorder.rows[-1].keys() >= {"step", "evaluation/colors/t2i_r1"}
    retrievals, curves = recorder.pictures
    assert retrievals[:2] == (6, "retrievals/colors") and curves[:2] == (6, "curves")
    # Six queries, each with a text, five pictures and the correct one, on a white page.
    drawn = retrievals[2].convert("RGB")
    assert min(drawn.size) > 800 and len(set(drawn.resize((60, 60)).getdata())) > 50
    assert recorder.ends == [False]
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.parametrize("fails_in", ["start", "write"])
def test_a_tracker_that_fails_is_left_out_once(tmp_path, recorder, monkeypatch, caplog, fails_in):
    config = make.tiny_config(trackers=("recorder,tensorboard",))  # as a command line passes it
    monkeypatch.setattr(recorder, "fails_in", fails_in)
    writer = MetricWriter(tmp_path, 0, config)
    for step in (1, 2, 3):
        writer.write(step, {"loss": step / 2})
    assert not writer.takes_pictures
    writer.close()
    assert recorder.ends == []
    assert caplog.text.count("no route to host") == 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1


def test_only_the_first_process_writes(tmp_path, recorder, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = MetricWriter(tmp_path, 0, make.tiny_config(trackers=("recorder", "tensorboard")))
    writer.write(1, {"loss": 1.0})
    writer.write_picture(1, "curves", make.png())
    writer.close()
    assert recorder.runs == [] and list(tmp_path.iterdir()) == []


def test_a_missing_package_is_named_before_the_first_step(recorder, monkeypatch):
    monkeypatch.setattr(recorder, "package", "no_such_package")
    with pytest.raises(ValueError, match="pip install no_such_package"):
        check_trackers(("recorder",))


@pytest.mark.parametrize("before", ["{", '{"id": 7}'])
def test_a_run_that_goes_on_keeps_its_id(tmp_path, recorder, before):
    (tmp_path / "trackers.json").write_text(before)
    for step in (0, 2):
        MetricWriter(tmp_path, step, make.tiny_config(trackers=("recorder",))).close()
    first, second = recorder.runs
    assert first.id == second.id and len(first.id) == 8
    assert (first.start_step, second.start_step) == (0, 2)
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"id": first.id}
