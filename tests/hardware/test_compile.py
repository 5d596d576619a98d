"""Ahead-of-time compilation for other machines: reports, verdicts, errors, recipes' claims."""

import dataclasses
import importlib.util
import itertools
import math
import types

import jax
import numpy as np
import pytest

from diht_jax import compile as compile_command
from diht_jax.compile import (
    cheaper_settings,
    compile_step,
    fastest_settings,
    first_that_fits,
    for_fewer_devices,
    smaller_batches,
)
from diht_jax.config import load_recipe
from diht_jax.hardware import compiler
from diht_jax.hardware.chips import GIB, find_chip
from diht_jax.hardware.hlo_traffic import Collective, Traffic, Work
from diht_jax.hardware.report import (
    describe_input,
    describe_step,
    link_bandwidth,
    num_hosts,
)
from diht_jax.hardware.topologies import Topology, get_topology
from diht_jax.training.program import TrainProgram
from tests.compiling import needs_libtpu
from tests.docs.commands import parse_command
from tests.make import REPOSITORY

needs_cuda = pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
    reason="the CUDA compiler is absent: pip install 'jax[cuda13]'",
)


def recipe(name, **changes):
    config = load_recipe(REPOSITORY / "configs" / f"{name}.py", "debug=True")
    config.model.overrides.vision_layers = config.model.overrides.text_layers = 1
    config.mesh.data = -1
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def local():
    """Compiles a recipe for the eight CPU devices; returns its config and its report."""
    config = recipe("clip_vitb32", **{"data.batch_size": 4096, "mesh.fsdp": 1})
    return config, compile_step(config, get_topology("local"))


@needs_libtpu
def test_debug_recipe_compiles_for_a_slice():
    config = recipe("diht_vitl14", **{"mesh.data": 1})
    report = compile_step(config, get_topology("v5e:2x4"))
    assert report.mesh == {"data": 1, "fsdp": 8} and report.fits
    # The compiler of a v5e was used, not this machine's.
    assert report.topology.devices[0].device_kind == "TPU v5 lite"
    assert 0 < report.argument_bytes < report.peak_bytes < report.memory_limit_bytes == 16 * GIB
    assert report.needed_bytes == report.peak_bytes  # as the TPU compiler counts
    kinds = {row.kind: row for row in report.traffic.collectives}
    # fsdp gathers parameters and scatters gradients, each at least once.
    embedding = 49408 * 32 * 4
    assert kinds["all-gather"].group_size == kinds["reduce-scatter"].group_size == 8
    assert kinds["all-gather"].payload_bytes > embedding
    assert kinds["reduce-scatter"].payload_bytes > embedding
    estimate = report.roofline
    assert 0 < estimate.scheduled_mfu <= estimate.mfu < 1
    assert report.traffic.unknown_kernels == 0


def test_the_step_is_compiled_with_the_options_of_its_chip(monkeypatch, local):
    """A compiler refuses an option that it does not know."""
    monkeypatch.setitem(compiler.STEP_OPTIONS, "cpu", {"xla_no_such_option": True})
    chip = dataclasses.replace(find_chip("v5e"), name="cpu")
    monkeypatch.setattr(compiler, "find_chip", {"cpu": chip}.get)
    config, whole = local
    with pytest.raises(ValueError, match="xla_no_such_option"):
        compile_step(config, whole.topology)


@needs_libtpu
def test_the_tpu_compiler_s_out_of_memory_is_a_verdict():
    config = recipe(
        "diht_vitb32",
        **{"data.batch_size": 1 << 20, "model.dtype": "bfloat16", "mesh.fsdp": 1},
    )
    report = compile_step(config, get_topology("v5e:1x1"))
    assert not report.fits and report.needed_bytes > 16 * GIB
    assert 15 * GIB < report.memory_limit_bytes <= 16 * GIB
    assert report.temporary_bytes is None and report.traffic is None and report.roofline is None
    assert "OUT OF MEMORY" in describe_step(report)


def test_arguments_are_the_state_and_the_batch(local):
    """Replicated parameters and their two moments, and an eighth of the batch."""
    config, report = local
    program = TrainProgram(config, total_steps=10)
    shapes = jax.eval_shape(program.init_params, jax.random.key(0))
    num_params = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    batch = 512 * (32 * 32 * 3 + 77 * 4)
    assert report.argument_bytes == pytest.approx(3 * 4 * num_params + batch, rel=1e-3)
    assert report.batch_size == 4096 and report.mesh == {"data": 8, "fsdp": 1}
    assert report.peak_bytes > report.argument_bytes
    assert report.needed_bytes >= report.argument_bytes + report.temporary_bytes


