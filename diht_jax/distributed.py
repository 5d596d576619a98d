"""Start-up of a job of several processes: TPU pods, Slurm, Open MPI, or by hand.

It comes before anything asks JAX for devices. Meshes and batches are `sharding`'s.

Before JAX connects the processes, the first one calls the roll on the same port: who is missing has
a name then, and a closed port shows. JAX's own timeout ends with an abort after five minutes.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable

import jax
from absl import flags, logging

from diht_jax.hardware.compiler import has_tpu
from diht_jax.terminal import print_escaped

flags.disclaim_key_flags()  # they are the command's own, and its --help lists them

# A process that has not been heard of for so long ends the job; the others say which one it was.
HEARTBEAT_TIMEOUT_SECS = 100
# At the end of a process, the wait for the others, which may be gone.
SHUTDOWN_TIMEOUT_SECS = 60
# Processes of the job that have not come by then are named in the log, once more each time it has
# passed again, and the start ends after so many times.
START_WARNING_SECS, LAST_WARNING = 60, 5
# JAX's own default on TPUs, 8482, is closed by the firewall that Google makes for some slices
# (github.com/jax-ml/jax/issues/35905).
DEFAULT_PORT = "8476"
_PORT_VARIABLE = "JAX_COORDINATOR_PORT"
_GREETING, _WAIT = b"diht_jax", b"wait "
_POLL_SECS, _ANSWER_SECS, _RETRY_SECS = 0.5, 5.0, 0.3
_LONGEST_GREETING_BYTES = 300
_SHOWN_PROCESSES = 16
# What JAX reads of a Slurm step; a batch script that starts no step by `srun` has not all of it.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
# What JAX answers of a host that is part of no cluster it knows.
_NO_CLUSTER = (None, None, None)


def define_flags() -> None:
    """The flags that `start_from_flags` reads."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of the first process, for clusters that JAX cannot ask (it can ask TPU pods, "
        "Slurm and Open MPI). Needs --num_processes and --process_id. HOST alone takes the port of "
        f"{_PORT_VARIABLE}, or {DEFAULT_PORT}.",
    )
    flags.DEFINE_integer("num_processes", None, "Number of processes of the job.")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer(
        "heartbeat_timeout_secs",
        HEARTBEAT_TIMEOUT_SECS,
        "A process of the job that has not been heard of for so long ends the others.",
        lower_bound=1,
    )
    flags.DEFINE_float(
        "start_warning_secs",
        START_WARNING_SECS,
        "Names the processes that have not come after so many seconds; after "
        f"{LAST_WARNING} times as many the command ends.",
        lower_bound=0.1,
    )


