"""XLA flags and compile cache: set only where they apply, and overridden by the user's settings."""

import importlib.util
import os
import shlex
import shutil
import subprocess
import sys

import jax
import pytest

from diht_jax.hardware import compiler
from tests.compiling import needs_libtpu
from tests.make import REPOSITORY
from tests.serving import free_address

UNKNOWN_FLAG = "--xla_gpu_no_such_flag=true"
# Compiles ahead of time for a TPU; its compiler refuses unknown flags.
COMPILE_FOR_TPU = """
import jax, jax.numpy as jnp
from diht_jax.hardware.topologies import get_topology
device = get_topology("v5e:2x2").devices[0]
x = jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
jax.jit(lambda x: x @ x).lower(x).compile()
"""

# One of two processes, started as `diht_jax.train` starts them on GPUs.
OF_TWO = """
import sys, jax, numpy as np
from diht_jax import distributed
from diht_jax.hardware import compiler
compiler.set_flags("gpu")
distributed.start(sys.argv[1], 2, int(sys.argv[2]))
compiler.keep_programs("~/kept")
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
spread = jax.NamedSharding(jax.make_mesh((2,), ("all",)), jax.P("all"))
x = jax.make_array_from_callback((2,), spread, lambda index: np.arange(1.0, 3.0)[index])
print("sum", jax.jit(lambda x: (x * x).sum())(x))
print("reads" if "/jax/compilation_cache/cache_hits" in events else "compiles")
"""


@pytest.fixture(scope="module", autouse=True)
def started_jax():
    """Starts JAX with the flags of all tests, before some here remove them."""
    jax.devices()


def run(script, **environment):
    command = [sys.executable, "-c", script]
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_xla_knows_every_gpu_flag(tmp_path):
    """XLA ends a process with unknown flags, on every platform."""
    more = compiler.deterministic_flags("gpu", str(tmp_path / "autotuned"))
    flags = " ".join((*compiler.GPU_FLAGS, *more))
    done = run("import jax; jax.devices()", XLA_FLAGS=flags)
    assert done.returncode == 0, done.stderr


@needs_libtpu
def test_libtpu_knows_every_tpu_flag():
    done = run(COMPILE_FOR_TPU, LIBTPU_INIT_ARGS=" ".join(compiler.TPU_FLAGS))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_flags_are_added_unless_the_user_has_set_them(monkeypatch, name):
    variable, flags = compiler.FLAGS[name]
    key = flags[1].partition("=")[0]
    monkeypatch.setenv(variable, f"{key}=false --mine=1")
    line = compiler.set_flags(name)
    assert os.environ[variable].split() == [flags[0], *flags[2:], f"{key}=false", "--mine=1"]
    assert line == f"{variable}={os.environ[variable]}"
    before = os.environ[variable]
    compiler.set_flags(name)
    assert os.environ[variable] == before
    monkeypatch.delenv(variable)
    compiler.set_flags(name)
    assert os.environ[variable].split() == list(flags)


def test_an_option_that_this_xla_lacks_is_left_out(monkeypatch):
    """For example, jax 0.11 lacks some options of jax 0.10."""
    known = "--xla_gpu_shard_autotuning=false"
    monkeypatch.setitem(compiler.FLAGS, "gpu", ("XLA_FLAGS", (UNKNOWN_FLAG, known)))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler.compiler_options("cuda") == {"xla_gpu_shard_autotuning": False}


def test_options_of_the_step_are_for_one_chip_and_the_user_s_flags_win(monkeypatch):
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    for kind in ("cpu", "TPU v6 lite", "NVIDIA H100 80GB HBM3"):
        assert compiler.step_options(kind) == {}
    options = compiler.step_options("TPU v5 lite")
    assert options == {"xla_tpu_scoped_vmem_limit_kib": 32768, "xla_tpu_dot_dot_fusion": False}
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--mine=1 --xla_tpu_scoped_vmem_limit_kib=65536")
    assert compiler.step_options("TPU v5 lite") == {"xla_tpu_dot_dot_fusion": False}


def test_options_of_the_step_that_this_libtpu_lacks_are_left_out(monkeypatch):
    """The CPU's compiler knows none of them."""
    monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
    monkeypatch.setattr(compiler.jax, "default_backend", lambda: "tpu")
    assert compiler.step_options("TPU v5 lite") == {}


@pytest.mark.parametrize(
    "environment, devices, packages, expected",
    [
        ({}, set(), {"libtpu", "jax_cuda12_plugin"}, None),
        ({}, {"nvidia[0-9]*"}, {"jax_cuda12_plugin"}, "gpu"),
        ({"JAX_PLATFORMS": "cpu"}, {"nvidia[0-9]*"}, {"jax_cuda12_plugin"}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, {"nvidia[0-9]*"}, {"jax_cuda12_plugin"}, None),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, {"nvidia[0-9]*"}, {"jax_cuda12_plugin"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0"}, {"nvidia[0-9]*"}, {"jax_cuda12_plugin"}, "gpu"),
        ({}, {"vfio/[0-9]*"}, {"libtpu"}, "tpu"),
    ],
)
def test_accelerator(monkeypatch, environment, devices, packages, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in {"JAX_PLATFORMS": "", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(compiler, "_has_device", devices.__contains__)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in packages or None)
    assert compiler.accelerator() == expected


def test_a_process_whose_programs_are_not_kept_waits_for_no_kernels_of_the_other(tmp_path):
    """With separate caches, the first process loads its programs and the second compiles."""
    homes = [tmp_path / "host_0", tmp_path / "host_1"]
    for _ in range(2):
        address, processes = free_address(), []
        for number, home in enumerate(homes):
            shutil.rmtree(home / "dump", ignore_errors=True)
            environment = {
                **os.environ,
                **{"PYTHONPATH": str(REPOSITORY), "HOME": str(home), "JAX_PLATFORMS": "cpu"},
                "XLA_FLAGS": f"--xla_dump_to={home}/dump",
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            environment.pop("JAX_COMPILATION_CACHE_DIR", None)
            command = [sys.executable, "-c", OF_TWO, address, str(number)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            processes.append(subprocess.Popen(command, env=environment, **pipes))
        outputs = [process.communicate(timeout=300)[0] for process in processes]
        assert ["sum 5.0" in output for output in outputs] == [True, True], outputs
    assert "reads" in outputs[0] and "compiles" in outputs[1]
    (options,) = (homes[1] / "dump").glob("*lambda*.debug_options")
    assert "xla_gpu_shard_autotuning: false" in options.read_text()


@pytest.mark.parametrize(
    "platform, folder, keeps",
    [
        ("gpu", "run/autotuned", True),
        ("gpu", "my run/autotuned", True),
        ("gpu", "gs://bucket/run/autotuned", False),
    ],
)
def test_a_deterministic_run_keeps_its_kernels_where_it_can(
    tmp_path, monkeypatch, platform, folder, keeps
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    compiler.set_flags(platform, compiler.deterministic_flags(platform, folder))
    kept = f"--xla_gpu_per_fusion_autotune_cache_dir={tmp_path / folder}"
    assert "--xla_gpu_exclude_nondeterministic_ops=true" in os.environ["XLA_FLAGS"]
    assert (kept in shlex.split(os.environ["XLA_FLAGS"])) == keeps
    assert (tmp_path / folder).is_dir() == keeps
