"""Start-up of multi-process jobs on TPU pods, Slurm, Open MPI, or with explicit flags.

This must run before anything asks JAX for devices. Meshes and batches belong in `sharding`.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import jax
from absl import flags, logging

from diht_jax.distributed.roll_call import (
    DEFAULT_PORT,
    LAST_WARNING,
    PORT_VARIABLE,
    START_WARNING_SECS,
    advise,
    call_roll,
)
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
