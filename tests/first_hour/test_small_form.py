"""The first-hour command in its small form: each kind of part writes its numbers."""

import json
import math

import pytest

from benchmarks.first_hour.plan import parts_for
from tests import make

# Skips parts that differ only in numbers, and what tests/test_step_benchmark.py runs.
ALIKE = ("step_b16", "step_l14", "kernels_b16", "kernels_l14", "kernels_l14_336")
PARTS = [part.name for part in parts_for("cpu") if part.name not in (*ALIKE, "open_clip_b16")]
PAGE = make.REPOSITORY / "docs" / "benchmarks" / "first_hour.md"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Runs the command; returns its output folder and what it printed."""
    folder = tmp_path_factory.mktemp("first_hour")
    options = ["--device=cpu", "--small", f"--output={folder}", f"--bucket={folder / 'bucket'}"]
    command = ["benchmarks.first_hour", *options, f"--parts={','.join(PARTS)}"]
    done = make.run_command(*command, "--limit_secs=900", devices=8)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return folder, command


@pytest.fixture(scope="module")
def parts(measured):
    return json.loads((measured[0] / "first_hour_cpu.json").read_text())["parts"]


def test_all_parts_are_done(parts):
    assert set(parts) == set(PARTS)
    assert {name: part["status"] for name, part in parts.items()} == dict.fromkeys(parts, "done")


def test_a_stopped_run_has_the_losses_of_an_undisturbed_one(parts):
    loop = parts["loop"]
    assert loop["exit_codes"] == [0, 75, 0]
    assert len(loop["losses"]) == 20 and loop["losses"] == loop["losses_when_resumed"]
    assert len(set(loop["losses"])) > 10  # the loss changes, so it trains


def test_both_forms_of_the_loss_agree_on_eight_devices(parts):
    assert parts["loss_forms"]["devices"] == parts["collectives"]["devices"] == 8
    for row in parts["loss_forms"]["rows"]:
        assert math.isclose(row["streaming_loss"], row["gathered_loss"], rel_tol=1e-5)


def test_the_state_comes_back_from_the_bucket_which_is_empty_then(measured, parts):
    assert parts["store"]["same_bits"] and parts["store"]["bytes"] > 1e5
    assert list((measured[0] / "bucket").iterdir()) == []


def test_steps_leave_a_profile(measured, parts):
    step = parts["step_b16_two_micro_batches"]
    files = step["profile"]["files"]
    assert files and all((measured[0] / file).stat().st_size for file in files)
    assert [loss for loss in step["losses"] if not math.isfinite(loss)] == []
    assert step["batch_size"] == 2 * step["micro_batch"]


def test_the_table_of_the_page_is_filled(measured, tmp_path):
    page = tmp_path / "first_hour.md"
    page.write_text(PAGE.read_text())
    done = make.run_command(*measured[1], "--table", ("page", page), ("results", tmp_path))
    assert done.returncode == 0, done.stderr
    rows = [name for name in PARTS if f"| `{name}` |" in page.read_text()]
    assert rows == PARTS
    assert (tmp_path / "first_hour_cpu.json").exists()
