"""Trial of launch/slurm.sbatch on a local Slurm of two nodes.

    apt-get install slurm-wlm munge     # as root, as the trial runs
    python -m tests.docs.slurm_trial

The script keeps its flags, except for the number of nodes and processes; the trial only replaces
the names of recipe, data and work directory. The nodes declare GPUs that they do not have, and
the processes train a tiny model on CPUs. The trial checks:

- at the signal that `--signal` sends before the time limit, both processes save and exit with 75,
  and Slurm requeues the job;
- a job with a higher priority preempts it, and Slurm requeues it;
- if one process is killed, the other one ends too, and the job is requeued;
- afterwards the run continues to its end, with one line of metrics for each step;
- a non-retryable error ends the job with 78, without a requeue;
- a cancelled job stays cancelled.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tests import make
from tests.docs.pages import REPOSITORY
from tests.training import kill_trial
from tests.waiting import wait_until

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
# JAX asks the first node for its port, so both names must resolve on any Linux machine. A standard
# build of Slurm refuses two daemons with one host name, but accepts two names of one host.
NODES = ("127.0.0.1", "127.0.0.2")
TOTAL_STEPS = 60

CONFIG = """
ClusterName=trial
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes[0]} CPUs=96 Gres=gpu:8 Port={ports[1]}
NodeName={nodes[1]} CPUs=96 Gres=gpu:8 Port={ports[2]}
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


@contextlib.contextmanager
def slurm(folder: pathlib.Path) -> Iterator[None]:
    """Starts a Slurm in this folder; leaving the context ends all its daemons."""
    for name in ("state", *NODES):
        (folder / name).mkdir()
    config = CONFIG.format(folder=folder, nodes=NODES, ports=free_ports(3))
    (folder / "slurm.conf").write_text(config)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    for number in range(8):  # a device counts if its file exists
        (folder / f"gpu{number}").touch()
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    munge = [f"--{name}={folder}/munge.{name.split('-')[0]}" for name in ("key-file", "socket")]
    munge += [f"--{name}-file={folder}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = [["munged", "--foreground", "--force", *munge], ["slurmctld", "-D"]]
    daemons += [["slurmd", "-D", "-N", node] for node in NODES]
    processes = []
    try:
        for command in daemons:
            with (folder / "daemons.log").open("a") as log:
                processes.append(subprocess.Popen(command, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_until((folder / "munge.socket").exists)
        wait_until(lambda: "idle" in output("sinfo", "--noheader", "--format=%T"), longest_secs=60)
        yield
    finally:
        # Otherwise the daemons of the jobs (slurmstepd) outlive the others.
        output("scancel", "--full", "--signal=KILL", "--me")
        output("scancel", "--me")
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not output("squeue", "--noheader"), longest_secs=60)
        for process in reversed(processes):
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_ports(count: int) -> list[int]:
    """Returns free ports."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def output(*command: str) -> str:
    """Returns the output of a Slurm client; empty if the client failed."""
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


class Job:
    """A submission of the script, with a folder for its output and its run."""

    def __init__(self, folder: pathlib.Path, command: list[str]):
        folder.mkdir(exist_ok=True)
        self.folder, self.log = folder, folder / "log"
        script, count = re.subn(
            r"python -m diht_jax\.train (?:.*\\\n)*.*",
            shlex.join(command),
            (REPOSITORY / "launch" / "slurm.sbatch").read_text(),
        )
        assert count == 1, script
        (folder / "script.sh").write_text(script)
        sbatch = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=1"]
        self.number = subprocess.run(
            [*sbatch, f"--output={self.log}", str(folder / "script.sh")],
            cwd=REPOSITORY,
            env=kill_trial.environment(),
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()

    def state(self) -> dict[str, str]:
        """Returns Slurm's record of the job, such as JobState, Restarts, ExitCode."""
        return dict(re.findall(r"(\w+)=(\S*)", output("scontrol", "show", "job", self.number)))

    def has_ended(self) -> bool:
        """Returns whether the job will not run again."""
        return self.state()["JobState"] in ("FAILED", "COMPLETED", "CANCELLED", "TIMEOUT")

    def lines(self) -> list[int]:
        """Returns the steps in the run's metrics."""
        path = self.folder / "run" / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line)["step"] for line in lines]

    def wait_for_lines(self, more: int = 2) -> None:
        """Waits until the run has written `more` further lines of metrics."""
        wanted = len(self.lines()) + more

        def has_them() -> bool:
            assert not self.has_ended(), f"{self.state()}\n{self.log.read_text()}"
            return len(self.lines()) >= wanted

        wait_until(has_them)

    def wait_for_restart(self, restarts: int) -> None:
        """Waits for that many requeues; Slurm starts the job when its old credential expires."""
        wait_until(lambda: self.state()["Restarts"] == str(restarts), pause_secs=0.5)

    def check_end(self, job_state: str, exit_code: str | None = None, restarts: str = "0") -> None:
        """Waits for the end and checks it; any digit in `restarts` is a valid count."""
        wait_until(self.has_ended, pause_secs=0.5)
        state = self.state()
        found = f"{state['JobState']}, status {state['ExitCode']}, {state['Restarts']} restarts"
        is_right = state["JobState"] == job_state and state["Restarts"] in restarts
        is_right &= exit_code in (None, state["ExitCode"])
        assert is_right, f"{found}\n{self.log.read_text()}"


