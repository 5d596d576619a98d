"""Traffic counted from HLO, against hand-written programs and XLA's own count."""

import jax
import jax.numpy as jnp
import pytest

from diht_jax.hardware.hlo_traffic import Collective, count_traffic

# A ring of 3 trips over 4 devices, a sum over all, and a gather over pairs.
RING = """\
HloModule ring, is_scheduled=true, num_partitions=4

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%body (state: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %state = (s32[], bf16[128,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %x = bf16[128,64]{1,0} get-tuple-element(%state), index=1
  %start = (bf16[128,64]{1,0}, bf16[128,64]{1,0}, u32[], u32[]) collective-permute-start(%x), \
channel_id=1, source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %next = s32[] add(%i, %one)
  %done = bf16[128,64]{1,0} collective-permute-done(%start)
  ROOT %out = (s32[], bf16[128,64]{1,0}) tuple(%next, %done)
}

%condition (state.1: (s32[], bf16[128,64])) -> pred[] {
  %state.1 = (s32[], bf16[128,64]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %go = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: bf16[128,64], q: f32[10,10]) -> (bf16[128,64], f32[10,10], f32[20,10]) {
  %p = bf16[128,64]{1,0} parameter(0)
  %q = f32[10,10]{1,0} parameter(1)
  %zero = s32[] constant(2)
  %initial = (s32[], bf16[128,64]{1,0}) tuple(%zero, %p)
  %loop = (s32[], bf16[128,64]{1,0}) while(%initial), condition=%condition, body=%body
  %r = bf16[128,64]{1,0} get-tuple-element(%loop), index=1
  %sum = f32[10,10]{1,0} all-reduce(%q), replica_groups=GROUPS, to_apply=%add
  %pair = f32[20,10]{1,0} all-gather(%q), replica_groups=[2,2]<=[4], dimensions={0}
  ROOT %result = (bf16[128,64]{1,0}, f32[10,10]{1,0}, f32[20,10]{1,0}) tuple(%r, %sum, %pair)
}
"""


@pytest.mark.parametrize(
    "groups",
    ["{{0,1,2,3}}", "{}", "[1,4]<=[4]", "mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a','b'}"],
)
def test_collectives_run_as_often_as_their_loop(groups):
    traffic = count_traffic(RING.replace("LIMIT", "5").replace("GROUPS", groups))
    block = 128 * 64 * 2
    assert traffic.unknown_loops == 0
    assert traffic.collectives == (
        Collective("collective-permute", 2, 3, 3 * block, 3 * block, span=4),
        Collective("all-reduce", 4, 1, 400, 600, span=4),  # 2 (4-1)/4 of it
        Collective("all-gather", 2, 1, 800, 400, span=2),
    )
    assert traffic.sent_bytes == 3 * block + 1000
    # Counts reads and writes of the travelling block, and operand and result of the other two; plus
    # the counter and its comparison, 4 + 4 + 4 and 4 + 4 + 1 bytes.
    assert traffic.memory_bytes == 3 * (2 * block + 12) + 4 * 9 + 800 + 1200


@pytest.mark.parametrize(
    "groups, size, span",
    [
        ("{{0,2},{1,3}}", 2, 3),
        ("[2,2]<=[2,2]T(1,0)", 2, 3),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", 2, 3),
    ],
)
def test_span_of_a_group(groups, size, span):
    traffic = count_traffic(RING.replace("LIMIT", "5").replace("GROUPS", groups))
    found = {row.kind: row for row in traffic.collectives}["all-reduce"]
    assert (found.group_size, found.span) == (size, span)


def test_a_loop_of_unknown_length_is_reported():
    text = RING.replace("GROUPS", "{}").replace("constant(LIMIT)", "parameter(0)")
    traffic = count_traffic(text)
    assert traffic.unknown_loops == 1
    assert traffic.collectives[0].count == 1


def test_slices_of_a_stack_count_as_slices():
    """On each trip, scanned layers read one layer's slice of a stacked array, not the stack."""
    text = """\
HloModule slices

%fused (p0: f32[24,1000], p1: s32[], p2: f32[24,1000]) -> f32[24,1000] {
  %p0 = f32[24,1000]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[24,1000]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %layer = f32[1,1000]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1000}
  %double = f32[1,1000]{1,0} add(%layer, %layer)
  ROOT %updated = f32[24,1000]{1,0} dynamic-update-slice(%p2, %double, %p1, %zero)
}

ENTRY %main (a: f32[24,1000], i: s32[], b: f32[24,1000]) -> f32[24,1000] {
  %a = f32[24,1000]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[24,1000]{1,0} parameter(2)
  ROOT %f = f32[24,1000]{1,0} fusion(%a, %i, %b), kind=kLoop, calls=%fused
}
"""
    assert count_traffic(text).memory_bytes == 4000 + 4 + 4000


def test_what_stays_in_fast_memory_is_no_traffic():
    text = """\
HloModule fast

ENTRY %main (a: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0:T(1024)} parameter(0)
  %b = f32[1000]{0:T(1024)S(1)} add(%a, %a)
  ROOT %c = f32[1000]{0:T(1024)} multiply(%b, %b)
}
"""
    assert count_traffic(text).memory_bytes == 2 * 4000 + 4000


def test_a_chain_of_the_tpu_compiler_is_one_collective():
    """One gather, advanced by two fusions that also compute."""
    step = """\
%step.N (p.N: f32[10,4], d.N: f32[80,4], x.N: f32[6]) -> (f32[6], f32[80,4]) {
  %p.N = f32[10,4]{1,0} parameter(0)
  %d.N = f32[80,4]{1,0} parameter(1)
  %x.N = f32[6]{0} parameter(2)
  %y.N = f32[6]{0} add(%x.N, %x.N)
  %g.N = f32[80,4]{1,0} all-gather(%p.N), replica_groups={}, frontend_attributes={chain_id="0"}
  ROOT %t.N = (f32[6]{0}, f32[80,4]{1,0}) tuple(%y.N, %g.N)
}

"""
    main = """\
ENTRY %main (p: f32[10,4], d: f32[80,4], x: f32[6]) -> (f32[6], f32[80,4]) {
  %p = f32[10,4]{1,0} parameter(0)
  %d = f32[80,4]{1,0} parameter(1)
  %x = f32[6]{0} parameter(2)
  %one = (f32[6]{0}, f32[80,4]{1,0}) fusion(%p, %d, %x), kind=kCustom, calls=%step.1
  %y = f32[6]{0} get-tuple-element(%one), index=0
  %g = f32[80,4]{1,0} get-tuple-element(%one), index=1
  ROOT %two = (f32[6]{0}, f32[80,4]{1,0}) fusion(%p, %g, %y), kind=kCustom, calls=%step.2
}
"""
    steps = "".join(step.replace(".N", f".{number}") for number in (1, 2))
    traffic = count_traffic(f"HloModule chain, num_partitions=8\n\n{steps}{main}")
    assert traffic.collectives == (Collective("all-gather", 8, 1, 1280, 1120, span=8),)
    assert traffic.memory_bytes == 160 + 1280 + 2 * (24 + 24)


def test_memory_traffic_without_loops_is_xla_s_own():
    def layer(x, w):
        return jax.nn.gelu(x @ w)

    def fn(x, w):
        return jax.grad(lambda w: jnp.sum(layer(layer(x, w), w) ** 2))(w)

    x, w = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((512, 256), (256, 256)))
    compiled = jax.jit(fn).lower(x, w).compile()
    expected = compiled.cost_analysis()["bytes accessed"]
    assert count_traffic(compiled.as_text()).memory_bytes == pytest.approx(expected, rel=0.1)
