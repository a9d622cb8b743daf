"""The counter of traffic against what small programs must move by hand, for TPUs and on the CPU."""

import importlib.util
import math
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from conftest import ROOT
from jax.sharding import Mesh

from structvit_jax.errors import UserError
from structvit_jax.traffic import count
from structvit_jax.traffic.__main__ import main

STORED = ROOT / "tests" / "data" / "programs"
BIG = 8192 * 8192 * 4  # bytes of the array that the loops work on; vector memory holds half of that
SMALL = 1024 * 1024 * 4
ROWS = 64 * 1024 * 4
BLOCK = 256 * 256 * 2  # of `programs.multiply`, bfloat16
STRIP = 128 * 512 * 4  # of `programs.copying`
# Read, written and sent by hand; None where the compiler is free.
BY_HAND = {
    "scanned": (6 * BIG, 6 * BIG, 0),
    "unrolled": (6 * BIG, 6 * BIG, 0),
    "nested": (5 * 6 * BIG, 5 * 6 * BIG, 0),
    "tolerance": ((7 + 8) * BIG, 7 * BIG, 0),  # the condition reads too, once more than the body
    "chain": (2 * SMALL, SMALL, 0),
    "stacked": (8 * 4096 * 4096 * 4, 8 * 4096 * 4096 * 4, 0),
    "rows": (4 * ROWS, 3 * ROWS, 0),  # a scatter reads what it adds to
    "branches": (BIG, BIG, 0),
    "kernel": (2 * 4 * 3 * 2 * BLOCK, 4 * 3 * BLOCK, 0),
    "kernel_lies": (2 * 4 * 3 * 2 * BLOCK, 4 * 3 * BLOCK, 0),
    "kernel_edges": (1000 * 512 * 4, 1000 * 512 * 4, 0),
    "kernel_copies": ((1 + 7 * 2 + 4 + 8) * STRIP, 8 * STRIP, 0),
    # x is 1024 x 1024 on each device: psum, all_gather, psum_scatter, all_to_all, ppermute over 4.
    "collectives": (None, (1 + 4 + 1 / 4 + 1 + 1) * SMALL, (6 / 4 + 4 * 3 / 4 + 3 / 4 + 3 / 4 + 1) * SMALL),
    # Six weights of 2 * SMALL, gathered forward and backward; gradients scattered over 4, summed over 2.
    "sharded": (None, None, 6 * (3 * 3 / 4 + 1 / 4) * 2 * SMALL),
}
# Copies of counters and scales: below 0.1 % of what moves. XLA pads what it scatters, by up to 8 % of it.
TOLERANCE = {"sharded": 0.03}


def check(name, text):
    traffic = count(text)
    for got, wanted in zip(traffic, BY_HAND[name], strict=False):
        assert wanted is None or got == pytest.approx(wanted, rel=TOLERANCE.get(name, 1e-3)), (name, traffic)
    assert [sum(sizes) for sizes in zip(*traffic.by_part.values(), strict=True)] == pytest.approx(traffic[:3])


