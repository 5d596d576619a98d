"""Bundles of kernels, counted by hand in texts of the TPU compiler's form."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from diht_jax.hardware.hlo_traffic import tpu_kernels
from diht_jax.hardware.kernel_cycles import count_cycles, read_cycles, read_kernels
from diht_jax.hardware.topologies import get_topology

# Three bundles; a pipelined loop of seven windows, hence nine trips, of five bundles and an inner
# loop of four trips with three bundles, the last one after its branch; one bundle.
KERNEL = """\
LB: loop body

     0   :  { %6 = vsyncpa [#allocation3], 0 }
   0x1   :  { %s38_s6 = smov 0  ;;  %s39_s9 = smov 0 }
   0x2   :  {}
   0x3 LB: > { %s40_s11 = sadd.s32 1, %s36_s9  ;;  %s36_s9 = sphi %s39_s9, %s40_s11 }
   0x4   : > { %24 = dma.hbm_to_vmem [thread:$0] /*
base_bounds: (35, 1, 1)
iteration_bounds: (7, 1)
 */ }
   0x5 LB: >> { %s14_s23 = sadd.s32 1, %s37_s23  ;;  %s37_s23 = sphi %s38_s6, %s14_s23 }
   0x6   : >> { %p14_p7 = scmp.ge.s32.totalorder %s14_s23, 4 /* loop exit test */ }
   0x7   : > { %145 = sbr.rel (!%p14_p7) target = $region73 }
   0x8   :  {}
   0x9   : >> { %153 = vst [vmem:[%s15_s15] sm:$0xff] /*vst_source=*/%v293_v2 }
   0xa PF: > { %p11_p8 = scmp.ge.s32.totalorder %s40_s11, 9 /* loop exit test */ }
   0xb   : > { %13 = sbr.rel (!%p11_p8) target = $region84 }
   0xc   :  {}
   0xd   :  { %176 = vsyncpa [#allocation3], 1 }
"""


def test_bundles_count_as_often_as_their_loops_run():
    inner = 4 * 5  # 0x5 to 0x9
    assert count_cycles(KERNEL) == 3 + 7 * (5 + inner) + 1


def test_a_loop_without_windows_runs_until_its_exit_test():
    text = KERNEL.replace("iteration_bounds: (7, 1)\n", "")
    assert count_cycles(text) == 3 + 9 * (5 + 4 * 5) + 1


@pytest.mark.parametrize("line", ["%p14_p7 = scmp.ge", "%145 = sbr.rel"])
def test_a_loop_of_unknown_length_gives_no_count(line):
    assert count_cycles(KERNEL.replace(line, "%x = other")) is None


def test_equal_kernels_are_compiled_once(tmp_path):
    (tmp_path / "17-attention.3-01-final_bundles.txt").write_text(KERNEL)
    (tmp_path / "17-attention.3-00-schedule-analysis_final_bundles.txt").write_text("analysis")
    same = "key:attention.3\nequivalent_hlos[size=2]:\n  attention.3\n  attention.5\nkey:other\n"
    (tmp_path / "16-TLP-00-deduplication-map.txt").write_text(same)
    expected = count_cycles(KERNEL)
    found = read_cycles(tmp_path, ["attention.3", "attention.5", "attention.7"])
    assert found == {"attention.3": expected, "attention.5": expected}


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the TPU compiler is absent: pip install 'jax[tpu]'",
)
def test_cycles_of_a_compiled_kernel_grow_with_its_loops():
    device = get_topology("v5e:1x1").devices[0]

    def cycles(steps, trips):
        def kernel(source, target):
            def square(i, carry):
                target[i] = source[i] * source[i]
                return carry

            jax.lax.fori_loop(0, trips, square, 0)

        block = pl.BlockSpec((trips, 8, 128), lambda i: (i, 0, 0))
        sharding = jax.sharding.SingleDeviceSharding(device)
        shape = jax.ShapeDtypeStruct((steps * trips, 8, 128), jnp.float32, sharding=sharding)
        run = pl.pallas_call(kernel, shape, grid=(steps,), in_specs=[block], out_specs=block)
        text = jax.jit(run).lower(shape).compile().as_text()
        (found,) = read_kernels(tpu_kernels(text)).values()
        return found

    few, many, long = cycles(20, 100), cycles(40, 100), cycles(20, 200)
    # Of 100 trips more, each of 20 steps: the trips alone.
    inner = (long - few) / 20 / 100
    assert 2 <= inner < 20 and inner == int(inner)
    assert many - few > 20 * 100 * inner
    assert many - few < 20 * (100 * inner + 100)
