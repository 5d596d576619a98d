"""Shared test set-up: eight CPU devices, and the real data sets where they are present."""

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
# XLA leaves out what only makes programs faster, here and in the processes that tests start: most
# of the suite's time would go into that, and nothing is timed.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# A program that one test has compiled is there for all others, for the processes that they start,
# and for xdist's, which have this environment. A folder of your own in the variable is kept.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="compiled_", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Operations do not say from which lines they come: a tenth of tracing and lowering is saved.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Processes that tests start read the compiled modules of the project that the first one has left.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# One thread for torch and NumPy, as there are more processes of tests than cores: with several in
# each, most of the time would go into waiting for each other.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}".strip()

# torch's builds for CUDA bring Triton along. After TensorFlow its import ends the process, since
# both register LLVM's options; before TensorFlow it does not.
with contextlib.suppress(ImportError):
    import triton  # noqa: F401

import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Shapes and dtypes in the signatures of these modules are checked at every call.
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


# Of some 15 seconds and more, in this order at the front: at the end, one process would wait for
# the other.
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
    """`--part 2/4`, for machines that share the suite."""
    parser.addoption("--part", default="1/1", help="2/4 runs the second of four parts of the files")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the files of tests: `run_tests.sh` gives them to its processes in this order.

    Those of other parts than `--part` are left out.
    """
    ranks = {str(REPOSITORY / "tests" / name): rank for rank, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: ranks.get(str(item.path), len(ranks)))
    part, parts = map(int, config.getoption("part").split("/"))
    mine = set(part_of(list(dict.fromkeys(item.path for item in items)), part, parts))
    others = [item for item in items if item.path not in mine]
    items[:] = [item for item in items if item.path in mine]
    config.hook.pytest_deselected(items=others)


def pytest_collection_finish() -> None:
    """Spares the garbage collector what is there to stay: modules and the tests themselves."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Escapes what UTF-8 has not: xdist cannot send it, and names of files in a log may have it."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """The folder of real test data beside the checkout; skips the test where it is absent."""
    directory = REPOSITORY.parent / "shared" / "data"
    if not directory.is_dir():
        pytest.skip(f"{directory} is absent")
    return directory


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
