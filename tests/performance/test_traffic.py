"""The traffic counter on small programs for TPUs and CPUs, against counts by hand."""

import importlib.util
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from conftest import ROOT, structvit
from jax.sharding import Mesh

from structvit_jax.performance.traffic import count
from structvit_jax.utils.errors import UserError

STORED = ROOT / "tests" / "fixtures" / "programs"
BIG = 8192 * 8192 * 4  # bytes of the array in the loops; vector memory holds half of it
SMALL = 1024 * 1024 * 4
ROWS = 64 * 1024 * 4
BLOCK = 256 * 256 * 2  # of `programs.multiply`, bfloat16
STRIP = 128 * 512 * 4  # of `programs.copying`
# Read, written and sent, counted by hand; None if the compiler chooses.
BY_HAND = {
    "scanned": (6 * BIG, 6 * BIG, 0),
    "unrolled": (6 * BIG, 6 * BIG, 0),
    "nested": (5 * 6 * BIG, 5 * 6 * BIG, 0),
    "tolerance": ((7 + 8) * BIG, 7 * BIG, 0),  # the condition reads too, once more than the body
    "chain": (2 * SMALL, SMALL, 0),
    "stacked": (8 * 4096 * 4096 * 4, 8 * 4096 * 4096 * 4, 0),
    "rows": (4 * ROWS, 3 * ROWS, 0),  # a scatter reads the elements that it adds to
    "branches": (BIG, BIG, 0),
    "kernel": (2 * 4 * 3 * 2 * BLOCK, 4 * 3 * BLOCK, 0),
    "kernel_lies": (2 * 4 * 3 * 2 * BLOCK, 4 * 3 * BLOCK, 0),
    "kernel_edges": (1000 * 512 * 4, 1000 * 512 * 4, 0),
    "kernel_copies": (3 * 8 * STRIP, 8 * STRIP, 0),  # it starts its own copies, so every array counts once
    # x is 1024 x 1024 on each device: psum, all_gather, psum_scatter, all_to_all, ppermute over 4.
    "collectives": (None, (1 + 4 + 1 / 4 + 1 + 1) * SMALL, (6 / 4 + 4 * 3 / 4 + 3 / 4 + 3 / 4 + 1) * SMALL),
    # Six weights of 2 * SMALL, gathered forward and backward; gradients scattered over 4, summed over 2.
    "sharded": (None, None, 6 * (3 * 3 / 4 + 1 / 4) * 2 * SMALL),
}
# Copies of counters and scales are below 0.1 % of the traffic. XLA pads reduce-scatters: 1.9 % of sent bytes.
TOLERANCE = {"sharded": 0.03}


def check(name, text):
    traffic = count(text)
    for got, wanted in zip(traffic, BY_HAND[name], strict=False):
        assert wanted is None or got == pytest.approx(wanted, rel=TOLERANCE.get(name, 1e-3)), (name, traffic)
    assert [sum(sizes) for sizes in zip(*traffic.by_part.values(), strict=True)] == pytest.approx(traffic[:3])


def stored(name):
    return (STORED / f"{name}.txt").read_text()


@pytest.mark.parametrize("name", BY_HAND)
def test_stored_tpu_programs(name):
    check(name, stored(name))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_recompiled_tpu_programs(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "tools" / "programs.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    for name in BY_HAND:
        check(name, (tmp_path / f"{name}.txt").read_text())


def test_a_scan_moves_as_much_as_its_unrolled_steps():
    """They differ by the scales, which the unrolled program copies to vector memory at once, padded."""
    scanned, unrolled = count(stored("scanned")), count(stored("unrolled"))
    assert scanned.hbm == pytest.approx(unrolled.hbm, rel=2e-4)


def test_a_wrong_cost_estimate_changes_nothing():
    assert "bytes_accessed" in stored("kernel_lies")
    assert count(stored("kernel_lies")) == count(stored("kernel"))


def test_parts_are_phases_and_scopes():
    parts = count(stored("trained")).by_part
    assert {f"{phase} stage{n}" for phase in ("forward", "backward") for n in (1, 2)} <= set(parts)
    stacked = 4 * 65536 * 1024 * 2  # one activation that the scan keeps for the backward pass
    assert parts["forward stage2"].written > stacked
    assert parts["backward stage2"].read > stacked
    assert [*parts] == sorted(parts, key=lambda part: -(parts[part].read + parts[part].written))


def on_cpu(function, *arguments, donated=()):
    return count(jax.jit(function, donate_argnums=donated).lower(*arguments).compile().as_text())


def test_cpu_scan_and_unrolled():
    """A sort is not fused, so each step reads and writes x twice. The rest is the loop counter."""

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
    assert traffic.written == pytest.approx(2 * size, rel=0.01)  # the CPU zeroes the result first


def test_cpu_collectives():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    traffic = on_cpu(programs.collectives_on(mesh), programs.array(256, 128))
    assert traffic.sent == pytest.approx(7 * 32 * 128 * 4)


def test_the_command_prints_a_table(capsys, tmp_path):
    structvit("plan", f"--program={STORED / 'kernel.txt'}", "--parts=1")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == ["part", "read", "MB", "written", "MB", "sent", "MB"]
    assert rows[1:] == [["multiply", "6.291", "1.573", "0.000"], ["total", "6.291", "1.573", "0.000"]]
    with pytest.raises(UserError, match=r"cannot read .*missing: No such file"):
        structvit("plan", f"--program={tmp_path / 'missing'}")


def test_a_kernel_that_cannot_be_read_is_an_error():
    with pytest.raises(UserError, match=r"this jaxlib cannot read the kernel %multiply"):
        count(stored("kernel").replace('"body":"T', '"body":"U'))
