"""Start-up of multi-process jobs on TPU pods, Slurm, Open MPI, or with explicit flags.

This must run before anything asks JAX for devices. Meshes and batches belong in `sharding`.

Before JAX connects the processes, process 0 calls the roll on the same port. This names missing
processes and reveals a closed port. JAX's own timeout aborts after five minutes.
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
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

from diht_jax.hardware.compiler import has_tpu
from diht_jax.terminal import print_escaped

flags.disclaim_key_flags()  # each command's --help lists them as its own flags

# The job ends if a process sends no heartbeat for this long; the others name that process.
HEARTBEAT_TIMEOUT_SECS = 100
# How long a process waits at its end for the others, which may have died.
SHUTDOWN_TIMEOUT_SECS = 60
# Variables of a Slurm step that JAX reads; a batch script without `srun` lacks some of them.
_SLURM_STEP = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
# JAX's answer for a host outside any known cluster.
_NO_CLUSTER = (None, None, None)
# The log names missing processes after this interval, and again at each further interval; the start
# fails after that many intervals.
START_WARNING_SECS, LAST_WARNING = 60, 5
# Not JAX's default on TPUs, 8482, which Google's firewall closes for some slices
# (github.com/jax-ml/jax/issues/35905).
DEFAULT_PORT = "8476"
PORT_VARIABLE = "JAX_COORDINATOR_PORT"
_GREETING = b"diht_jax"
_POLL_SECS, _ANSWER_SECS, _RETRY_SECS = 0.5, 5.0, 0.3
_LONGEST_GREETING_BYTES = 300
_SHOWN_PROCESSES = 16


def define_flags() -> None:
    """Defines the flags that `start_from_flags` reads."""
    flags.DEFINE_string(
        "coordinator_address",
        None,
        "HOST:PORT of the first process, for clusters that JAX cannot ask (it can ask TPU pods, "
        "Slurm and Open MPI). Needs --num_processes and --process_id. HOST alone takes the port of "
        f"{PORT_VARIABLE}, or {DEFAULT_PORT}.",
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
        "Seconds after which processes that have not come are named; after "
        f"{LAST_WARNING} times as many the command ends.",
        lower_bound=0.1,
    )


def start_from_flags(begin: Callable[[int], None] | None = None) -> None:
    """Joins the other processes of the job, if any, according to the flags or the cluster."""
    given = flags.FLAGS
    start(
        given.coordinator_address,
        given.num_processes,
        given.process_id,
        given.heartbeat_timeout_secs,
        given.start_warning_secs,
        begin,
    )


def start(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout_secs: int = HEARTBEAT_TIMEOUT_SECS,
    start_warning_secs: float = START_WARNING_SECS,
    begin: Callable[[int], None] | None = None,
) -> None:
    """Joins the other processes of the job, if there are any.

    Args:
        coordinator_address, num_processes, process_id, heartbeat_timeout_secs, start_warning_secs:
            see the flags.
        begin: called with the number of this process once it is known, before waiting for the
            others; not called if there are no others.

    Raises:
        ValueError: some but not all of the first three are given, or they do not match.
        ConnectionError: some processes did not come.
    """
    given = {
        "--coordinator_address": coordinator_address,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    timeouts: dict[str, Any] = {
        "heartbeat_timeout_seconds": heartbeat_timeout_secs,
        "shutdown_timeout_seconds": SHUTDOWN_TIMEOUT_SECS,
    }
    if set(given.values()) == {None}:
        cluster = find_cluster()
        if cluster is None or not _call_roll_of(cluster, start_warning_secs, begin):
            return
        jax.distributed.initialize(**timeouts)
    else:
        if coordinator_address is None or num_processes is None or process_id is None:
            missing = [name for name, value in given.items() if value is None]
            raise ValueError(
                f"{', '.join(missing)}: expected together with the others of {', '.join(given)}"
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id}: expected at least 0 and less than "
                f"--num_processes={num_processes}"
            )
        cluster = coordinator_address = with_port(coordinator_address)
        if begin is not None:
            begin(process_id)
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
        # Only process 0 logs at INFO; warnings and errors still come from every process.
        logging.set_verbosity(logging.WARNING)


def is_first() -> bool:
    """Returns whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def end_job(error: Exception, status: Callable[[Exception], int] = lambda _: 1) -> None:
    """Prints the error and ends this process at once, if it is one of several.

    It does not use `sys.exit`, since JAX, Orbax and the decoding workers would then wait for
    processes that may have died. The other processes notice that this one is gone.

    Args:
        status: returns the exit status for the error. It is called after the error is printed; if
            process 0 has ended, this process has only a moment left.
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
    # Starts a new line after the progress bar.
    print_escaped("\n".join(["", *lines]), file=sys.stderr)
    sys.stderr.flush()
    os._exit(status(error))


def find_cluster() -> str | None:
    """Returns the kind of cluster that starts this process as one of several, or None.

    It only reads the environment, not the network.
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


