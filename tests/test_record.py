"""The JSON that benchmarks leave behind."""

import datetime
import importlib.metadata
import json
import os
import platform

import jax
import pytest

from benchmarks import record


class _Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls(2026, 1, 2, 3, 4, 5, 678, tzinfo=tz)


def test_file_says_what_where_when_and_with_what(tmp_path, monkeypatch):
    monkeypatch.setattr(datetime, "datetime", _Clock)
    path = record.write_result("ring_loss", {"peak_bytes": 5, "rows": [{"n": 8}]}, tmp_path)
    assert path == tmp_path / "ring_loss.json"
    result = json.loads(path.read_text())
    assert (result["benchmark"], result["peak_bytes"], result["rows"]) == (
        "ring_loss",
        5,
        [{"n": 8}],
    )
    machine = result["machine"]
    with open("/proc/meminfo") as file:
        memory_gb = int(file.readline().split()[1]) * 1024 / 1e9
    assert machine["memory_gb"] == pytest.approx(memory_gb, rel=0.05)
    assert machine["cores"] == os.cpu_count() and machine["cpu"] and machine["accelerator"] is None
    versions = result["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["jax"] == jax.__version__
    assert versions["numpy"] == importlib.metadata.version("numpy")
    assert result["date_utc"] == "2026-01-02T03:04:05+00:00"
    assert [p.name for p in tmp_path.iterdir()] == ["ring_loss.json"]
