"""SIGKILL before each change that a job makes to its output folder.

This leaves no moment to chance: filtering, re-sharding, lists, report and cleaning are all
covered. Before every change of an undisturbed run (a file opened for writing, a rename, a
removal, a new folder) a forked child kills itself, and a second child runs to the end. Of changes
that differ only in a number, such as those of the first and second shard, one is tested.
`jobs/test_ray.py` tests the loss of a cluster node.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
from typing import Any

from data_prep.filter import run_filter
from tests import make
from tests.data_prep.filtering.jobs import job_config, snapshot


def _count(tried: list[str], event: str, name: str) -> int:
    return sum(change.startswith(f"{event} {name}") for change in tried)


def test_pairs(tmp_path):
    for number in range(2):
        members = {}
        for i in range(3):
            members |= make.pair_members(f"{number}-{i}", f"picture {i}", make.png())
            members[f"{number}-{i}.json"] = json.dumps({"uid": f"{3 * number + i:032x}"}).encode()
        make.write_tar(tmp_path / "in" / f"{number:05d}.tar", members)
    done = make.run_command("tests.data_prep.filtering.test_kill_points", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    tried = found["tried"]
    assert found["problems"] == []
    for name in ("/parts/.pairs-", "/.pairs-", "/.kept_keys", "/.kept_uids", "/.report.json"):
        assert _count(tried, "open", name) and _count(tried, "os.rename", name), name
    for name in ("/.report.html", "/.stats.json", "/.dataset_info.json", "/.features.json"):
        assert _count(tried, "open", name) == _count(tried, "os.rename", name) == 1, name
    assert _count(tried, "os.remove", "/parts/pairs-train-")


class _Watch:
    """Records the changes of this process to a folder before they happen; may kill it then."""

    def __init__(self, output: pathlib.Path, kill_at: int):
        self._output, self._kill_at = str(output), kill_at
        self.changes: list[str] = []

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir"):
            return
        if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
            return
        if not str(args[0]).startswith(self._output):
            return
        if len(self.changes) == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.changes.append(f"{event} {str(args[0]).removeprefix(self._output)}")


def _run(output: pathlib.Path, kill_at: int = -1) -> list[str]:
    """Runs the job in this process; returns its changes."""
    config = job_config(f"{output.parent}/in/*", output, examples_per_shard=4)
    watch = _Watch(output, kill_at)
    sys.addaudithook(watch)
    assert run_filter(config) == {}
    return watch.changes


def _run_in_child(output: pathlib.Path, kill_at: int = -1) -> tuple[int, list[str]]:
    """Runs the job in a forked child; returns the child's status and its changes."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as null, contextlib.suppress(Exception):
            sys.stdout = sys.stderr = null
            os.write(writer, json.dumps(_run(output, kill_at)).encode())
            os._exit(0)
        os._exit(1)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        changes = json.loads(pipe.read() or "[]")
    return os.waitpid(child, 0)[1], changes


def _kill_and_repeat(output: pathlib.Path, kill_at: int, wanted: dict[str, bytes]) -> list[str]:
    """Kills a run and repeats it; returns the problems of the second run's output."""
    status, _ = _run_in_child(output, kill_at)
    if not os.WIFSIGNALED(status):
        return [f"not killed: {status}"]
    done = _when_finished(output)
    status, _ = _run_in_child(output)
    found, now = snapshot(output), _when_finished(output)
    shutil.rmtree(output)
    if status:
        return ["the second run failed"]
    differs = {n for n in found.keys() | wanted.keys() if found.get(n) != wanted.get(n)}
    again = {name for name, time_ns in done.items() if now.get(name) != time_ns}
    problems = [f"differs: {name}" for name in sorted(differs)]
    return problems + [f"was finished, and was made again: {name}" for name in sorted(again)]


def _when_finished(output: pathlib.Path) -> dict[str, int]:
    """Maps each finished shard to the time at which it was marked as done."""
    return {
        str(path.relative_to(output)): path.stat().st_mtime_ns
        for path in output.rglob("?*.stats.json")
    }


def _choose(changes: list[str]) -> list[int]:
    """Returns one index per group of changes that differ only in numbers: the first or the last."""
    alike: dict[str, list[int]] = collections.defaultdict(list)
    for i, change in enumerate(changes):
        # Names of temporary files end with a process id and a random number.
        alike[re.sub(r"\d+-[0-9a-f]{8}\.tmp|\d", "#", change)].append(i)
    return sorted(found[-(number % 2)] for number, found in enumerate(alike.values()))


def main() -> None:
    """Tests all chosen changes; prints them and the problems found, as JSON."""
    folder = pathlib.Path(sys.argv[1])
    os.fsync = lambda _: None  # matters only at power loss, and takes most of the time
    with contextlib.redirect_stdout(sys.stderr):
        _run(folder / "warm")  # loads shared state before the forks
    status, changes = _run_in_child(folder / "whole")
    assert status == 0
    wanted = snapshot(folder / "whole")
    chosen, problems = _choose(changes), []
    for kill_at in chosen:
        found = _kill_and_repeat(folder / "killed", kill_at, wanted)
        problems += [f"killed before {changes[kill_at]}: {problem}" for problem in found]
    print(json.dumps({"tried": [changes[i] for i in chosen], "problems": problems}, indent=1))


if __name__ == "__main__":
    main()
