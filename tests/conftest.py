"""Shared test set-up: eight CPU devices, and the real data sets where they are present."""

import gc
import os
import pathlib
import signal

from tests.compiling import xla_flags

# Must be set before the first import of jax anywhere in the test process.
os.environ["JAX_PLATFORMS"] = "cpu"
# XLA leaves out what only makes programs faster, here and in the processes that tests start: most
# of the suite's time would go into that, and nothing is timed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()

import pytest  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """Spares the garbage collector what is there to stay: modules and the tests themselves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data beside the checkout; skips the test where it is absent."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent")
    return directory


@pytest.fixture
def hang_guard():
    """Ends a test that hangs. Far more time than any machine needs: nothing is measured by it."""

    def give_up(*_):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def s3_bucket():
    """An S3 server in this process (moto), found through the environment; its bucket's URL."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    values = ("testing", "testing", f"http://{host}:{port}", "us-east-1")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(zip(names, values, strict=True))
    s3fs.S3FileSystem().mkdir("bucket")
    yield "s3://bucket"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