def start_from_flags() -> None:
    """Joins the other processes of the job, if there are any, as the flags or the cluster say."""
    values = flags.FLAGS
    start(
        values.coordinator_address,
        values.num_processes,
        values.process_id,
        values.heartbeat_timeout_secs,
        values.start_warning_secs,
    )


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_secs: int = HEARTBEAT_TIMEOUT_SECS,
    start_warning_secs: float = START_WARNING_SECS,
) -> None:
    """Joins the other processes of the job, if there are any; see the flags.

    Raises:
        ValueError: some of the first three and not all, or numbers that do not fit.
        ConnectionError: some processes did not come.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    timeouts = {
        "heartbeat_timeout_seconds": heartbeat_timeout_secs,
        "shutdown_timeout_seconds": SHUTDOWN_TIMEOUT_SECS,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        cluster = find_cluster()
        if cluster is None:
            return
        if cluster == "TPU":
            os.environ.setdefault(_PORT_VARIABLE, DEFAULT_PORT)
        found = _ask_cluster(start_warning_secs)
        if found == _NO_CLUSTER:  # a notebook's TPU, or a machine of one's own
            logging.warning(
                "this host has TPUs and JAX finds no pod that it is part of: the command runs on "
                "this host alone. If there are more hosts, give --coordinator_address, "
                "--num_processes and --process_id"
            )
            return
        if found is not None and None not in found:
            call_roll(*found, start_warning_secs)
        jax.distributed.initialize(**timeouts)
    else:
        if missing:
            raise ValueError(
                f"{', '.join(missing)}: expected together with the others of {', '.join(given)}"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id}: expected at least 0 and less than "
                f"--num_processes={num_processes}"
            )
        cluster = coordinator_address = with_port(coordinator_address)
        call_roll(coordinator_address, num_processes, process_id, start_warning_secs)
        jax.distributed.initialize(coordinator_address, num_processes, process_id, **timeouts)
    logging.info(
        "process %d of %d (%s), %d of %d devices",
        jax.process_index(),
        jax.process_count(),
        cluster,
        jax.local_device_count(),
        jax.device_count(),
    )
    if jax.process_index() != 0:
        # One log is enough; warnings and errors still come from every process.
        logging.set_verbosity(logging.WARNING)


def is_first() -> bool:
    """Returns whether this process writes and prints; one of a job is enough."""
    return jax.process_index() == 0


def end_job(error: Exception, status: int = 1) -> None:
    """Prints the error and ends this process at once, if it is one of several.

    Not by `sys.exit`: on that way out JAX, Orbax and the decoding workers would wait for processes
    that may be no more. The others notice that this one is gone.

    Args:
        error: being handled.
        status: of the process.
    """
    if jax.process_count() == 1:
        return
    lines = [f"error: process {jax.process_index()} of {jax.process_count()}: {error}"]
    if not isinstance(error, ValueError):
        traceback.print_exc()
        lines.append(
            "If a connection was lost or a process could not be reached, that process has ended, "
            "and its own log says why. Start the same command on all hosts again: it goes on from "
            "the last checkpoint"
        )
    # A line of its own, behind the progress bar.
    print_escaped("\n".join(["", *lines]), file=sys.stderr)
    os._exit(status)


def find_cluster() -> str | None:
    """The kind of job that this process is one of several of, or None.

    Looks at the environment only, not at the network.
    """
    env = os.environ
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in env:
        if all(name in env for name in _SLURM_STEP):
            return "Slurm"
        logging.warning(
            "the Slurm job has SLURM_NTASKS=%s tasks, but srun did not start this process: it runs "
            "on its own; begin the command with srun to start all of them",
            env["SLURM_NTASKS"],
        )
    if int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    wants_tpu = (env.get("JAX_PLATFORMS") or "tpu").startswith("tpu")
    if wants_tpu and has_tpu():
        return "TPU"
    return None


def with_port(address: str) -> str:
    """An address as HOST:PORT; one without a port takes that of the environment, or 8476."""
    if re.search(r"[^:]:\d+$", address):
        return address
    return f"{address}:{os.environ.get(_PORT_VARIABLE, DEFAULT_PORT)}"


def _ask_cluster(timeout_secs: float) -> tuple[str | None, int | None, int | None] | None:
    """Address, number of processes and number of this one; None where JAX cannot be asked."""
    try:
        from jax._src.clusters import ClusterEnv

        unset = (None, None, None, None, None)
        found = ClusterEnv.auto_detect_unset_distributed_params(*unset, timeout_secs)
        return found[:3]
    except Exception as error:  # JAX asks again, and its own error ends the command
        logging.warning("the job's processes are not known: %s. %s", error, _advice("a port"))
        return None


def call_roll(
    address: str,
    num_processes: int,
    process_id: int,
    warning_secs: float = START_WARNING_SECS,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Returns when all processes of a job have called it; the log names those that are missing.

    Args:
        address: HOST:PORT where the first process listens for as long as this lasts.
        num_processes: of the job.
        process_id: of this one.
        warning_secs: until the first message, and between two of them.
        clock: in seconds.

    Raises:
        ConnectionError: after the time of the last message some are still missing.
    """
    if num_processes == 1:
        return
    host, _, port = address.rpartition(":")
    lateness = _Lateness(address, num_processes, warning_secs, clock)
    if process_id != 0:
        _answer_roll(host.strip("[]"), int(port), process_id, lateness)
        return
    try:
        listener = _listen(int(port), num_processes)
    except OSError as error:  # JAX's own error ends the command where the port is taken
        logging.warning("port %s cannot be opened for the roll call: %s", port, error)
        return
    with listener, selectors.DefaultSelector() as selector:
        _collect(listener, selector, num_processes, lateness)


class _Lateness:
    """Says from time to time what a start waits for, and ends it at last."""

    def __init__(
        self, address: str, num_processes: int, warning_secs: float, clock: Callable[[], float]
    ):
        self._address, self._num_processes = address, num_processes
        self._warning_secs, self._clock = warning_secs, clock
        self._begin, self._num_warnings = clock(), 0

    def check(self, describe: Callable[[str], str]) -> bool:
        """Returns whether it is time for a message, which is logged then.

        Args:
            describe: makes the message from an address.

        Raises:
            ConnectionError: with the message, when it is time for the last one.
        """
        waited = self._clock() - self._begin
        if waited < (self._num_warnings + 1) * self._warning_secs:
            return False
        self._num_warnings += 1
        port = self._address.rpartition(":")[2]
        message = f"after {waited:.0f} s, {describe(self._address)}. {_advice(f'port {port}')}"
        if self._num_warnings == LAST_WARNING:
            raise ConnectionError(message)
        logging.warning("%s", message)
        return True


