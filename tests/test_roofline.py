"""What benchmarks/roofline.py reads in the text of a program, against numbers worked out by hand."""

import pytest

from benchmarks import roofline

# A stack of 3 weights of 1024 x 2048, once copied a layer at a time and once read in place, by 7 tokens (no count known)
# and 3 layers; attention of cuDNN; a product of groups in Triton; a buffer that is updated in place; two branches.
PROGRAM = """
HloModule jit_f, is_scheduled=true

%copying (p0: bf16[3,1024,2048], p1: s32[]) -> bf16[1,1024,2048] {
  %p0 = bf16[3,1024,2048]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = s32[] constant(1)
  %at = s32[] add(%p1, %one)
  ROOT %slice = bf16[1,1024,2048]{2,1,0} dynamic-slice(%p0, %at, %zero, %zero), dynamic_slice_sizes={1,1024,2048}
}

%in_place (q0: bf16[3,1024,2048], q1: s32[], q2: bf16[16,1024]) -> (bf16[16,2048], s8[4194304]) {
  %q2 = bf16[16,1024]{1,0} parameter(2)
  %q0 = bf16[3,1024,2048]{2,1,0} parameter(0)
  %q1 = s32[] parameter(1)
  %zero.1 = s32[] constant(0)
  %slice.1 = bf16[1,1024,2048]{2,1,0} dynamic-slice(%q0, %q1, %zero.1, %zero.1), dynamic_slice_sizes={1,1024,2048}
  %view = bf16[1024,2048]{1,0} bitcast(%slice.1)
  ROOT %product = (bf16[16,2048]{1,0}, s8[4194304]{0}) custom-call(%q2, %view), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
}

%updating (r0: f32[64,512], r1: f32[1,512], r2: s32[]) -> f32[64,512] {
  %r0 = f32[64,512]{1,0} parameter(0)
  %r1 = f32[1,512]{1,0} parameter(1)
  %r2 = s32[] parameter(2)
  %zero.2 = s32[] constant(0)
  ROOT %update = f32[64,512]{1,0} dynamic-update-slice(%r0, %r1, %r2, %zero.2)
}

%layer (c0: (s32[], bf16[3,1024,2048], bf16[16,1024], f32[64,512], f32[1,512])) -> (s32[], bf16[3,1024,2048], bf16[16,1024], f32[64,512], f32[1,512]) {
  %c0 = (s32[], bf16[3,1024,2048]{2,1,0}, bf16[16,1024]{1,0}, f32[64,512]{1,0}, f32[1,512]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c0), index=0
  %w = bf16[3,1024,2048]{2,1,0} get-tuple-element(%c0), index=1
  %x = bf16[16,1024]{1,0} get-tuple-element(%c0), index=2
  %kept = f32[64,512]{1,0} get-tuple-element(%c0), index=3
  %new = f32[1,512]{1,0} get-tuple-element(%c0), index=4
  %copied = bf16[1,1024,2048]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%copying, metadata={op_name="jit(f)/decode/copy"}
  %read = (bf16[16,2048]{1,0}, s8[4194304]{0}) fusion(%w, %i, %x), kind=kCustom, calls=%in_place, control-predecessors={%copied}
  %written = f32[64,512]{1,0} fusion(%kept, %new, %i), kind=kLoop, calls=%updating
  ROOT %c1 = (s32[], bf16[3,1024,2048]{2,1,0}, bf16[16,1024]{1,0}, f32[64,512]{1,0}, f32[1,512]{1,0}) tuple(%i, %w, %x, %written, %new)
}

%token (d0: (s32[], bf16[3,1024,2048], bf16[16,1024], f32[64,512], f32[1,512])) -> (s32[], bf16[3,1024,2048], bf16[16,1024], f32[64,512], f32[1,512]) {
  %d0 = (s32[], bf16[3,1024,2048]{2,1,0}, bf16[16,1024]{1,0}, f32[64,512]{1,0}, f32[1,512]{1,0}) parameter(0)
  ROOT %layers = (s32[], bf16[3,1024,2048]{2,1,0}, bf16[16,1024]{1,0}, f32[64,512]{1,0}, f32[1,512]{1,0}) while(%d0), condition=%less, body=%layer, backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}
}

%less (g0: (s32[], f32[4])) -> pred[] {
  %g0 = (s32[], f32[4]{0}) parameter(0)
  %end = s32[]{:T(128)} constant(9)
  %at.1 = s32[] get-tuple-element(%g0), index=0
  ROOT %lt = pred[] compare(%at.1, %end), direction=LT
}

%nothing (e0: f32[64,512]) -> f32[64,512] {
  ROOT %e0 = f32[64,512]{1,0} parameter(0)
}

%half (f0: f32[64,512]) -> f32[64,512] {
  %f0 = f32[64,512]{1,0} parameter(0)
  ROOT %turned = f32[64,512]{0,1} copy(%f0)
}

ENTRY %main (a: bf16[3,1024,2048], b: bf16[16,1024], c: f32[64,512], d: f32[1,512], q: bf16[2,8,6,64], k: bf16[2,32,2,64], rows: bf16[40,96], stack: bf16[3,5,96,128], sizes: s32[9], on: pred[]) -> f32[64,512] {
  %a = bf16[3,1024,2048]{2,1,0} parameter(0), metadata={op_name="base.blocks.w"}
  %b = bf16[16,1024]{1,0} parameter(1)
  %c = f32[64,512]{1,0} parameter(2)
  %d = f32[1,512]{1,0} parameter(3)
  %q = bf16[2,8,6,64]{3,2,1,0} parameter(4)
  %k = bf16[2,32,2,64]{3,2,1,0} parameter(5)
  %rows = bf16[40,96]{1,0} parameter(6)
  %stack = bf16[3,5,96,128]{3,2,1,0} parameter(7)
  %sizes = s32[9]{0} parameter(8)
  %on = pred[] parameter(9)
  %start = s32[] constant(0)
  %carry = (s32[], bf16[3,1024,2048]{2,1,0}, bf16[16,1024]{1,0}, f32[64,512]{1,0}, f32[1,512]{1,0}) tuple(%start, %a, %b, %c, %d)
  %tokens = (s32[], bf16[3,1024,2048]{2,1,0}, bf16[16,1024]{1,0}, f32[64,512]{1,0}, f32[1,512]{1,0}) while(%carry), condition=%ended, body=%token
  %result = f32[64,512]{1,0} get-tuple-element(%tokens), index=3
  %attention = (bf16[2,6,8,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":{"mask_type":"CAUSAL","sliding_window_length":3,"bmm1_dot_dimension_numbers":{"lhs_contracting_dimensions":["3"]}}}
  %grouped = bf16[40,128]{1,0} custom-call(%rows, %stack, %sizes), custom_call_target="__gpu$xla.gpu.triton"
  %other = bf16[40,96]{1,0} custom-call(%rows), custom_call_target="__gpu$xla.gpu.triton"
  %summed-start = f32[64,512]{1,0} all-reduce-start(%c), replica_groups={{0,1,2,3}}, to_apply=%add
  %summed = f32[64,512]{1,0} all-reduce-done(%summed-start)
  %gathered = f32[64,512]{1,0} all-gather(%d), replica_groups=mesh['data'=4,'model'=2] {'data'}, dimensions={0}
  ROOT %either = f32[64,512]{1,0} conditional(%on, %result, %result), true_computation=%half, false_computation=%nothing
}
"""
LAYER = 2 * 1024 * 2048
TOKENS = 7