def stored(name):
    return (STORED / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", BY_HAND)
def test_tpu_programs_move_what_they_must(name):
    check(name, stored(name))


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, which compiles them, is missing"
)
def test_tpu_programs_compiled_again(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "programs.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    for name in BY_HAND:
        check(name, (tmp_path / f"{name}.txt").read_text())


def test_a_scan_moves_what_its_steps_do():
    """Not to the byte: the unrolled program takes the scales to vector memory whole, padded."""
    scanned, unrolled = count(stored("scanned")), count(stored("unrolled"))
    assert scanned.hbm == pytest.approx(unrolled.hbm, rel=2e-4)


def test_a_kernel_that_lies_changes_nothing():
    assert "bytes_accessed" in stored("kernel_lies")
    assert count(stored("kernel_lies")) == count(stored("kernel"))


def test_parts_are_phases_and_scopes():
    parts = count(stored("trained")).by_part
    assert {f"{phase} stage{n}" for phase in ("forward", "backward") for n in (1, 2)} <= set(parts)
    stacked = 4 * 65536 * 1024 * 2  # what the scan keeps of one activation for the backward pass
    assert parts["forward stage2"].written > stacked
    assert parts["backward stage2"].read > stacked
    assert [*parts] == sorted(parts, key=lambda part: -(parts[part].read + parts[part].written))


def on_cpu(function, *arguments, donated=()):
    return count(jax.jit(function, donate_argnums=donated).lower(*arguments).compile().as_text())


def test_cpu_scan_and_unrolled():
    """Sorting ends a fusion, so each step reads and writes x twice; the counter of the loop is the rest."""

    def step(x, scale):
        return jnp.sort(x * scale, axis=0)

    def unrolled(x, scales):
        for scale in scales:
            x = step(x, scale)
        return x

    x, scales = programs.array(256, 256), programs.array(6, 256)
    scanned = on_cpu(
        lambda x, s: jax.lax.scan(lambda x, s: (step(x, s), None), x, s)[0], x, scales, donated=0
    )
    assert scanned.hbm == pytest.approx(on_cpu(unrolled, x, scales, donated=0).hbm, abs=1000)
    assert scanned.hbm == pytest.approx(2 * 2 * 6 * 256 * 256 * 4, rel=0.01)


def test_cpu_slices_count_as_slices():
    size = 8 * 64 * 512 * 4
    traffic = on_cpu(programs.stacked, programs.array(8, 64, 512))
    assert traffic.read == pytest.approx(size, rel=0.01)
    assert traffic.written == pytest.approx(2 * size, rel=0.01)  # the CPU clears the result first


def test_cpu_collectives():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    traffic = on_cpu(programs.collectives_on(mesh), programs.array(256, 128))
    assert traffic.sent == pytest.approx(7 * 32 * 128 * 4)


# What the entry computations below may call.
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
""".replace("\\\n", "")


def program(*lines, tiled=True):
    """A program of eight devices with an entry computation of these lines."""
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
        # What starts counts there, and not where it is done.
        (f"({VMEM(16)}, {HBM(16)}, u32[]{{:S(2)}}) copy-start(%x)", (16, 128), (0,)),
        (
            f"(({HBM(16)}), {VMEM(8)}, s32[]{{:S(2)}}) slice-start(%x), slice={{[8:16], [0:100]}}",
            (8, 128),
            (0,),
        ),
        (f"{HBM(16)} copy-done(%x)", (0,), (0,)),
        (f"{HBM(16)} opt-barrier(%x)", (0,), (0,)),
    ],
)
def test_single_operations(line, read, written):
    assert count(program(LARGE, f"ROOT %y = {line}"))[:3] == (whole(read), whole(written), 0)


def test_memory_spaces_off_tpus():
    """There S(1) is memory for collectives, a part of the device's own."""
    near = program(LARGE, f"ROOT %y = {VMEM(16)} negate(%x)", tiled=False)
    host = program(LARGE, "ROOT %y = f32[16,100]{1,0:S(5)} copy(%x)", tiled=False)
    assert count(near)[:3] == (whole((16, 100)), whole((16, 100)), 0)
    assert count(host)[:3] == (whole((16, 100)), 0, 0)


def test_copies_without_a_name_count_to_what_uses_or_made_them():
    named = 'metadata={op_name="jit(f)/%s/sin"}'
    lines = [
        f"%s = ({VMEM(16)}, {HBM(16)}, u32[]{{:S(2)}}) copy-start(%x)",
        f"%d = {VMEM(16)} copy-done(%s)",
        f"%y = {VMEM(16)} sine(%d), {named % 'first'}",
        f"%e = ({HBM(16)}, {VMEM(16)}, u32[]{{:S(2)}}) copy-start(%y)",
        f"%z = {HBM(16)} copy-done(%e)",
        f"ROOT %w = {VMEM(16)} sine(%z), {named % 'second'}",
    ]
    size = whole((16, 128))
    parts = count(program(LARGE, *lines)).by_part
    assert parts == {"first": (size, size, 0), "second": (size, 0, 0)}


def test_collectives_that_start_and_end():
    groups = "replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}"
    start = f"%s = ({HBM(16)}, {HBM(64)}) all-gather-start(%x), {groups}"
    traffic = count(program(LARGE, start, f"ROOT %y = {HBM(64)} all-gather-done(%s)"))
    assert traffic[:3] == (whole((16, 128)), whole((64, 128)), whole((48, 128)))
    start = f"%s = ({HBM(16)}, {HBM(16)}) all-reduce-start(%x, %x), replica_groups={{}}, to_apply=%sum"
    traffic = count(program(LARGE, start, f"ROOT %y = ({HBM(16)}, {HBM(16)}) all-reduce-done(%s)"))
    assert traffic.written == 2 * whole((16, 128))


def test_a_collective_beside_other_work_counts_once():
    """XLA for TPUs repeats it in the fusion that starts it and in those that follow; they share its buffers."""
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
        ("around", 9 * 3),  # from 1 by 1; the inner loop's end comes through the outer one
    ],
)
def test_a_loop_runs_as_often_as_its_integers_say(body, steps):
    """Each step writes 4096 bytes, reads them and writes as many."""
    loop = f"ROOT %w = (s32[], s32[]) while(%t0), condition=%below, body=%{body}"
    traffic = count(program(*FROM_1_TO_10, loop))
    assert traffic.read == pytest.approx(steps * 4096, abs=steps * COUNTERS)
    assert traffic.written == pytest.approx(steps * 2 * 4096, abs=steps * COUNTERS)