def _call_roll_of(cluster: str, warning_secs: float, begin: Callable[[int], None] | None) -> bool:
    """Calls the roll of the processes that JAX finds; returns False if there are no others."""
    if cluster == "TPU":
        os.environ.setdefault(PORT_VARIABLE, DEFAULT_PORT)
    is_alone = cluster == "TPU" and _is_alone()
    found = _NO_CLUSTER if is_alone else _ask_cluster(warning_secs)
    if cluster == "TPU" and found == _NO_CLUSTER:  # a notebook's TPU, or a single host
        logging.warning(
            "this host has TPUs and JAX finds no pod that it is part of: the command runs on this "
            "host alone. If there are more hosts, give --coordinator_address, --num_processes and "
            "--process_id"
        )
        return False
    address, count, number = found or _NO_CLUSTER
    if address is not None and count is not None and number is not None:
        if begin is not None:
            begin(number)
        call_roll(address, count, number, warning_secs)
    return True


def _is_alone() -> bool:
    """Returns whether a TPU host has no sign of others, as in notebooks and outside Google Cloud.

    JAX would query Google's metadata server anyway, and fail if there is none.
    """
    env = os.environ
    listed = env.get("TPU_PROCESS_ADDRESSES", "") + env.get("TPU_WORKER_HOSTNAMES", "")
    if "," in listed or env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return False
    if env.get("TPU_SKIP_MDS_QUERY"):
        return True
    try:
        socket.getaddrinfo(env.get("GCE_METADATA_IP", "metadata.google.internal"), 80)
    except OSError:
        return True
    return False


def with_port(address: str) -> str:
    """Returns an address as HOST:PORT; a missing port is that of the environment, or 8476."""
    if re.search(r"[^:]:\d+$", address):
        return address
    return f"{address}:{os.environ.get(PORT_VARIABLE, DEFAULT_PORT)}"


def _ask_cluster(timeout_secs: float) -> tuple[str | None, int | None, int | None] | None:
    """Returns (address, number of processes, number of this one); None if JAX cannot be asked."""
    try:
        from jax._src.clusters import ClusterEnv

        unset = (None, None, None, None, None)
        found = ClusterEnv.auto_detect_unset_distributed_params(
            *unset,
            timeout_secs,  # ty: ignore[invalid-argument-type]  # it may have a fraction
        )
        return found[:3]
    except Exception as error:  # JAX asks again, and its error then ends the command
        logging.warning("the job's processes are not known: %s. %s", error, advise("a port"))
        return None