@pytest.fixture(scope='module')
def found():
    return {k.name: k for k in roofline.kernels(PROGRAM, trips=TOKENS)}


def test_loops_are_multiplied_out_and_an_unknown_count_is_the_one_given(found):
    assert {n: (k.times, k.loops) for n, k in found.items() if k.loops} == {
        'copied': (21, (7, 3)),
        'read': (21, (7, 3)),
        'written': (21, (7, 3)),
    }
    assert found['attention'].times == 1
    assert roofline.kernels(PROGRAM, trips=1)[0].times == 3


def test_a_count_that_is_not_noted_stands_in_the_condition():
    noted = ', backend_config={"known_trip_count":{"n":"3"},"known_init_step":{"init":"0","step":"1"}}'
    assert roofline.kernels(PROGRAM.replace(noted, ''), trips=TOKENS)[0].loops == (7, 9)
    begun = (
        PROGRAM.replace(noted, '')
        .replace('while(%d0), condition=%less', 'while(%carry.1), condition=%less')
        .replace('  ROOT %layers', '  %two = s32[] constant(2)\n  %carry.1 = (s32[]) tuple(%two)\n  ROOT %layers')
    )
    assert roofline.kernels(begun, trips=TOKENS)[0].loops == (7, 7)


def test_bytes_are_those_that_a_kernel_touches(found):
    assert found['copied'].bytes == 2 * LAYER + 4  # a slice of the stack and the copy; the index
    assert found['read'].bytes == LAYER + 4 + 2 * 16 * (1024 + 2048)  # no workspace of 4 MB
    assert found['written'].bytes == 2 * 512 * 4 + 4  # a row of the buffer
    assert found['turned'].bytes == 2 * 64 * 512 * 4


