"""The traffic counter on single operations in the syntax of compiled programs."""

import math
import re

import pytest

from structvit_jax.performance.traffic import count
from structvit_jax.performance.traffic.program import part_of
from structvit_jax.utils.errors import UserError

# Computations that the entry computations below call.
CALLED = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%below (s: (s32[], s32[])) -> pred[] {
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%step (t: (s32[], s32[])) -> (s32[], s32[]) {
  %t = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%t), index=0
  %m = s32[] get-tuple-element(%t), index=1
  %three = s32[] constant(3)
  %next = s32[] add(%j, %three)
  %large = f32[1024]{0:T(1024)} iota(), iota_dimension=0
  %moved = f32[1024]{0:T(1024)} negate(%large)
  ROOT %u = (s32[], s32[]) tuple(%next, %m)
}

%around (o: (s32[], s32[])) -> (s32[], s32[]) {
  %o = (s32[], s32[]) parameter(0)
  %k = s32[] get-tuple-element(%o), index=0
  %l = s32[] get-tuple-element(%o), index=1
  %one = s32[] constant(1)
  %more = s32[] add(%k, %one)
  %v0 = (s32[], s32[]) tuple(%one, %l)
  %v = (s32[], s32[]) while(%v0), condition=%below, body=%step
  ROOT %p = (s32[], s32[]) tuple(%more, %l)
}

%starting (p0: f32[16,100]) -> (f32[16,100], f32[64,100], u32[]) {
  %p0 = f32[16,100]{1,0:T(8,128)} parameter(0)
  %g = f32[64,100]{1,0:T(8,128)} all-gather(%p0), replica_groups=[2,4]<=[8], attributes={chain_id="0"}
  ROOT %h = (f32[16,100]{1,0:T(8,128)}, f32[64,100]{1,0:T(8,128)}, u32[]{:S(2)}) custom-call(%g),\
 custom_call_target="AsyncCollectiveStart"
}

%ending (p1: f32[16,100], p2: f32[64,100], p3: u32[]) -> f32[64,100] {
  %p1 = f32[16,100]{1,0:T(8,128)} parameter(0)
  %p2 = f32[64,100]{1,0:T(8,128)} parameter(1)
  %p3 = u32[]{:S(2)} parameter(2)
  %q = f32[64,100]{1,0:T(8,128)} all-gather(%p1), replica_groups=[2,4]<=[8], attributes={chain_id="0"}
  ROOT %r = f32[64,100]{1,0:T(8,128)} custom-call(%p1, %p2, %q, %p3), custom_call_target="AsyncCollectiveDone"
}

%part (p4: f32[512,1024], p5: s32[]) -> f32[8,1024] {
  %p4 = f32[512,1024]{1,0:T(8,128)} parameter(0)
  %p5 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %double = s32[] add(%p5, %p5)
  ROOT %rows = f32[8,1024]{1,0:T(8,128)} dynamic-slice(%p4, %double, %zero), dynamic_slice_sizes={8,1024}
}

%put (p6: f32[512,1024], p7: f32[8,1024], p8: s32[]) -> f32[512,1024] {
  %p6 = f32[512,1024]{1,0:T(8,128)} parameter(0)
  %p7 = f32[8,1024]{1,0:T(8,128)} parameter(1)
  %p8 = s32[] parameter(2)
  ROOT %all = f32[512,1024]{1,0:T(8,128)} dynamic-update-slice(%p6, %p7, %p8, %p8)
}

%parts (p9: f32[512,1024], p10: s32[], p11: s32[]) -> f32[8,1024] {
  %p9 = f32[512,1024]{1,0:T(8,128)} parameter(0)
  %p10 = s32[] parameter(1)
  %p11 = s32[] parameter(2)
  %a1 = f32[8,1024]{1,0:T(8,128)} fusion(%p9, %p10), kind=kLoop, calls=%part
  %a2 = f32[8,1024]{1,0:T(8,128)} fusion(%p9, %p11), kind=kLoop, calls=%part
  %a3 = f32[8,1024]{1,0:T(8,128)} fusion(%p9, %p11), kind=kLoop, calls=%part
  %a4 = f32[8,1024]{1,0:T(8,128)} add(%a1, %a2)
  ROOT %a5 = f32[8,1024]{1,0:T(8,128)} add(%a4, %a3)
}