def train_through_stops(folder: pathlib.Path, data: pathlib.Path) -> None:
    """Signals the run, preempts it and kills a process; the run must still complete."""
    job = Job(folder, kill_trial.command(data, folder / "run", TOTAL_STEPS))
    job.wait_for_lines()
    # Like `--signal`: sends to the steps of the job, not to its script.
    subprocess.run(["scancel", "--signal=TERM", job.number], check=True)
    job.wait_for_restart(1)
    print(f"signalled after step {job.lines()[-1]}: saved, requeued", flush=True)

    job.wait_for_lines()
    urgent = ["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
    output("sbatch", *urgent, "--wrap=true")
    job.wait_for_restart(2)
    print(f"preempted after step {job.lines()[-1]}: saved, requeued", flush=True)

    job.wait_for_lines()
    os.kill(second_process(job), signal.SIGKILL)
    job.wait_for_restart(3)
    print(f"one process killed after step {job.lines()[-1]}: requeued", flush=True)

    # After the preemption the script requeued the job before Slurm did. Slurm still requeues it
    # once more when the job has ended; that start finds the run finished.
    job.check_end("COMPLETED", "0:0", restarts="34")
    assert job.lines() == list(range(1, TOTAL_STEPS + 1)), job.lines()
    stops = job.log.read_text().count("stopped after step")
    assert stops >= 2, job.log.read_text()
    print(f"finished: one line for each of {TOTAL_STEPS} steps", flush=True)


def second_process(job: Job) -> int:
    """Returns the process id of Python in the second of the job's two processes."""
    wanted = {b"SLURM_PROCID=1", f"SLURM_JOB_ID={job.number}".encode()}
    for folder in pathlib.Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_bytes().split(b"\0")
            if command[0] == sys.executable.encode():
                environment = (folder / "environ").read_bytes().split(b"\0")
                if wanted <= set(environment):
                    return int(folder.name)
    raise ProcessLookupError(f"no second process of job {job.number}")


def end_for_good(folder: pathlib.Path) -> None:
    """Runs jobs that must not start again."""
    missing = Job(folder / "missing", kill_trial.command(folder / "nothing", folder / "run"))
    missing.check_end("FAILED", "78:0")
    print("no data: ended with 78", flush=True)

    # If cancelled earlier, while Slurm starts the script, the script would still requeue the job.
    started = folder / "started"
    cancelled = Job(folder / "cancelled", ["bash", "-c", f"touch {started}; sleep 1000"])
    wait_until(started.exists)
    subprocess.run(["scancel", cancelled.number], check=True)
    cancelled.check_end("CANCELLED")
    print("cancelled: ended", flush=True)


def main() -> None:
    """Runs all trials, and prints a line for each check."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing:
        sys.exit(f"{', '.join(missing)}: not found; apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm_trial_") as name:
        folder = pathlib.Path(name)
        folder.chmod(0o755)  # munge forbids writing by others; clients must reach its socket
        data = make.write_records(folder / "squares", kill_trial.NUM_RECORDS)
        with slurm(folder):
            end_for_good(folder)
            train_through_stops(folder / "stops", data)


if __name__ == "__main__":
    main()
