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

from tests import make

_REPOSITORY = pathlib.Path(__file__).resolve().parents[3]
_LONGEST_SECS = 900


def _count(tried: list[str], event: str, name: str) -> int:
    return sum(change.startswith(f"{event} {name}") for change in tried)


def test_pairs(tmp_path):
    for number in range(2):
        members = {}
        for i in range(3):
            members |= make.pair_members(f"{number}-{i}", f"picture {i}", make.png())
            members[f"{number}-{i}.json"] = json.dumps({"uid": f"{3 * number + i:032x}"}).encode()
        make.write_tar(tmp_path / "in" / f"{number:05d}.tar", members)
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
