"""SIGKILL at the seams: before the changes that a job makes to its output folder, each in turn.

`kill_points.py` does it, so that no moment is left to chance: during the filtering, the
re-sharding, the lists, the report, and the cleaning. The loss of a node
of a cluster is in `test_interruptions.py`.
"""

import json
import os
import pathlib
import subprocess
import sys
import tarfile

from PIL import Image

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
_LONGEST_SECS = 900


def _count(tried: list[str], event: str, name: str) -> int:
    return sum(change.startswith(f"{event} {name}") for change in tried)


def test_pairs(tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "i.png")
    for number in range(2):
        with tarfile.open(tmp_path / "in" / f"{number:05d}.tar", "w") as tar:
            for i in range(3):
                row = {"caption": f"picture {i}", "uid": f"{3 * number + i:032x}"}
                (tmp_path / "i.json").write_text(json.dumps(row))
                for extension in ("png", "json"):
                    tar.add(tmp_path / f"i.{extension}", f"{number}-{i}.{extension}")
    command = [sys.executable, "-m", "tests.data_prep.filtering.kill_points", str(tmp_path)]
    done = subprocess.run(
        [*command, json.dumps({"examples_per_shard": 4})],
        cwd=_REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=_LONGEST_SECS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    tried = found["tried"]
    assert found["problems"] == []
    for name in ("/parts/.pairs-", "/.pairs-", "/.kept_keys", "/.kept_uids", "/.report.json"):
        assert _count(tried, "open", name) and _count(tried, "os.rename", name), name
    for name in ("/.report.html", "/.stats.json", "/.dataset_info.json", "/.features.json"):
        assert _count(tried, "open", name) == _count(tried, "os.rename", name) == 1, name
    assert _count(tried, "os.remove", "/parts/pairs-train-")