def test_flops_of_libraries_come_from_the_shapes(found):
    assert found['read'].flops == 2 * 16 * 1024 * 2048
    # 8 queries at the end of 32 positions, each sees 3 keys; 6 heads of 64 in 2 rows; two products
    assert found['attention'].flops == 2 * 2 * (2 * 6 * 64) * (8 * 3)
    # 40 rows in 9 tiles at most, so of 8 rows; the last of each of 5 groups half empty; of 3 layers one is read
    assert found['grouped'].flops == 2 * (40 + 5 * 8 / 2) * 96 * 128
    assert found['grouped'].bytes == 2 * (40 * 96 + 5 * 96 * 128 + 40 * 128) + 4 * 9
    assert [n for n, k in found.items() if k.unknown] == ['other']


def test_attention_without_a_window_counts_half():
    whole = PROGRAM.replace('"sliding_window_length":3', '"sliding_window_length":0').replace(
        '[2,32,2,64]', '[2,8,2,64]'
    )
    kernels = {k.name: k for k in roofline.kernels(whole)}
    assert kernels['attention'].flops == 2 * 2 * (2 * 6 * 64) * (8 * 9 / 2)
    backward = whole.replace('fmhaSoftmax', 'fmhaSoftmaxBackward')
    assert {k.name: k for k in roofline.kernels(backward)}['attention'].flops == 2.5 * kernels['attention'].flops


def test_copies_of_weights_are_those_that_do_nothing_else(found):
    assert {n: k.copied for n, k in found.items() if k.copied} == {'copied': LAYER}
    cast = PROGRAM.replace('ROOT %slice = bf16', '%slice = bf16').replace(
        'dynamic_slice_sizes={1,1024,2048}\n}',
        'dynamic_slice_sizes={1,1024,2048}\n  ROOT %more = bf16[1,1024,2048]{2,1,0} negate(%slice)\n}',
        1,
    )
    assert not [k for k in roofline.kernels(cast) if k.copied]


def test_a_branch_that_launches_nothing_does_not_halve_the_other(found):
    assert found['turned'].times == 1
    both = PROGRAM.replace('false_computation=%nothing', 'false_computation=%half')
    assert [k.times for k in roofline.kernels(both) if k.name == 'turned'] == [0.5, 0.5]


def test_the_roof_is_the_sum_of_the_longer_of_both_times(found):
    k = found['copied']
    assert k.seconds == pytest.approx(21 * k.bytes / 3e12)
    heavy = k._replace(flops=1e12)
    assert heavy.seconds == pytest.approx(21 * 1e12 / 650e12)
    shown = roofline.summary(list(found.values()))
    assert shown['roof_ms'] == pytest.approx(1e3 * sum(k.seconds for k in found.values()))
    assert (shown['copies'], shown['copied_gb']) == (21, 21 * LAYER / 1e9)
    assert 'copy of weights' in roofline.most_expensive(list(found.values()), 1)[0]


def test_collectives_say_what_a_device_sends():
    assert roofline.by_kind(roofline.collectives(PROGRAM)) == {
        'all-reduce': (1, 2 * 3 / 4 * 64 * 512 * 4),
        'all-gather': (1, 3 / 4 * 64 * 512 * 4),
    }


def test_a_collective_of_several_kernels_counts_once():
    """As a TPU has them: a gather in steps beside other work, and a sum of which each device keeps its part."""
    text = """
%step (h0: bf16[8,128]) -> bf16[32,128] {
  %h0 = bf16[8,128]{1,0} parameter(0)
  ROOT %gather = bf16[32,128]{1,0} all-gather(%h0), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

%all-reduce-scatter.1 (i0: f32[64,128]) -> f32[16,128] {
  %i0 = f32[64,128]{1,0} parameter(0)
  %sum = f32[64,128]{1,0} all-reduce(%i0), channel_id=6, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  %start = s32[] constant(0)
  ROOT %part = f32[16,128]{1,0} dynamic-slice(%sum, %start, %start), dynamic_slice_sizes={16,128}
}

ENTRY %main (a: bf16[8,128], b: f32[64,128]) -> f32[16,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  %b = f32[64,128]{1,0} parameter(1)
  %first = bf16[32,128]{1,0} fusion(%a), kind=kCustom, calls=%step
  %second = bf16[32,128]{1,0} fusion(%a), kind=kCustom, calls=%step
  %alone = f32[64,128]{1,0} all-reduce(%b), channel_id=7, replica_groups={{0},{1}}, to_apply=%add
  ROOT %kept = f32[16,128]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    sent = {'all-gather': (1, 3 / 4 * 32 * 128 * 2), 'reduce-scatter': (1, 3 / 4 * 64 * 128 * 4)}
    assert roofline.by_kind(roofline.collectives(text)) == sent
