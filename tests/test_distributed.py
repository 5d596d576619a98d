"""Start-up of multi-process jobs in which some processes never connect."""

import itertools
import socket
import threading

import pytest

from diht_jax import distributed
from tests import make
from tests.serving import free_address
from tests.waiting import wait_until

LONGEST_SECS = 300  # protects against hanging only


@pytest.mark.parametrize("process, status", [(1, 78), (0, 1)])
def test_a_command_whose_peer_never_starts_names_it_and_its_port_and_ends(
    tmp_path, process, status
):
    """Exits with 78 (do not retry) if the peer has ended for good.

    An `ended.json` of this process itself does not count: a restarted process has been mended, and
    its peer may only be late.
    """
    text = f'{{"process": {process}, "error": "record 7: no picture"}}'
    (tmp_path / "ended.json").write_text(text)
    address = free_address()
    job = (("coordinator_address", address), ("num_processes", 2), ("process_id", 0))
    config = (("config", "configs/demo.py"), ("config.data.train", "unused"))
    given = (("workdir", tmp_path), ("start_warning_secs", 0.5))
    ended = make.run_command("diht_jax.train", *given, *config, *job)
    assert ended.returncode == status
    said = f"process {process} has ended for good: record 7: no picture" in ended.stderr
    assert said == (status == 78)
    if not said:
        messages = [line for line in ended.stderr.splitlines() if "process 1 of 2" in line]
        assert len(messages) > 1 and [line for line in messages if address not in line] == []


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(distributed, "_POLL_SECS", 0.1)


class Roll:
    """The processes of a job, as threads that do the roll call at one address."""

    def __init__(self, num_processes):
        self.address, self.num_processes = free_address(), num_processes
        self.threads, self.errors = {}, {}

    def start(self, process_id, **options):
        def call():
            try:
                distributed.call_roll(self.address, self.num_processes, process_id, **options)
            except ConnectionError as error:
                self.errors[process_id] = str(error)

        thread = threading.Thread(target=call, daemon=True)
        self.threads[process_id] = thread
        thread.start()

    def join(self):
        for thread in self.threads.values():
            thread.join(LONGEST_SECS)
        return self.errors

    def connect(self):
        host, _, port = self.address.rpartition(":")
        while True:
            try:
                return socket.create_connection((host, int(port)))
            except ConnectionRefusedError:  # not listening yet
                continue


def ticking(secs=1.0):
    """A clock that advances by `secs` at every reading."""
    return itertools.count(0.0, secs).__next__


def test_the_first_process_names_those_that_are_missing():
    roll = Roll(4)
    roll.start(0, warning_secs=1.0, clock=ticking())
    roll.start(2, warning_secs=4.0, clock=ticking())
    errors = roll.join()
    assert "processes 1, 3 of 4" in errors[0]
    assert "process 0" in errors[2] and roll.address in errors[2]


def test_a_process_that_came_and_died_is_missing(caplog):
    roll = Roll(3)
    roll.start(0, warning_secs=4.0, clock=ticking())
    with roll.connect() as gone:
        gone.sendall(b"diht_jax 2\n")
        wait_until(lambda: "process 1 of 3" in caplog.text)
    assert "processes 1, 2 of 3" in roll.join()[0]


@pytest.mark.parametrize("greeting", [b"GET / HTTP/1.1\r\n\r\n", b"diht_jax 7\n", b"diht_jax 0\n"])
def test_strangers_are_not_counted(greeting):
    roll = Roll(2)
    roll.start(0, warning_secs=1.0, clock=ticking())
    with roll.connect() as stranger:
        stranger.sendall(greeting)
        assert "process 1 of 2" in roll.join()[0]


def test_a_service_that_is_there_already_is_left_to_jax():
    roll = Roll(2)
    with socket.create_server(("localhost", int(roll.address.rpartition(":")[2]))) as service:
        roll.start(1)
        connection = service.accept()[0]
        with connection:
            connection.sendall(b"\x00\x00\x18\x04")  # an HTTP/2 SETTINGS frame
            assert roll.join() == {}


@pytest.mark.parametrize(
    "address, variable, expected",
    [
        ("host", None, "host:8476"),
        ("host", "9000", "host:9000"),
        ("host:7000", "9000", "host:7000"),
        ("[::1]", None, "[::1]:8476"),
        ("[::1]:7000", None, "[::1]:7000"),
    ],
)
def test_an_address_without_a_port_takes_that_of_the_environment(
    monkeypatch, address, variable, expected
):
    monkeypatch.delenv("JAX_COORDINATOR_PORT", raising=False)
    if variable:
        monkeypatch.setenv("JAX_COORDINATOR_PORT", variable)
    assert distributed.with_port(address) == expected


def test_tpu_pods_take_the_port_that_is_open(monkeypatch):
    """Uses JAX's cluster detection for a slice of two hosts, described as GKE does."""
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost,other")
    monkeypatch.setenv("TPU_WORKER_ID", "1")
    for name in ("JAX_COORDINATOR_PORT", "MEGASCALE_COORDINATOR_ADDRESS"):
        monkeypatch.setenv(name, "")
    for name in ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID"):
        monkeypatch.setenv(name, "0" if name.endswith("ID") else "1")
    monkeypatch.delenv("JAX_COORDINATOR_PORT")
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(distributed, "find_cluster", lambda: "TPU")
    called = []
    monkeypatch.setattr(distributed, "call_roll", lambda *args: called.append(args))
    monkeypatch.setattr(distributed.jax.distributed, "initialize", lambda **_: None)
    distributed.start()
    assert [call[:3] for call in called] == [("localhost:8476", 2, 1)]


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"TPU_SKIP_MDS_QUERY": "1"},
        {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "local", "TPU_WORKER_ID": "0"},
    ],
    ids=["a machine of one's own", "a notebook", "a notebook with a name"],
)
def test_tpus_that_are_part_of_no_pod_are_used_by_one_process(monkeypatch, caplog, environment):
    """JAX sees TPU devices, but there is no metadata server."""
    from jax._src.clusters import cloud_tpu_cluster

    variables = ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
    for name in (*variables, "MEGASCALE_COORDINATOR_ADDRESS", "JAX_COORDINATOR_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"JAX_PLATFORMS": "", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setattr(distributed, "has_tpu", lambda: True)

    def no_such_name(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)
    with caplog.at_level("WARNING"):
        distributed.start(start_warning_secs=0.1)
    assert "on this host alone" in caplog.text