def call_roll(
    address: str,
    num_processes: int,
    process_id: int,
    warning_secs: float = START_WARNING_SECS,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Blocks until all processes of a job have called it; the log names missing ones.

    Args:
        address: HOST:PORT where process 0 listens during the call.
        warning_secs: time before the first message, and between messages.

    Raises:
        ConnectionError: some processes are still missing after the last interval.
    """
    if num_processes == 1:
        return
    host, _, port = address.rpartition(":")
    lateness = _Lateness(address, warning_secs, clock)
    if process_id != 0:
        _answer_roll(host.strip("[]"), int(port), process_id, lateness)
        return
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(
            ("", int(port)), family=family, dualstack_ipv6=both, backlog=num_processes
        )
    except OSError as error:  # if the port is taken, JAX's own error ends the command
        logging.warning("port %s cannot be opened for the roll call: %s", port, error)
        return
    with listener, selectors.DefaultSelector() as selector:
        _collect(listener, selector, num_processes, lateness)


class _Lateness:
    """Logs at intervals what a start waits for, and finally fails."""

    def __init__(self, address: str, warning_secs: float, clock: Callable[[], float]):
        self.address, self._warning_secs, self._clock = address, warning_secs, clock
        self._begin, self._num_warnings = clock(), 0

    def check(self, text: str) -> None:
        """Logs `text` if a message is due.

        Raises:
            ConnectionError: with the message, if the last one is due.
        """
        waited = self._clock() - self._begin
        if waited < (self._num_warnings + 1) * self._warning_secs:
            return
        self._num_warnings += 1
        port = self.address.rpartition(":")[2]
        message = f"after {waited:.0f} s, {text}. {advise(f'port {port}')}"
        if self._num_warnings == LAST_WARNING:
            raise ConnectionError(message)
        logging.warning("%s", message)


def advise(port: str) -> str:
    """Returns advice for processes that do not find each other at a port."""
    return (
        f"Did the command start on all hosts, and does a firewall let them reach {port} of the "
        f"first one? --coordinator_address or {PORT_VARIABLE}, the same on all hosts, takes "
        "another port"
    )


def _collect(
    listener: socket.socket,
    selector: selectors.BaseSelector,
    num_processes: int,
    lateness: _Lateness,
) -> None:
    """Waits until all other processes are connected at the same time, then releases them."""
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
                else:  # processes send nothing more, so this one has ended
                    selector.unregister(key.fileobj)
                    if present.get(key.data) is key.fileobj:
                        del present[key.data]
                    if isinstance(key.fileobj, socket.socket):
                        key.fileobj.close()
            missing = [n for n in range(1, num_processes) if n not in present]
            if missing:
                text = _list_processes(missing, num_processes)
                lateness.check(f"missing at {lateness.address}: {text}")
        for connection in present.values():
            with contextlib.suppress(OSError):  # it has ended
                connection.sendall(b"go\n")


def _greet(connection: socket.socket) -> tuple[int, socket.socket]:
    """Returns the process number sent by a new connection; -1 if it is not one of ours."""
    connection.settimeout(_ANSWER_SECS)
    try:
        words = connection.recv(_LONGEST_GREETING_BYTES).split()
    except OSError:
        words = []
    is_ours = len(words) == 2 and words[0] == _GREETING and words[1].isdigit()
    return int(words[1]) if is_ours else -1, connection


def _answer_roll(host: str, port: int, process_id: int, lateness: _Lateness) -> None:
    """Announces this process to process 0, and waits to be released."""
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=_ANSWER_SECS)
        except OSError as error:  # no such name yet, no listener, no route, a timeout
            problem = error.strerror or str(error)
        else:
            with connection:
                if _is_let_go(connection, process_id, lateness):
                    return
            problem = "it has closed the connection"
        lateness.check(f"process 0 does not answer at {lateness.address} ({problem})")
        time.sleep(_RETRY_SECS)


def _is_let_go(connection: socket.socket, process_id: int, lateness: _Lateness) -> bool:
    """Returns whether process 0 released this one; False if the connection ended first."""
    connection.settimeout(_POLL_SECS)
    try:
        connection.sendall(b"%s %d\n" % (_GREETING, process_id))
    except OSError:
        return False
    while True:
        try:
            # Process 0's word, or an answer of JAX's service if that runs already.
            return connection.recv(_LONGEST_GREETING_BYTES) != b""
        except TimeoutError:
            lateness.check(f"process 0 waits at {lateness.address} for others; its log names them")
        except OSError:
            return False


def _list_processes(numbers: list[int], num_processes: int) -> str:
    shown = ", ".join(map(str, numbers[:_SHOWN_PROCESSES]))
    more = len(numbers) - _SHOWN_PROCESSES
    shown = f"{shown} and {more} more" if more > 0 else shown
    return f"process{'es' * (len(numbers) > 1)} {shown} of {num_processes}"