%puts (p12: f32[512,1024], p13: f32[8,1024], p14: s32[]) -> f32[512,1024] {
  %p12 = f32[512,1024]{1,0:T(8,128)} parameter(0)
  %p13 = f32[8,1024]{1,0:T(8,128)} parameter(1)
  %p14 = s32[] parameter(2)
  %a6 = f32[512,1024]{1,0:T(8,128)} fusion(%p12, %p13, %p14), kind=kLoop, calls=%put
  ROOT %a7 = f32[512,1024]{1,0:T(8,128)} negate(%a6)
}

%fresh (p15: f32[8,1024], p16: s32[]) -> f32[512,1024] {
  %p15 = f32[8,1024]{1,0:T(8,128)} parameter(0)
  %p16 = s32[] parameter(1)
  %b0 = f32[] constant(0)
  %b1 = f32[512,1024]{1,0:T(8,128)} broadcast(%b0), dimensions={}
  ROOT %b2 = f32[512,1024]{1,0:T(8,128)} dynamic-update-slice(%b1, %p15, %p16, %p16)
}

%pair (c0: f32[], c1: f32[], c2: f32[], c3: f32[]) -> (f32[], f32[]) {
  %c0 = f32[] parameter(0)
  %c1 = f32[] parameter(1)
  %c2 = f32[] parameter(2)
  %c3 = f32[] parameter(3)
  %c4 = f32[] add(%c0, %c2)
  %c5 = f32[] add(%c1, %c3)
  ROOT %c6 = (f32[], f32[]) tuple(%c4, %c5)
}

