"""Names the processes of a job that do not come.

Before JAX connects the processes, the first one calls the roll on the same port: who is missing has
a name then, and a closed port shows. JAX's own timeout ends with an abort after five minutes.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable

from absl import logging

# Processes of the job that have not come by then are named in the log, once more each time it has
# passed again; after that number of times the start ends.
START_WARNING_SECS, LAST_WARNING = 60, 5
# JAX's own default on TPUs, 8482, is closed by the firewall that Google makes for some slices
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
    """Returns when all processes of a job have called it; the log names those that are missing.

    Args:
        address: HOST:PORT where the first process listens for as long as this lasts.
        warning_secs: until the first message, and between two of them.

    Raises:
        ConnectionError: after the time of the last message some are still missing.
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
    except OSError as error:  # JAX's own error ends the command where the port is taken
        logging.warning("port %s cannot be opened for the roll call: %s", port, error)
        return
    with listener, selectors.DefaultSelector() as selector:
        _collect(listener, selector, num_processes, lateness)


class _Lateness:
    """Says from time to time what a start waits for, and ends it at last."""

    def __init__(self, address: str, warning_secs: float, clock: Callable[[], float]):
        self.address, self._warning_secs, self._clock = address, warning_secs, clock
        self._begin, self._num_warnings = clock(), 0

    def check(self, text: str) -> None:
        """Logs what is waited for, when it is time for a message.

        Raises:
            ConnectionError: with the message, when it is time for the last one.
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
    """Says what to look at where processes do not find each other at a port."""
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
    """The number that a new connection gives; -1 for one that is none of ours."""
    connection.settimeout(_ANSWER_SECS)
    try:
        words = connection.recv(_LONGEST_GREETING_BYTES).split()
    except OSError:
        words = []
    is_ours = len(words) == 2 and words[0] == _GREETING and words[1].isdigit()
    return int(words[1]) if is_ours else -1, connection


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
        lateness.check(f"process 0 does not answer at {lateness.address} ({problem})")
        time.sleep(_RETRY_SECS)


def _is_let_go(connection: socket.socket, process_id: int, lateness: _Lateness) -> bool:
    """Returns whether to go on; false where the connection has ended before that."""
    connection.settimeout(_POLL_SECS)
    try:
        connection.sendall(b"%s %d\n" % (_GREETING, process_id))
    except OSError:
        return False
    while True:
        try:
            # The word, or JAX's service, which is there already.
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
