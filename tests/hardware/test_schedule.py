"""Lower bound on the time of a scheduled program, and kernel cycles, against hand-made sums."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from diht_jax.hardware.chips import Chip, count_flops
from diht_jax.hardware.hlo_traffic import Collective, Work, count_traffic, flatten, tpu_kernels
from diht_jax.hardware.schedule import (
    count_cycles,
    read_cycles,
    read_kernels,
    scheduled_secs,
)
from diht_jax.hardware.topologies import get_topology
from tests.compiling import needs_libtpu

# One byte, one cycle and one float32 FLOP a second; ten FLOPs a second of other types. The seconds
# of a collective equal its sent bytes.
GPU = Chip("gpu", "", 10.0, 0, 1.0, 0.0, float32_flops=1.0)
TPU = dataclasses.replace(GPU, clock_hz=1.0)


def transfer(size):
    return Collective("all-gather", 8, 1, size, size, span=8)


def seconds(work, chip=TPU):
    return scheduled_secs(work, chip, lambda row: float(row.sent_bytes))


def total(*work, chip=TPU):
    return sum(seconds(work, chip).values())


def test_float32_products_have_a_rate_of_their_own():
    assert total(Work("products", flops=30, float32_flops=7), chip=GPU) == 3 + 7


@pytest.mark.parametrize(
    "between, exposed",
    [
        (Work("products", memory_bytes=1, cycles=9), 0),  # memory is free for 8 of 9 seconds
        (Work("products", memory_bytes=9, cycles=9), 6),  # memory is never free
        (Work("products", memory_bytes=5, cycles=9), 2),
        (Work("loop", body=(Work("kernels", 1, 2),), trips=4), 2),
    ],
)
def test_a_copy_takes_the_memory_s_time_that_is_left(between, exposed):
    start, done = Work("copies", memory_bytes=6, starts="c"), Work("copies", waits_for="c")
    assert total(start, between, done) == total(between) + exposed


def test_copies_wait_for_those_before_them():
    first = Work("copies", memory_bytes=4, starts="first")
    second = Work("copies", memory_bytes=3, starts="second")
    between = Work("kernels", cycles=5)
    assert total(first, second, between, Work("copies", waits_for="second")) == 5 + 2


def test_a_collective_goes_on_under_memory_traffic():
    start = Work("collectives", collective=transfer(7), starts="g")
    done = Work("collectives", waits_for="g")
    assert total(start, Work("element-wise", memory_bytes=5), done) == 5 + 2
    assert total(Work("collectives", collective=transfer(7)), Work("element-wise", 5)) == 12


# Three layers: a product of 40 cycles overlapping a read of 30 bytes, then a kernel.
PROGRAM = """\
HloModule layers, is_scheduled=true, num_partitions=1

%product (a: f32[2,2], b: f32[2,2]) -> f32[2,2] {
  %a = f32[2,2]{1,0} parameter(0)
  %b = f32[2,2]{1,0} parameter(1)
  ROOT %c = f32[2,2]{1,0:S(1)} convolution(%a, %b), dim_labels=bf_io->bf
}

%body (s: (s32[], f32[2,2], f32[8,5])) -> (s32[], f32[2,2], f32[8,5]) {
  %s = (s32[], f32[2,2]{1,0}, f32[8,5]{1,0}) parameter(0)
  %i = s32[]{:S(2)} get-tuple-element(%s), index=0
  %x = f32[2,2]{1,0:S(1)} get-tuple-element(%s), index=1
  %w = f32[8,5]{1,0} get-tuple-element(%s), index=2
  %go = ((f32[8,5]{1,0}), f32[4,5]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%w), slice={[0:4], [0:5]}
  %y = f32[2,2]{1,0:S(1)} fusion(%x, %x), kind=kOutput, calls=%product, \
backend_config={"window_config":{"estimated_cycles":"40"}}
  %come = f32[4,5]{1,0:S(1)} slice-done(%go)
  %z = f32[2,2]{1,0:S(1)} custom-call(%y, %come), custom_call_target="tpu_custom_call"
  ROOT %t = (s32[], f32[2,2]{1,0}, f32[8,5]{1,0}) tuple(%i, %z, %w)
}