LOOP = [
    "%t0 = (s32[], s32[]) parameter(0)",
    "ROOT %w = (s32[], s32[]) while(%t0), condition=%below, body=%step",
]


def test_a_loop_without_a_count_is_refused():
    text = program(*LOOP)
    with pytest.raises(UserError, match=r"how often the loop %w .* runs: give --trips w=N"):
        count(text)
    named = text.replace("body=%step", 'body=%step, metadata={op_name="jit(f)/transpose(jvp(times5))/while"}')
    assert count(named).hbm == count(text, trips={"w": 5}).hbm == pytest.approx(5 * 3 * 4096, rel=0.02)
    known = text.replace("body=%step", 'body=%step, backend_config={"known_trip_count":{"n":"5"}}')
    assert count(known).hbm == count(named).hbm
    with pytest.raises(UserError, match="no loop named 'v'"):
        count(named, trips={"v": 5})


def test_what_cannot_be_read_is_refused():
    with pytest.raises(UserError, match="%y is a 'teleport', an operation that the counter"):
        count(program(LARGE, "ROOT %y = f32[16,100]{1,0} teleport(%x)"))
    with pytest.raises(UserError, match="no ENTRY computation"):
        count("HloModule m\n")
    with pytest.raises(UserError, match="cannot read"):
        count(program("ROOT nonsense"))
    kernel = stored("kernel").replace('"body":"T', '"body":"U')
    with pytest.raises(UserError, match=r"this jaxlib cannot read the kernel %multiply"):
        count(kernel)


def test_the_command_prints_a_table(capsys, tmp_path):
    main([str(STORED / "kernel.txt"), "--parts", "1"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["part", "read", "MB", "written", "MB", "sent", "MB"]
    assert rows[1:] == [["multiply", "6.291", "1.573", "0.000"], ["total", "6.291", "1.573", "0.000"]]
    for arguments in ([str(tmp_path / "missing")], [str(STORED / "kernel.txt"), "--trips", "x"]):
        with pytest.raises(SystemExit, match="2"):
            main(arguments)
        assert capsys.readouterr().err.startswith("error: ")
