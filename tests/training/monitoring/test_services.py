"""W&B and trackio without a network, read back from the files that their clients write."""

import functools
import json
import pathlib
import sqlite3
import struct
import sys
import zlib

import pytest

from diht_jax.training.monitoring.metrics import MetricWriter, read_metrics
from tests import make

_BLOCK, _HEADER = 2**15, 7  # of the files that `wandb sync` sends, in bytes


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """Hides logins and settings of the user."""
    for name in ("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb_config"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it caches the settings of its first use


def write_two_starts(workdir, tracker, between=lambda: None):
    """Writes a run that is killed after step 3 and resumed from the checkpoint of step 2."""
    config = make.tiny_config(trackers=(tracker,), tracking__project="shapes")
    writer = MetricWriter(workdir, 0, config)
    for step in (1, 2, 3):
        writer.write(step, {"loss": 1 / step})
    writer.write_picture(3, "retrievals/colors", make.png())
    writer.close()
    between()
    writer = MetricWriter(workdir, 2, config)
    writer.write(2, {"evaluation/colors/t2i_r1": 0.25})
    for step in (3, 4):
        writer.write(step, {"loss": 1 / step})
    writer.close()


# Common rows: the evaluation of step 2 was made up for, and step 3 comes twice, unchanged.
ROWS = [
    {"step": 1, "loss": 1.0},
    {"step": 2, "loss": 1 / 2},
    {"step": 3, "loss": 1 / 3},
    {"step": 2, "evaluation/colors/t2i_r1": 0.25},
    {"step": 3, "loss": 1 / 3},
    {"step": 4, "loss": 1 / 4},
]


def test_wandb_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Two starts within a second would share a folder.
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    move = functools.partial(monkeypatch.setenv, "WANDB_DIR", str(elsewhere))
    write_two_starts(tmp_path / "emoji", "wandb", move)
    wandb.teardown()  # its process closes the files
    places = (tmp_path / "emoji", elsewhere)
    folders = [next((place / "wandb").glob("offline-run-*")) for place in places]
    records = [record for folder in folders for record in read_wandb_file(folder)]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    stored = json.loads((tmp_path / "emoji" / "trackers.json").read_text())
    assert {(r.run_id, r.project, r.display_name) for r in runs} == {
        (stored["id"], "shapes", "emoji")
    }
    config = {update.key: update.value_json for update in runs[0].config.update}
    assert json.loads(config["data"])["batch_size"] == 16
    rows = history_of(records)
    assert [row for row in rows if "retrievals/colors/path" not in row] == ROWS
    [picture] = [row for row in rows if "retrievals/colors/path" in row]
    assert (folders[0] / "files" / picture["retrievals/colors/path"]).stat().st_size > 100
    axes = [r.metric for r in records if r.WhichOneof("record_type") == "metric"]
    assert {m.step_metric for m in axes if m.glob_name == "*"} == {"step"}


def test_wandb_without_a_login(tmp_path, caplog):
    pytest.importorskip("wandb")
    writer = MetricWriter(tmp_path, 0, make.tiny_config(trackers=("wandb",)))
    for step in (1, 2):
        writer.write(step, {"loss": 0.5})
    writer.close()
    assert caplog.text.count("no login") == 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_trackio(tmp_path):
    pytest.importorskip("trackio")
    write_two_starts(tmp_path / "emoji", "trackio")
    [path] = (tmp_path / "trackio").glob("*.db")
    with sqlite3.connect(path) as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id")
        rows = [(name, {"step": step, **json.loads(text)}) for name, step, text in rows]
        configs = database.execute("select config from configs").fetchall()
    stored = json.loads((tmp_path / "emoji" / "trackers.json").read_text())
    assert {name for name, _ in rows} == {f"emoji-{stored['id']}"}
    assert [row for _, row in rows if "retrievals/colors" not in row] == ROWS
    [picture] = [row["retrievals/colors"] for _, row in rows if "retrievals/colors" in row]
    assert (tmp_path / "trackio" / "media" / picture["file_path"]).stat().st_size > 100
    assert json.loads(configs[0][0])["data"]["batch_size"] == 16


def read_wandb_file(folder: pathlib.Path) -> list:
    """Returns the records of the offline file of W&B's client."""
    from wandb.proto import wandb_internal_pb2

    [path] = folder.glob("*.wandb")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    records, parts, position = [], [], 7
    while position + _HEADER <= len(data):
        room = _BLOCK - position % _BLOCK
        if room < _HEADER:  # the rest of a block is padding
            position += room
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        part = data[position + _HEADER : position + _HEADER + length]
        assert zlib.crc32(bytes([kind]) + part) == checksum
        parts.append(part)
        position += _HEADER + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(b"".join(parts)))
            parts = []
    return records


def history_of(records: list) -> list[dict]:
    """Returns the logged rows without W&B's own entries."""
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {"/".join(item.nested_key) or item.key: item for item in record.history.item}
            row = {name: json.loads(item.value_json) for name, item in items.items()}
            rows.append({name: value for name, value in row.items() if name[0] != "_"})
    return rows