%sums (p17: f32[16,100]) -> ((f32[16], f32[16]), f32[16,100]) {
  %p17 = f32[16,100]{1,0:T(8,128)} parameter(0)
  %d0 = f32[] constant(0)
  %d1 = (f32[16]{0:T(16)}, f32[16]{0:T(16)}) reduce(%p17, %p17, %d0, %d0), dimensions={1}, to_apply=%pair
  %d2 = f32[16,100]{1,0:T(8,128)} negate(%p17)
  ROOT %d3 = ((f32[16]{0:T(16)}, f32[16]{0:T(16)}), f32[16,100]{1,0:T(8,128)}) tuple(%d1, %d2)
}
""".replace("\\\n", "")


def program(*lines, tiled=True):
    """Return a program for eight devices with these lines in its entry computation."""
    text = "\n".join(["HloModule m, num_partitions=8", CALLED, "ENTRY %main () -> f32[] {"])
    text += "".join(f"\n  {line}" for line in lines) + "\n}\n"
    return text if tiled else re.sub(r":T\([^}]*\)(?=S|\})", ":", text).replace(":}", "}")


LARGE = "%x = f32[16,100]{1,0:T(8,128)} parameter(0)"


def whole(shape):
    return math.prod(shape) * 4


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{}", 8),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['x'=2,'y'=4] {'y'}", 4),
        ("mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x','y'}", 8),
        ("mesh['x'=2,'y'=4] {'y':(1)2}", 2),
    ],
)
def test_groups_of_collectives(groups, devices):
    line = f"ROOT %y = f32[16,100]{{1,0:T(8,128)}} all-reduce(%x), replica_groups={groups}, to_apply=%sum"
    assert count(program(LARGE, line)).sent == 2 * (devices - 1) / devices * whole((16, 128))


HBM, VMEM = "f32[{},100]{{1,0:T(8,128)}}".format, "f32[{},100]{{1,0:T(8,128)S(1)}}".format


@pytest.mark.parametrize(
    ("line", "read", "written"),
    [
        # Padded to whole tiles.
        ("f32[16,100]{1,0:T(8,128)} negate(%x)", (16, 128), (16, 128)),
        ("f32[16,100]{0,1:T(8,128)} copy(%x)", (16, 128), (104, 128)),
        # Vector memory and the host's memory are not HBM.
        ("f32[16,100]{1,0:T(8,128)S(1)} negate(%x)", (16, 128), (0,)),
        ("f32[16,100]{1,0:T(8,128)S(5)} copy(%x)", (16, 128), (0,)),
        # Asynchronous operations count at their start, not at their end.
        (f"({VMEM(16)}, {HBM(16)}, u32[]{{:S(2)}}) copy-start(%x)", (16, 128), (0,)),
        (
            f"(({HBM(16)}), {VMEM(8)}, s32[]{{:S(2)}}) slice-start(%x), slice={{[8:16], [0:100]}}",
            (8, 128),
            (0,),
        ),
        (f"{HBM(16)} copy-done(%x)", (0,), (0,)),
        # Unknown operations read the whole of every operand.
        (f"{HBM(16)} teleport(%x)", (16, 128), (16, 128)),
        (f"{HBM(16)} opt-barrier(%x)", (0,), (0,)),
    ],
)
def test_single_operations(line, read, written):
    assert count(program(LARGE, f"ROOT %y = {line}"))[:3] == (whole(read), whole(written), 0)


ALL, FEW = 512 * 1024 * 4, 8 * 1024 * 4
RESULT = "ROOT %y = f32[{},1024]{{1,0:T(8,128)}} "


@pytest.mark.parametrize(
    ("line", "read", "written"),
    [
        (RESULT.format(8) + "fusion(%t, %i), calls=%part", FEW, FEW),
        (RESULT.format(8) + "fusion(%t, %i, %j), calls=%parts", 2 * FEW, FEW),  # equal slices are read once
        (RESULT.format(512) + "fusion(%t, %u, %i), calls=%put", FEW, FEW),
        (RESULT.format(512) + "fusion(%t, %u, %i), calls=%puts", ALL + FEW, ALL),  # negates the whole array
        (RESULT.format(512) + "fusion(%u, %i), calls=%fresh", FEW, ALL),
        (RESULT.format(512).replace("}", "S(1)}") + "fusion(%t, %u, %i), calls=%put", ALL + FEW, 0),
    ],
)
def test_fusions_of_slices(line, read, written):
    arrays = [
        "%t = f32[512,1024]{1,0:T(8,128)} parameter(0)",
        "%u = f32[8,1024]{1,0:T(8,128)} parameter(1)",
        "%i = s32[]{:T(128)S(6)} parameter(2)",
        "%j = s32[]{:T(128)S(6)} parameter(3)",
    ]
    assert count(program(*arrays, line))[:3] == (read, written, 0)


def test_a_fusion_of_one_reduction_with_two_results_and_another():
    """A tuple in a tuple, as in GPU programs."""
    kind = "((f32[16]{0:T(16)}, f32[16]{0:T(16)}), f32[16,100]{1,0:T(8,128)})"
    moved = count(program(LARGE, f"ROOT %y = {kind} fusion(%x), kind=kInput, calls=%sums"))
    assert moved[:2] == (whole((16, 128)), 2 * whole((16,)) + whole((16, 128)))


def test_memory_spaces_off_tpus():
    """On GPUs S(1) is the part of main memory that collectives use."""
    near = program(LARGE, f"ROOT %y = {VMEM(16)} negate(%x)", tiled=False)
    host = program(LARGE, "ROOT %y = f32[16,100]{1,0:S(5)} copy(%x)", tiled=False)
    assert count(near)[:3] == (whole((16, 100)), whole((16, 100)), 0)
    assert count(host)[:3] == (whole((16, 100)), 0, 0)


def test_copies_without_a_name_belong_to_their_user_or_source():
    named = 'metadata={op_name="jit(f)/%s/sin"}'
    lines = [
        f"%s = ({VMEM(16)}, {HBM(16)}, u32[]{{:S(2)}}) copy-start(%x)",
        f"%d = {VMEM(16)} copy-done(%s)",
        f"%y = {VMEM(16)} sine(%d), {named % 'first'}",
        f"%e = ({HBM(16)}, {VMEM(16)}, u32[]{{:S(2)}}) copy-start(%y)",
        f"%z = {HBM(16)} copy-done(%e)",
        f"%f = ({VMEM(16)}, {HBM(16)}, u32[]{{:S(2)}}) copy-start(%z)",
        f"%g = {VMEM(16)} copy-done(%f)",
        f"ROOT %w = {VMEM(16)} sine(%g), {named % 'second'}",
    ]
    size = whole((16, 128))
    parts = count(program(LARGE, *lines)).by_part
    assert parts == {"first": (size, size, 0), "second": (size, 0, 0)}


def test_merged_operations_belong_to_their_common_scopes():
    assert part_of("jit(f)/jvp(stage1)/mixer/(add:mul/add)", depth=2) == "forward stage1/mixer"
    assert part_of("jit(f)/(transpose(jvp(stage1))/add:stage2/add)") == "other"


def test_collectives_that_start_and_end():
    groups = "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
    start = f"%s = ({HBM(16)}, {HBM(64)}) all-gather-start(%x), {groups}"
    traffic = count(program(LARGE, start, f"ROOT %y = {HBM(64)} all-gather-done(%s)"))
    assert traffic[:3] == (whole((16, 128)), whole((64, 128)), whole((48, 128)))
    start = f"%s = ({HBM(16)}, {HBM(16)}) all-reduce-start(%x, %x), replica_groups={{}}, to_apply=%sum"
    traffic = count(program(LARGE, start, f"ROOT %y = ({HBM(16)}, {HBM(16)}) all-reduce-done(%s)"))
    assert traffic.written == 2 * whole((16, 128))


def test_an_asynchronous_collective_counts_once():
    """XLA for TPUs repeats it in all fusions that overlap it; they share its buffers."""
    aliases = "output_to_operand_aliasing"
    parts = [f"%g{n} = {kind} get-tuple-element(%s), index={n}" for n, kind in enumerate((HBM(16), HBM(64)))]
    lines = [
        f"%s = ({HBM(16)}, {HBM(64)}, u32[]{{:S(2)}})"
        f" fusion(%x), {aliases}={{{{0}}: (0, {{}})}}, calls=%starting",
        *parts,
        "%g2 = u32[]{:S(2)} get-tuple-element(%s), index=2",
        f"ROOT %y = {HBM(64)} fusion(%g0, %g1, %g2), {aliases}={{{{}}: (1, {{}})}}, calls=%ending",
    ]
    assert count(program(LARGE, *lines))[:3] == (whole((16, 128)), whole((64, 128)), whole((48, 128)))


COUNTERS = 300  # bytes at most, of loops
FROM_1_TO_10 = [
    "%x1 = s32[] constant(1)",
    "%x10 = s32[] constant(10)",
    "%t0 = (s32[], s32[]) tuple(%x1, %x10)",
]


@pytest.mark.parametrize(
    ("body", "steps"),
    [
        ("step", 3),  # from 1 by 3, while below 10
        ("around", 9 * 3),  # from 1 by 1; the outer loop carries the end of the inner one
    ],
)
def test_the_integers_of_a_loop_give_its_trip_count(body, steps):
    """Each step writes 4096 bytes, reads them and writes as many again."""
    loop = f"ROOT %w = (s32[], s32[]) while(%t0), condition=%below, body=%{body}"
    traffic = count(program(*FROM_1_TO_10, loop))
    assert traffic.read == pytest.approx(steps * 4096, abs=steps * COUNTERS)
    assert traffic.written == pytest.approx(steps * 2 * 4096, abs=steps * COUNTERS)


LOOP = [
    "%t0 = (s32[], s32[]) parameter(0)",
    "ROOT %w = (s32[], s32[]) while(%t0), condition=%below, body=%step",
]


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    text = program(*LOOP)
    assert count(text).unknown_loops == ("w",)
    assert count(text).hbm == pytest.approx(3 * 4096, rel=0.1)
    named = text.replace("body=%step", 'body=%step, metadata={op_name="jit(f)/transpose(jvp(times5))/while"}')
    assert count(named).hbm == pytest.approx(5 * 3 * 4096, rel=0.02)
    assert not count(named).unknown_loops
    known = text.replace("body=%step", 'body=%step, backend_config={"known_trip_count":{"n":"5"}}')
    assert count(known).hbm == count(named).hbm


def test_unreadable_programs_are_errors():
    with pytest.raises(UserError, match="no ENTRY computation"):
        count("HloModule m\n")
    with pytest.raises(UserError, match="cannot read"):
        count(program("ROOT nonsense"))
