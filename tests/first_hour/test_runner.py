"""The runner of the first hour: what ends badly costs one part, and what is done stays."""

import json

import pytest

from benchmarks.first_hour.plan import Part, Setting, parts_for
from benchmarks.first_hour.runner import Results, run_parts
from benchmarks.first_hour.table import fill_page, format_table


def part(name, **arguments):
    options = {"starts_commands": True}  # else the worker looks for devices
    if "packages" in arguments:
        options["packages"] = arguments.pop("packages")
    return Part(
        name, f"tests.first_hour.parts:{name.rstrip('0123456789')}", 1, arguments, **options
    )


def run(folder, parts, limit_secs=60.0, small=False):
    results = Results(folder, "cpu", small=small)
    run_parts(parts, Setting("cpu", small, str(folder)), results, limit_secs)
    return Results(folder, "cpu", small=small).parts  # as the next start finds them


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


def test_a_missing_or_old_package_is_named(tmp_path):
    parts = [part("good1", packages=["no-such-package"]), part("good2", packages=["numpy>=999"])]
    found = run(tmp_path, parts, small=True)
    assert [found[name]["status"] for name in found] == ["absent", "absent"]
    assert "no-such-package" in found["good1"]["error"]
    assert ">=999" in found["good2"]["error"]


def test_a_file_of_another_form_or_with_damage_is_refused(tmp_path):
    Results(tmp_path, "cpu", small=True).add("good", {"status": "done", "secs": 1.0})
    with pytest.raises(ValueError, match="was made with --small"):
        Results(tmp_path, "cpu", small=False)
    (tmp_path / "first_hour_cpu.json").write_text("[")
    with pytest.raises(ValueError, match=r"first_hour_cpu.json: .* take another --output"):
        Results(tmp_path, "cpu", small=True)


def test_the_table_replaces_what_stands_between_its_markers_and_nothing_else(tmp_path):
    results = Results(tmp_path, "tpu", small=False)
    for name in ("raises", "store"):
        results.add(name, {"status": "failed", "secs": 2.0, "error": "a\nValueError: no | thing"})
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n<!-- first_hour gpu: begin -->\nkept\n<!-- first_hour gpu: end -->\n"
        "<!-- first_hour tpu: begin -->\nold\n<!-- first_hour tpu: end -->\nbehind\n"
    )
    fill_page(page, "tpu", results.read())
    text = page.read_text()
    assert "kept" in text and "old" not in text and text.endswith("end -->\nbehind\n")
    assert "| `store` | failed: ValueError: no \\| thing | 2 |" in text
    fill_page(page, "tpu", results.read())
    assert page.read_text() == text
    page.write_text("no markers")
    with pytest.raises(ValueError, match="first_hour tpu: begin"):
        fill_page(page, "tpu", json.loads(results.path.read_text()))


def test_a_name_of_no_part_is_refused():
    assert [each.name for each in parts_for("gpu", ["swag", "rates"])] == ["rates", "swag"]
    with pytest.raises(ValueError, match="--parts=store: expected some of machine"):
        parts_for("gpu", ["store"])
    assert format_table({"parts": {}, "small": False, "date_utc": "2026-01-01T00:00:00"})
