"""Trial: kills a run at random moments, resumes it, and compares its end with an undisturbed run.

    python tests/training/kill_trial.py --kills 20 --workers 2

Every start is the same command, `python -m diht_jax.train`, with a small config that saves every
second step, so that many kills hit a save. After each SIGKILL, no process of the run and no shared
memory may be left. At the end, all arrays of the last checkpoint (parameters, optimiser, step,
random key), the position in the data, and every line of `metrics.jsonl` except its speeds must be
bit-identical. The moment of a kill is a number of metrics lines and a pause after them; no clock is
read. Tests run the trial with few kills.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from absl import flags

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from diht_jax.training.monitoring.metrics import USES  # noqa: E402
from tests import make  # noqa: E402
from tests.compiling import xla_flags  # noqa: E402
from tests.leftovers import shared_memory, wait_until_nothing_is_left  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

TOTAL_STEPS = 60
NUM_RECORDS = 64  # in two shards
KEPT_PROGRAMS = "programs"  # next to the work directories
# Values of a metrics line that are measured with a clock.
TIMED = (
    "images_per_sec",
    "data_wait_secs",
    "data_wait_share",
    "model_flops_per_sec",
    "mfu",
    "goodput",
    *(f"wall_secs/{use}" for use in USES),
)
_LONGEST_START_SECS = 900  # only against hangs
# The command, which waits for a signal after a given step: even if the signal is late on a busy
# machine, the run is not over. The step counts from the run's start, since a resumed run may repeat
# any number of steps if the last saves were incomplete on a slow disk.
_BRAKED = """
import runpy, signal, sys, time
from diht_jax.training.monitoring.metrics import MetricWriter

last_step, write = int(sys.argv.pop(1)), MetricWriter.write

def write_and_wait(self, step, scalars):
    write(self, step, scalars)
    while step >= last_step and not signal.getsignal(signal.SIGTERM).__self__._requested:
        time.sleep(0.01)

MetricWriter.write = write_and_wait
runpy.run_module("diht_jax.train", run_name="__main__", alter_sys=True)
"""


class Kill(NamedTuple):
    """One kill: its moment in words, the last step of the metrics, and whether it hit a save."""

    moment: str
    last_step: int
    during_save: bool


def command(
    data: pathlib.Path,
    workdir: pathlib.Path,
    total_steps: int = TOTAL_STEPS,
    num_workers: int = 0,
) -> list[str]:
    """Returns the command that starts and resumes the run."""
    return [
        *(sys.executable, "-m", "diht_jax.train", "--config", "configs/demo.py:debug=True"),
        *(f"--config.data.train={data}", "--workdir", str(workdir)),
        *(f"--config.total_steps={total_steps}", "--config.checkpoint.every_steps=2"),
        *("--config.log_every_steps=1", "--config.checkpoint.keep_last=2"),
        *(f"--config.data.num_workers={num_workers}", "--config.data.prefetch_batches=1"),
        # Tracing and compiling take most of a start, and the vocabulary takes most of a save.
        *("--config.model.overrides.vision_layers=1", "--config.model.overrides.text_layers=1"),
        "--config.model.overrides.vocab_size=700",
        f"--config.compilation_cache={workdir.parent / KEPT_PROGRAMS}",
    ]


def environment() -> dict[str, str]:
    """Uses one device, and keeps all compiled programs in the cache folder of the command."""
    given = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    return given | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


class Trial:
    """Runs in a folder, all with one command and one cache."""

    def __init__(
        self,
        data: pathlib.Path,
        folder: pathlib.Path,
        total_steps: int = TOTAL_STEPS,
        num_workers: int = 0,
    ):
        self.data, self.folder, self.total_steps = data, folder, total_steps
        self.num_workers = num_workers
        self.kills: list[Kill] = []

    def start(self, name: str, most_lines: int | None = None) -> subprocess.Popen:
        """Starts or resumes the run; after `most_lines` new lines it waits for a signal."""
        arguments = command(self.data, self.folder / name, self.total_steps, self.num_workers)
        if most_lines is not None:
            last_step = len(self.lines(name)) + most_lines  # one line per step
            arguments[1:3] = ["-c", _BRAKED, str(last_step)]
        return subprocess.Popen(
            arguments,
            cwd=REPOSITORY,
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # identifies all of its processes
        )

    def finish(self, name: str) -> None:
        """Runs to the end."""
        process = self.start(name)
        _, log = process.communicate(timeout=_LONGEST_START_SECS)
        if process.returncode:
            raise RuntimeError(f"{name} ended with {process.returncode}:\n{log}")

    def wait_for_line(self, name: str, process: subprocess.Popen, lines: int = 1) -> None:
        """Waits until `metrics.jsonl` has this many new lines, or the run has ended."""
        wanted = len(self.lines(name)) + lines
        wait_until(
            lambda: len(self.lines(name)) >= wanted or process.poll() is not None, pause_secs=0.01
        )

    def kill_after(self, name: str, lines: int, secs: float) -> bool:
        """Starts, and kills after this many lines and seconds; false if the run was over before.

        With 0 lines, waits only until the run has its work directory.
        """
        before = shared_memory()
        process = self.start(name)
        lock = self.folder / name / "run.lock"

        def is_held() -> bool:
            return lock.exists() and f'"pid": {process.pid},' in lock.read_text()

        if lines:
            self.wait_for_line(name, process, lines)
        else:
            wait_until(lambda: process.poll() is not None or is_held())
        was_killed = self.kill_in(name, process, secs, f"{lines:2d} lines + {secs:.2f} s")
        wait_until_nothing_is_left(process.pid, before)
        return was_killed

    def kill_in(self, name: str, process: subprocess.Popen, secs: float, moment: str = "") -> bool:
        """Sends SIGKILL after a pause; returns false if the run was over before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(secs)
        is_running = process.poll() is None
        process.kill()  # does nothing if it has ended
        process.communicate()
        if is_running:
            self.kills.append(Kill(moment, self.last_step(name), self.is_saving(name)))
        return is_running

    def is_saving(self, name: str) -> bool:
        """Whether a checkpoint is half written."""
        return any((self.folder / name / "checkpoints").glob("*.orbax-checkpoint-tmp*"))

    def last_step(self, name: str) -> int:
        """Returns the last step of the metrics."""
        lines = self.lines(name)
        return json.loads(lines[-1])["step"] if lines and lines[-1].endswith(b"}") else 0

    def lines(self, name: str) -> list[bytes]:
        """Returns the lines of the run's metrics file."""
        path = self.folder / name / "metrics.jsonl"
        return path.read_bytes().splitlines() if path.exists() else []


