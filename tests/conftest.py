"""Shared test set-up: eight CPU devices, and the real data sets where they are present."""

import os
import pathlib

# Must be set before the first import of jax anywhere in the test process.
os.environ["JAX_PLATFORMS"] = "cpu"
_DEVICE_COUNT_FLAG = "--xla_force_host_platform_device_count=8"
if _DEVICE_COUNT_FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DEVICE_COUNT_FLAG}".strip()

import pytest  # noqa: E402

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data beside the checkout; skips the test where it is absent."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent")
    return directory
