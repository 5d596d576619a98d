"""Shared test set-up: eight CPU devices, and real data sets where they are available."""

import contextlib
import gc
import os
import pathlib
import tempfile
from collections.abc import Iterator

from tests.compiling import xla_flags
from tests.parts import part_of

# Must be set before the first import of jax anywhere in the test process.
os.environ["JAX_PLATFORMS"] = "cpu"
# Disables XLA optimisations here and in the processes that tests start: they would take most of
# the suite's time, and tests time nothing.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Tests, their child processes and xdist workers share one compilation cache (through the
# environment). A folder that the variable already names is kept.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Omits source locations from operations: saves a tenth of the time for tracing and lowering.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Processes that tests start reuse the bytecode (.pyc files) that the first process wrote.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# One thread for torch and NumPy: there are more test processes than cores, and with several
# threads each they would mostly wait for each other.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()

# torch's CUDA builds include Triton. Importing it after TensorFlow aborts the process, since both
# register LLVM's options; importing it before TensorFlow works.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Checks the shapes and dtypes in the signatures of these modules at every call.
jaxtyping.install_import_hook(
    [
        *(
            f"diht_jax.losses.{name}"
            for name in ("dense", "ring", "sigmoid", "softmax", "streaming")
        ),
        "diht_jax.training.optimizer",
        "diht_jax.training.terms",
    ],
    "beartype.beartype",
)

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]


# Files of about 15 seconds or more, which run first in this order: a long file at the end would
# leave the other processes idle.
LONGEST_FILES = (
    "training/test_processes.py",
    "training/test_stopping.py",
    "training/test_loop.py",
    "data_prep/jobs/test_ray.py",
    "first_hour/test_small_form.py",
    "docs/test_notebook.py",
    "data_prep/labelling/test_label_shards.py",
    "training/test_gradients.py",
    "docs/test_readme.py",
    "training/test_objective.py",
    "extras/test_captioning.py",
    "extras/test_steps.py",
    "data_prep/filtering/test_failures.py",
    "hardware/test_compile.py",
    "docs/test_commands.py",
    "input/test_pipeline.py",
    "contributing/test_walks.py",
    "data_prep/text_spotting/test_spotter.py",
    "training/test_init_from.py",
    "training/test_stages.py",
    "training/test_step.py",
    "data_prep/filtering/test_kill_points.py",
    "training/test_task_evaluation.py",
    "release/test_wheel.py",
    "weights/test_inference.py",
    "weights/test_programs.py",
    "hardware/test_compiler.py",
    "training/workdir/test_stored_run.py",
    "models/test_dual_encoder.py",
    "test_distributed.py",
    "fuzz/test_fuzz.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the option `--part 2/4`, for machines that share the suite."""
    parser.addoption("--part", default="1/1", help="2/4 runs the second of four parts of the files")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sorts the test files by `LONGEST_FILES`: `run_tests.sh` assigns them in this order.

    Deselects the files outside of `--part`.
    """
    ranks = {str(REPOSITORY / "tests" / name): rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))
    part, parts = map(int, config.getoption("part").split("/"))
    mine = set(part_of(list(dict.fromkeys(item.path for item in items)), part, parts))
    others = [item for item in items if item.path not in mine]
    items[:] = [item for item in items if item.path in mine]
    config.hook.pytest_deselected(items=others)


def pytest_collection_finish() -> None:
    """Exempts permanent objects (modules and the tests themselves) from garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Escapes text that is not valid UTF-8, such as file names in a log: xdist cannot send it."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data next to the checkout; skips the test if it is absent."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent")
    return directory


@pytest.fixture(scope="session")
def s3_bucket():
    """Starts an S3 server (moto) in this process, sets its environment, yields a bucket's URL."""
    server_module = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    server = server_module.ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
    values = ("testing", "testing", f"http://{host}:{port}", "us-east-1")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, values, strict=True):
            patch.setenv(name, value)
        s3fs.S3FileSystem().mkdir("bucket")
        yield "s3://bucket"
        server.stop()
