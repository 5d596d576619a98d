"""The runner of the first hour: a failure costs one part, and finished parts stay."""

import dataclasses

import jax
import pytest

from benchmarks.first_hour import worker
from benchmarks.first_hour.plan import PARTS, Part, Setting
from benchmarks.first_hour.runner import Results, run_parts
from diht_jax.hardware import compiler


def part(name, **arguments):
    options = {"starts_commands": True}  # otherwise the worker looks for devices
    if "packages" in arguments:
        options["packages"] = arguments.pop("packages")
    return Part(
        name, f"tests.first_hour.parts:{name.rstrip('0123456789')}", 1, arguments, **options
    )


def run(folder, parts, limit_secs=60.0, small=False):
    results = Results(folder, "cpu", small=small)
    run_parts(parts, Setting("cpu", small, str(folder)), results, limit_secs)
    return Results(folder, "cpu", small=small).parts  # as the next start reads them


@pytest.mark.parametrize("small", [False, True], ids=["a process each", "one process"])
def test_a_crash_and_an_error_cost_their_own_part_alone(tmp_path, small):
    names = ("good1", "crashes", "raises", "good2")
    found = run(tmp_path, [part(name) for name in names], small=small)
    assert list(found) == list(names)
    status = [found[name]["status"] for name in names]
    assert status == ["done", "failed", "failed", "done"]
    assert "SIGABRT" in found["crashes"]["error"]
    assert "ValueError: no such thing" in found["raises"]["error"]
    assert found["good2"]["not_a_number"] == "nan"


def test_a_part_that_is_done_is_not_done_again_and_one_that_failed_is(tmp_path):
    first = run(tmp_path, [part("good"), part("raises")])
    failing = Results(tmp_path, "cpu", small=False)
    failing.add("raises", first["raises"] | {"error": "of the first start"})
    second = run(tmp_path, [part("good"), part("raises"), part("good2", a=3)])
    assert second["good"]["calls"] == 1 and second["good2"]["calls"] == 2
    assert second["good2"]["a"] == 3
    assert "no such thing" in second["raises"]["error"]


def test_the_time_ends_a_part_that_hangs_and_leaves_the_rest_for_the_next_start(tmp_path):
    found = run(tmp_path, [part("hangs"), part("good")], limit_secs=4.0)
    assert list(found) == ["hangs"] and found["hangs"]["status"] == "failed"
    assert "time" in found["hangs"]["error"]
    assert run(tmp_path, [part("good")])["good"]["calls"] == 1


def test_what_is_left_of_the_time_goes_to_a_shorter_part(tmp_path):
    parts = [part("good1"), dataclasses.replace(part("good2"), expected_secs=90), part("good3")]
    assert list(run(tmp_path, parts)) == ["good1", "good3"]
    # The first part of a start runs even if it may exceed the time limit.
    assert list(run(tmp_path, parts)) == ["good1", "good3", "good2"]


@pytest.mark.parametrize("name, sets_flags", [("machine", False), ("rates", True)])
def test_flags_are_looked_up_without_being_set(monkeypatch, tmp_path, name, sets_flags):
    """XLA ends a process that sets an unknown flag."""
    called = []
    monkeypatch.setattr(compiler, "set_flags", called.append)
    monkeypatch.setattr(compiler, "keep_programs", lambda folder: None)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    (found,) = [each for each in PARTS if each.name == name]
    entry = worker.run(vars(found), Setting("gpu", True, str(tmp_path)))
    assert "JAX finds" in entry["error"]  # a CPU
    assert called == ["gpu"] * sets_flags