def _advice(port: str) -> str:
    return (
        f"Did the command start on all hosts, and does a firewall let them reach {port} of the "
        f"first one? --coordinator_address or {_PORT_VARIABLE}, the same on all hosts, takes "
        "another port"
    )


def _listen(port: int, num_processes: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    return socket.create_server(
        ("", port),
        family=socket.AF_INET6 if both else socket.AF_INET,
        dualstack_ipv6=both,
        backlog=num_processes,
    )


def _collect(
    listener: socket.socket,
    selector: selectors.BaseSelector,
    num_processes: int,
    lateness: _Lateness,
) -> None:
    """Waits until all other processes are connected at once, and lets them go."""
    present: dict[int, socket.socket] = {}
    selector.register(listener, selectors.EVENT_READ)
    with contextlib.ExitStack() as stack:
        while len(present) < num_processes - 1:
            for key, _ in selector.select(_POLL_SECS):
                if key.fileobj is listener:
                    number, connection = _greet(stack.enter_context(listener.accept()[0]))
                    if 0 < number < num_processes:
                        present[number] = connection
                        selector.register(connection, selectors.EVENT_READ, number)
                    else:
                        connection.close()
                else:  # it says nothing more: it has ended
                    selector.unregister(key.fileobj)
                    if present.get(key.data) is key.fileobj:
                        del present[key.data]
                    key.fileobj.close()
            missing = [n for n in range(1, num_processes) if n not in present]
            text = _list_processes(missing, num_processes)
            if missing and lateness.check(lambda at, text=text: f"missing at {at}: {text}"):
                _tell(present.values(), _WAIT + text.encode() + b"\n")
        _tell(present.values(), b"go\n")


def _greet(connection: socket.socket) -> tuple[int, socket.socket]:
    """The number that a new connection gives; -1 for one that is none of ours."""
    connection.settimeout(_ANSWER_SECS)
    try:
        words = connection.recv(_LONGEST_GREETING_BYTES).split()
    except OSError:
        words = []
    is_ours = len(words) == 2 and words[0] == _GREETING and words[1].isdigit()
    return int(words[1]) if is_ours else -1, connection


def _tell(connections: Iterable[socket.socket], line: bytes) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):  # it has ended, which the next look shows
            connection.sendall(line)


def _answer_roll(host: str, port: int, process_id: int, lateness: _Lateness) -> None:
    """Tells the first process of this one, and waits for its word."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_ANSWER_SECS)
        except OSError as error:  # no such name yet, nobody listens, no route, a timeout
            problem = error.strerror or str(error)
        else:
            with connection:
                if _is_let_go(connection, process_id, lateness):
                    return
            problem = "it has closed the connection"
        lateness.check(lambda at, problem=problem: f"process 0 does not answer at {at} ({problem})")
        time.sleep(_RETRY_SECS)


def _is_let_go(connection: socket.socket, process_id: int, lateness: _Lateness) -> bool:
    """Returns whether to go on; false where the connection has ended before that."""
    connection.settimeout(_POLL_SECS)
    heard, waits_for = b"", "the others"
    try:
        connection.sendall(b"%s %d\n" % (_GREETING, process_id))
    except OSError:
        return False
    while True:
        try:
            data = connection.recv(_LONGEST_GREETING_BYTES)
        except TimeoutError:
            data = None
        except OSError:
            data = b""
        if data == b"":
            return False
        heard += data or b""
        *lines, heard = heard.split(b"\n")
        if lines:
            waits_for = lines[-1].removeprefix(_WAIT).decode(errors="replace")
        if not all(line.startswith(_WAIT) for line in lines) or not _WAIT.startswith(heard[:1]):
            return True  # the word, or JAX's service, which is there already
        lateness.check(lambda at, others=waits_for: f"process 0 waits at {at} for {others}")


def _list_processes(numbers: list[int], num_processes: int) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN_PROCESSES]))
    more = len(numbers) - _SHOWN_PROCESSES
    shown = f"{shown} and {more} more" if more > 0 else shown
    return f"process{'es' * (len(numbers) > 1)} {shown} of {num_processes}"