@pytest.mark.parametrize(
    "share, batch_size, settings", [(0.7, 2048, ("dots", None)), (0.2, 512, ("none", 512))]
)
def test_search_takes_the_largest_batch_and_the_cheapest_settings_that_fit(
    monkeypatch, local, share, batch_size, settings
):
    """Given a share of the memory, and sizes that are functions of the settings."""
    config, whole = local
    rest_bytes = whole.needed_bytes - whole.argument_bytes
    limit_bytes = whole.argument_bytes + int(share * rest_bytes)

    def pretended(candidate, topology):
        examples = candidate.micro_batch or candidate.data.batch_size
        policy = ("none", "dots", "minimal", "full").index(candidate.model.remat)
        return dataclasses.replace(
            whole,
            batch_size=candidate.data.batch_size,
            micro_batch=candidate.micro_batch,
            remat=candidate.model.remat,
            fits=rest_bytes * examples / 4096 / (1 + policy) <= share * rest_bytes,
        )

    monkeypatch.setattr(compile_command, "compile_step", pretended)
    too_large = dataclasses.replace(whole, fits=False, memory_limit_bytes=limit_bytes)
    smaller = first_that_fits(config, whole.topology, smaller_batches(config, too_large))
    assert smaller == {"data.batch_size": batch_size, "micro_batch": None}
    found = first_that_fits(config, whole.topology, cheaper_settings(config, too_large))
    assert found == dict(zip(("model.remat", "micro_batch"), settings, strict=True))


def test_proposal_is_the_fastest_that_fits(monkeypatch, capsys, local):
    """Against an exhaustive search, with bounds and sizes that are functions of the settings.

    Unrolled layers alone do not fit, nor do they with the policy of the config.
    """
    config, whole = local
    config = config.copy_and_resolve_references()
    config.mesh.fsdp = 4

    def seconds(remat, scans, micro_batch, fsdp):
        again = {"none": 0, "dots": 1, "minimal": 2, "full": 5}[remat]
        return 10 + again + 3 * scans + 4 * (micro_batch is not None) + fsdp / 4

    def gibibytes(remat, scans, micro_batch, fsdp):
        kept = {"none": 9, "dots": 6, "minimal": 4, "full": 2}[remat]
        return kept - scans - 2 * (micro_batch is not None) + 8 / fsdp

    def pretended(candidate, topology):
        settings = (
            candidate.model.remat,
            candidate.model.scan_layers,
            candidate.micro_batch,
            candidate.mesh.fsdp,
        )
        work = (Work("element-wise", memory_bytes=int(seconds(*settings) * 10**9)),)
        chip = dataclasses.replace(find_chip("v5e"), hbm_bytes_per_sec=1e9)
        return dataclasses.replace(
            whole,
            topology=dataclasses.replace(topology, chip=chip),
            flops=1,
            traffic=Traffic(0, (), 0, work=work),
            fits=gibibytes(*settings) <= 8,
        )

    monkeypatch.setattr(compile_command, "compile_step", pretended)
    topology = get_topology("local")
    best, changes = fastest_settings(config, topology, pretended(config, topology))
    possible = [
        seconds(*settings)
        for settings in itertools.product(
            ("none", "dots", "minimal", "full"), (False, True), (None, 2048), (2, 4, 8)
        )
        if gibibytes(*settings) <= 8
    ]
    assert best.roofline.scheduled_secs == min(possible)
    config.update_from_flattened_dict(changes)
    assert pretended(config, topology).roofline == best.roofline
    assert len(capsys.readouterr().out.splitlines()) == 7 + 1 + 2


@pytest.mark.parametrize(
    "num_devices, set_keys, batch_size, fsdp",
    [
        (256, (), 65_536, 8),
        (4, (), 1024, 4),
        (1, (), 256, 1),
        (4, ("data.batch_size", "mesh.fsdp"), 65_536, 8),
    ],
)
def test_a_small_slice_takes_its_part_of_the_recipes_batch(num_devices, set_keys, batch_size, fsdp):
    config = load_recipe(REPOSITORY / "configs" / "diht_vitb16.py")  # for 256 devices
    scaled, _ = for_fewer_devices(config, num_devices, set_keys)
    assert (scaled.data.batch_size, scaled.mesh.fsdp) == (batch_size, fsdp)


def test_flags_of_a_small_slice_make_the_config_that_was_compiled():
    config = load_recipe(REPOSITORY / "configs" / "diht_vitb16.py")
    config.micro_batch = 16_384
    scaled, changes = for_fewer_devices(config, 4, ())
    settings = dict(flag.removeprefix("--config.").split("=") for flag in changes)
    assert settings.pop("micro_batch") == "256"
    config.update_from_flattened_dict({name: int(value) for name, value in settings.items()})
    config.micro_batch = 256
    assert scaled.to_dict() == config.to_dict()


def test_a_warm_up_longer_than_any_epoch_is_no_error():
    """The data set is unknown here; the micro-batch is checked after the schedule."""
    config = recipe("clip_vitb32", total_steps=None, total_epochs=1.0, micro_batch=3)
    config.mesh.fsdp = 1
    config.optimizer.update(warmup_steps=2000, schedule="wsd", decay_steps=3000)
    with pytest.raises(ValueError, match="config.micro_batch=3: expected"):
        compile_step(config, get_topology("local"))


