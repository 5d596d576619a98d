"""Waits for all processes of a job, and names the missing ones.

Before JAX connects the processes, process 0 calls the roll on the same port. This names missing
processes and reveals a closed port. JAX's own timeout aborts after five minutes.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable

from absl import logging

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
