"""Tests of the parser of compiled programs, on a program written by hand."""

from madformer_jax.cost import hlo

HLO = """HloModule step

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body.2 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %all-gather-start.1 = (bf16[2,16]{1,0}, bf16[8,16]{1,0:T(8,128)(2,1)}) all-gather-start(%x), channel_id=1, dimensions={0}
  %all-gather-done.1 = bf16[8,16]{1,0} all-gather-done(%all-gather-start.1)
}

%condition.3 (p: (s32[], bf16[8,16])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body.3 (p: (u32[], f32[4])) -> (u32[], f32[4]) {
  %collective-permute.1 = f32[4]{0} collective-permute(%y), channel_id=3, source_target_pairs={{0,1},{1,0}}
}

%condition.4 (p: (u32[], f32[4])) -> pred[] {
  %constant.3 = u32[]{:T(128)} constant(7)
  ROOT %lt.1 = pred[]{:T(512)} compare(%i, %constant.3), direction=LT
}

ENTRY %main.4 (x: bf16[8,16]) -> f32[] {
  %while.1 = (s32[], bf16[8,16]) while(%t), condition=%condition.3, body=%body.2, backend_config={"known_trip_count":{"n":"5"}}
  %while.2 = (u32[]{:T(128)}, f32[4]{0}) while(%u), condition=%condition.4, body=%body.3
  ROOT %all-reduce.1 = f32[100]{0} all-reduce(%y), channel_id=2, to_apply=%region_0.1
}
"""


def test_collectives_in_loops_count_once_per_iteration():
    gather, permute, reduce = hlo.collectives(HLO)
    assert gather == hlo.Collective("all-gather", (8, 16), 256, 5, True, overlaps=True)
    assert gather.moved == 1280
    assert permute == hlo.Collective("collective-permute", (4,), 16, 7, True)  # a loop as TPU programs have it
    assert reduce == hlo.Collective("all-reduce", (100,), 400, 1, False)


def test_an_asynchronous_collective_counts_once():
    """On a TPU one fusion begins a collective and another ends it. Others compute in between.

    One collective may move several arrays.
    """
    text = """
%begin (a: bf16[2,16]) -> bf16[8,16] {
  %x1 = bf16[8,16]{1,0} all-gather(%a), channel_id=5, dimensions={0}
  ROOT %c = bf16[8,16]{1,0} custom-call(%x1), custom_call_target="AsyncCollectiveStart"
}
%end (a: bf16[2,16]) -> bf16[8,16] {
  %x2 = bf16[8,16]{1,0} all-gather(%a), channel_id=5, dimensions={0}
}
ENTRY %main (a: bf16[2,16]) -> bf16[8,16] {
  %f1 = bf16[8,16]{1,0} fusion(%a), kind=kCustom, calls=%begin
  %f2 = bf16[8,16]{1,0} fusion(%f1), kind=kCustom, calls=%end
  ROOT %r = (f32[4]{0}, f32[6]{0}) all-reduce(%p, %q), channel_id=6, to_apply=%add
}
"""
    assert hlo.collectives(text) == [
        hlo.Collective("all-gather", (8, 16), 256, 1, False, overlaps=True),
        hlo.Collective("all-reduce", (6,), 40, 1, False),
    ]