def compare(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Returns the differences between two finished runs; empty if they are bit-identical."""
    if _last_step(one) != _last_step(other):
        return [f"last steps {_last_step(one)} and {_last_step(other)}"]
    (arrays, place, rows), (others, other_place, other_rows) = map(_contents, (one, other))
    names = sorted(arrays.keys() | others.keys())
    differences = [name for name in names if arrays.get(name) != others.get(name)]
    if place != other_place:
        differences.append(f"position in the data: {place} and {other_place}")
    if rows != other_rows:
        differences.append(f"metrics.jsonl: {len(rows)} and {len(other_rows)} lines")
    for run in (one, other):
        left = sorted(path.name for path in (run / "checkpoints").iterdir())
        if not all(name.isdigit() for name in left) or len(left) > 2:
            differences.append(f"left in {run.name}/checkpoints: {left}")
        if (run / "corrupt_checkpoints").exists():
            differences.append(f"{run.name}/corrupt_checkpoints exists")
    return differences


def _contents(run: pathlib.Path) -> tuple[dict[str, bytes], bytes, list[dict[str, float]]]:
    """Returns arrays and position of the last checkpoint, and the metrics without timed values."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    checkpoint = run / "checkpoints" / str(_last_step(run))
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(checkpoint / "state"))
    arrays = {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}
    # Every line must be complete, one per step.
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in TIMED} for row in rows]
    return arrays, (checkpoint / "data" / "metadata").read_bytes(), rows


def _last_step(run: pathlib.Path) -> int:
    return max(int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit())


def define_flags() -> None:
    """Defines the flags of `main`."""
    flags.DEFINE_integer("kills", 20, "SIGKILLs, over all runs.")
    flags.DEFINE_integer("workers", 0, "Decoding processes of each run.")
    flags.DEFINE_integer("seed", 0, "Of the moments.")
    flags.DEFINE_integer("steps", TOTAL_STEPS, "Steps of each run.")
    flags.DEFINE_string("folder", None, "Keeps the runs; unset: a temporary one.")


def main() -> None:
    """Kills, resumes, compares; prints one line per kill and per run, and the result."""
    given = flags.FLAGS
    # Prefer memory, since every save waits for the disk.
    fast = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = pathlib.Path(given.folder or tempfile.mkdtemp(prefix="kill_trial_", dir=fast))
    folder.mkdir(parents=True, exist_ok=True)
    data = make.write_records(folder / "records", NUM_RECORDS, [NUM_RECORDS // 2] * 2)
    trial = Trial(data, folder, given.steps, given.workers)
    trial.finish("undisturbed")
    print(f"undisturbed: {given.steps} steps", flush=True)
    rounds = 0
    for name in killed_runs(trial, given.kills, random.Random(given.seed)):
        trial.finish(name)
        differences = compare(folder / "undisturbed", folder / name)
        print(f"{name}: {'; '.join(differences) or 'bit-identical to the undisturbed run'}")
        if differences:
            sys.exit(1)
        rounds += 1
    saves = sum(kill.during_save for kill in trial.kills)
    print(f"{len(trial.kills)} kills, {saves} of them during a save")
    print(f"{rounds} finished runs; no process and no shared memory left behind")


def killed_runs(trial: Trial, num_kills: int, moments: random.Random) -> Iterator[str]:
    """Kills runs; yields the name of each run that the caller must finish."""
    most_lines = max(1, trial.total_steps // 6)
    rounds = 0
    while len(trial.kills) < num_kills:
        name = f"killed_{rounds}"
        rounds += 1
        while len(trial.kills) < num_kills:
            lines, secs = moments.randint(0, most_lines), moments.uniform(0, 0.3)
            if not trial.kill_after(name, lines, secs):
                break
            kill = trial.kills[-1]
            print(
                f"kill {len(trial.kills):2d} after {kill.moment}, last line: step "
                f"{kill.last_step:3d}{', during a save' if kill.during_save else ''}",
                flush=True,
            )
        yield name


if __name__ == "__main__":
    from diht_jax import command_line

    define_flags()
    command_line.run(main)