def test_command_says_out_of_memory_and_what_would_fit_and_exits_with_one(
    monkeypatch, capsys, local
):
    """Half of the batch fits, or the whole batch with more rematerialisation."""

    def pretended(candidate, topology):
        batch_size, remat = candidate.data.batch_size, candidate.model.remat
        fits = (batch_size, remat) != (16, "none")
        changes = {"batch_size": batch_size, "remat": remat, "micro_batch": candidate.micro_batch}
        return dataclasses.replace(local[1], fits=fits, **changes)

    monkeypatch.setattr(compile_command, "compile_step", pretended)
    arguments = ["--topology=local", "--config=clip_vitb32:debug=True"]
    with pytest.raises(SystemExit) as ended:
        parse_command("diht_jax.compile", arguments, lambda _: compile_command.main())
    assert ended.value.code == 1
    printed = capsys.readouterr().out
    assert "OUT OF MEMORY: needs" in printed
    found = [line for line in printed.splitlines() if line.startswith("what fits: ")]
    batch = "what fits: --config.data.batch_size=8 --config.micro_batch=None"
    policy = "what fits: --config.model.remat=dots --config.micro_batch=None"
    assert found == [batch, policy]


@needs_cuda
def test_the_step_is_compiled_with_the_attention_that_a_gpu_runs():
    config = recipe("diht_vitb16", **{"data.batch_size": 64, "mesh.fsdp": 1})
    config.model.dtype = "bfloat16"
    report = compile_step(config, get_topology("h100:8"))
    assert report.attention == {"vision": "cudnn", "text": "cudnn"}
    assert "cudnn (vision), cudnn (text)" in describe_step(report)


POD = Topology("v5e:16x16", find_chip("v5e"), (16, 16), (None,) * 256, 16 * GIB)


@pytest.fixture
def roofline(local):
    """The bounds of a step on a pod, from its traffic; half of its products count as useful."""

    def bounds(traffic):
        flops = {"flops": 197 * 10**12, "model_flops": 98_500_000_000_000}
        return dataclasses.replace(local[1], topology=POD, traffic=traffic, **flops).roofline

    return bounds


def test_roofline_by_hand(roofline):
    collectives = (
        Collective("all-reduce", 256, 1, 0, 200 * 10**9, span=256),  # all 4 links: 1 s
        Collective("all-gather", 8, 1, 0, 50 * 10**9, span=8),  # 2 links: 0.5 s
        Collective("collective-permute", 2, 1, 0, 5 * 10**9, span=256),  # 1 link: 0.1 s
    )
    estimate = roofline(Traffic(409_500_000_000, collectives, 0))
    assert estimate.compute_secs == pytest.approx(1.0)
    assert estimate.memory_secs == pytest.approx(0.5)
    assert estimate.network_secs == pytest.approx(1.6)
    assert estimate.latency_secs == pytest.approx(3e-6)  # three collectives
    assert estimate.step_secs == pytest.approx(1.600003, rel=1e-9)
    assert estimate.mfu == pytest.approx(0.5 / 1.600003)


def test_the_reported_bound_is_that_of_the_program_in_order(roofline):
    ring = Collective("collective-permute", 2, 1, 0, 50 * 10**9, span=256)
    work = (
        Work("products", memory_bytes=819 * 10**9, cycles=int(1.5 * POD.chip.clock_hz)),  # 1.5 s
        Work("element-wise", memory_bytes=819 * 10**9),  # 1 s
        Work("collectives", collective=ring),
    )
    estimate = roofline(Traffic(0, (), 0, work=work))
    assert estimate.scheduled_secs == pytest.approx(1.5 + 1 + 1 + 1e-6)
    assert estimate.scheduled_mfu == pytest.approx(0.5 / 3.500001)


@pytest.mark.parametrize(
    "kind, size, span, gb_per_sec",
    [
        ("collective-permute", 2, 32, 50),  # one ring of all GPUs
        ("collective-permute", 2, 8, 450),  # a ring of the GPUs of one host
        ("all-reduce", 32, 32, 400),  # eight network cards for the eight GPUs of a host
        ("all-reduce", 4, 25, 50),  # along `data` with fsdp=8: one GPU of each host
        ("all-reduce", 8, 29, 100),  # along `data` with fsdp=4: two GPUs of each host
    ],
)
def test_links_inside_and_between_gpu_hosts(kind, size, span, gb_per_sec):
    collective = Collective(kind, size, 1, 0, 0, span=span)
    assert link_bandwidth(gpus(4, 8), collective) == gb_per_sec * 1e9


def gpus(*shape):
    devices = (types.SimpleNamespace(device_kind="NVIDIA H100"),) * math.prod(shape)
    return Topology("h100", find_chip("h100"), shape, devices, 60 * GIB)


def test_eight_gpus_that_take_55_000_images_need_39_to_68_cores():
    lines = describe_input(gpus(8), 55_000)
    # 55,000 / 1,438.9 = 38.2; / 980.2 = 56.1; / 810.4 = 67.9
    assert "39 (384 px), 57 (512 px), 68 (256 to 1024 px)" in "\n".join(lines)
    assert any("55,000" in line for line in lines)


def test_hosts_of_a_slice_are_those_of_its_devices():
    devices = tuple(types.SimpleNamespace(process_index=i // 4) for i in range(256))
    assert num_hosts(Topology("v5e:16x16", find_chip("v5e"), (16, 16), devices, 16 * GIB)) == 64