%condition (u: (s32[], f32[2,2], f32[8,5])) -> pred[] {
  %u = (s32[], f32[2,2]{1,0}, f32[8,5]{1,0}) parameter(0)
  ROOT %p = pred[]{:S(2)} custom-call(%u), custom_call_target="AllocateBuffer"
}

ENTRY %main (p0: (s32[], f32[2,2], f32[8,5])) -> (s32[], f32[2,2], f32[8,5]) {
  %p0 = (s32[], f32[2,2]{1,0}, f32[8,5]{1,0}) parameter(0)
  ROOT %loop = (s32[], f32[2,2]{1,0}, f32[8,5]{1,0}) while(%p0), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_work_is_read_from_a_program():
    assert tpu_kernels(PROGRAM) == ["z"]
    traffic = count_traffic(PROGRAM, {"z": 11})
    # Half of the 160-byte array is read and the rest stays in fast memory: 40 of the 80 seconds
    # overlap with the product.
    assert traffic.memory_bytes == 3 * 80
    secs = seconds(traffic.work)
    assert secs == {"products": 3 * 40, "copies": 3 * 40, "kernels": 3 * 11}
    assert traffic.unknown_kernels == 0 and count_traffic(PROGRAM).unknown_kernels == 1


def test_products_of_a_gpu_are_counted_from_their_shapes():
    text = """\
HloModule gpu

ENTRY %main (q: bf16[2,5,3,4], x: f32[6,4]) -> f32[6,6] {
  %q = bf16[2,5,3,4]{3,2,1,0} parameter(0)
  %x = f32[6,4]{1,0} parameter(1)
  %a = (bf16[2,5,3,4]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":\
{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "3", "5", "5"]}}}
  %i = bf16[2,8,8,3]{3,2,1,0} parameter(2)
  %k = bf16[4,8,8,3]{3,2,1,0} parameter(3)
  %c = (bf16[2,1,1,4]{3,2,1,0}, u8[0]{0}) custom-call(%i, %k), window={size=8x8 stride=8x8}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %o = bf16[2,1,1,4]{3,2,1,0} parameter(4)
  %f = (bf16[4,8,8,3]{3,2,1,0}, u8[0]{0}) custom-call(%i, %o), window={size=8x8 stride=8x8}, \
dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %g = (f32[6,6]{1,0}, s8[9]{0}) custom-call(%x, %x), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]\
},"precision_config":{"operand_precision":["HIGHEST","HIGHEST"]}}}
  ROOT %d = f32[6,6]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""
    attention, convolution, of_filter, full, plain = count_traffic(text).work
    assert (attention.kind, attention.flops) == ("kernels", 2 * 2 * (2 * 3 * 5 * 5) * 4)
    assert convolution.flops == of_filter.flops == 2 * (2 * 4) * (8 * 8 * 3)
    assert (full.flops, full.float32_flops) == (0, 2 * 6 * 6 * 4)
    assert (plain.flops, plain.float32_flops) == (2 * 6 * 6 * 4, 0)


def test_products_of_a_compiled_program_are_those_of_its_jaxpr():
    def layers(x, weights):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)
        return jnp.dot(y, y.T, precision=jax.lax.Precision.HIGHEST).sum()

    gradients = jax.grad(layers, argnums=(0, 1))
    shapes = (64, 32), (5, 32, 32)
    x, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
    work = count_traffic(jax.jit(gradients).lower(x, weights).compile().as_text()).work
    full = sum(times * item.float32_flops for times, item in flatten(work))
    rest = sum(times * item.flops for times, item in flatten(work))
    # The logits and the products of their gradients with both sides, of 64 x 64 x 32 each, and for
    # each layer a product forward and two backward; those of the logits' value are not needed.
    assert full + rest == count_flops(gradients, x, weights)
    assert rest == 5 * 3 * 2 * 64 * 32 * 32


# Three bundles; a pipelined loop of seven windows, hence nine trips, with five bundles and an inner
# loop of four trips with three bundles, the last of them after the branch; one bundle.
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


@needs_libtpu
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
    # 100 more trips of 20 steps each: the cost of the trips alone.
    inner = (long - few) / 20 / 100
    assert 2 <= inner < 20 and inner == int(inner)
    assert many - few > 20 * 100 * inner
    assert many - few < 20 * (100 * inner + 100)
