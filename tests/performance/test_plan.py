"""`structvit plan`: operations of traced programs, cost of compiled ones, the largest batch."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import structvit

from structvit_jax import cost, data
from structvit_jax.cli.configuration import load_config
from structvit_jax.cli.options import ConfigArguments
from structvit_jax.config import default_config, model_arguments
from structvit_jax.ops.kernels import native
from structvit_jax.performance import estimate, hardware, traffic
from structvit_jax.performance.cost import count_flops
from structvit_jax.performance.estimate import count_step_flops
from structvit_jax.runtime.mesh import make_mesh
from structvit_jax.training.learner import Learner, trace_train_step
from structvit_jax.utils.errors import UserError

QUICK = [
    "--config=moving_digits",
    "--config.model.name=deit_tiny_struct_1_video",
    "--config.model.widths=(16,)",
    "--config.model.depths=(1,)",
    "--config.data.batch_size=16",
]


def operations(function, *args):
    return count_flops(jax.make_jaxpr(function)(*args))


def test_operations_by_hand():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    assert operations(jnp.matmul, a, b) == 2 * 3 * 4 * 5 * 6
    loop = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]  # noqa: E731
    assert operations(loop, jnp.zeros((5, 5))) == 7 * 2 * 5**3
    again = jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x).sum())
    assert operations(again, jnp.zeros((5, 5))) == (2 + 1 + 4) * 2 * 5**3  # the product inside sin, twice
    choice = lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    assert operations(choice, True, jnp.zeros((5, 5))) == 2 * 5**3


@pytest.mark.parametrize(
    ("stride", "padding", "pairs"), [(1, 1, 3 * 8 - 2), (2, 1, 3 * 4 - 1), (2, 0, 3 * 3)]
)
def test_operations_of_convolutions_exclude_zeros(stride, padding, pairs):
    """Counted by hand along one axis of 8. Each gradient takes as many operations as the forward pass."""
    x, kernel = jnp.zeros((2, 8, 1, 6)), jnp.zeros((3, 1, 3, 10))

    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (stride, 1), [(padding, padding), (0, 0)],
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2,
        )  # fmt: skip

    forward = 2 * pairs * 2 * 3 * 10
    assert operations(convolve, x, kernel) == forward
    for argument in (0, 1):
        gradient = jax.grad(lambda *args: convolve(*args).sum(), argument)
        assert operations(gradient, x, kernel) == pytest.approx(2 * forward)


def prepare_run(name, shape, classes, devices=1, **model):
    """Return a run without data."""
    config = default_config()
    config.model.name, config.data.batch_size = name, 8
    config.model.update(model)
    source = types.SimpleNamespace(
        shape=shape,
        arrays={"inputs": (shape, np.uint8), "labels": ((), np.int32)},
        class_names=[str(i) for i in range(classes)],
        rows_per_epoch=800,
    )
    return Learner.create(config, source, make_mesh(devices, 1, jax.devices()[:devices]))


@pytest.mark.parametrize(
    ("name", "shape"), [("structvit_s_4_1", (224, 224, 3)), ("structvit_s_4_1_video", (16, 224, 224, 3))]
)
def test_a_step_takes_three_times_the_forward_pass(name, shape):
    run = prepare_run(name, shape, 400, depths=(1, 1, 1, 1))
    arguments = model_arguments(run.config)
    forward = 2 * 8 * cost(arguments.pop("name"), shape, 400, **arguments).macs
    assert count_step_flops(run) == pytest.approx(3 * forward, rel=0.02)
    with_remat = count_step_flops(prepare_run(name, shape, 400, depths=(1, 1, 1, 1), remat="full"))
    assert 3.5 * forward < with_remat < 4 * forward


def test_operations_depend_neither_on_devices_nor_on_kernels(monkeypatch):
    name, shape = "structvit_tiny_4_1_video", (4, 32, 32, 3)
    wanted = count_step_flops(prepare_run(name, shape, 5))
    assert count_step_flops(prepare_run(name, shape, 5, devices=8)) == wanted
    monkeypatch.setattr(native, "available", lambda: False)  # depthwise convolutions become sums of shifts
    run = prepare_run(name, shape, 5)
    assert count_step_flops(run) == wanted
    assert count_flops(trace_train_step(run, run.abstract_state()).jaxpr) != wanted


def test_read_size():
    assert estimate.read_size("24GB") == 24e9 and estimate.read_size(" 1.5 GiB ") == 1.5 * 2**30
    with pytest.raises(UserError, match="--device_memory=24 is not a size such as 24GB or 16GiB"):
        estimate.read_size("24")


@pytest.mark.parametrize("first", [1, 8, 64, 5000])
def test_the_largest_batch(first):
    """Memory grows unevenly, and few batches are tried."""
    asked = []

    def needs(batch):
        asked.append(batch)
        return 1000 + 17 * batch + 50 * (batch // 64)

    for multiple in (1, 8):
        asked.clear()
        best = estimate.largest_batch(needs, 9000, multiple, first=first)
        assert best % multiple == 0 and needs(best) <= 9000 < needs(best + multiple)
        assert len(asked) <= 10
    with pytest.raises(UserError, match="not even 8 examples fit"):
        estimate.largest_batch(needs, 1100, 8, first=first)


def test_the_command_finds_the_largest_batch(command, tmp_path):
    options = "--config.train.grad_accum_steps=8", "--device_memory=6MB", f"--workdir={tmp_path}"
    process = command(*QUICK, *options, program="plan")
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if "largest batch" in line]
    batch = int(line.split("--config.data.batch_size=")[1].split()[0])
    assert f"--config.optimizer.lr={3e-3 * batch / 16:.3g} " in line
    sizes = [line for line in process.stdout.splitlines() if line.strip().startswith("memory ")]
    assert 4 < float(sizes[0].split()[1]) <= 6 and sizes[0].split()[2] == "MB"
    assert (tmp_path / "plan" / "here.txt").read_text().startswith("HloModule")


@pytest.mark.parametrize(
    ("topology", "near"), [("v5e:2x4", "v5e:2by4"), ("h100:8", "h100:8x"), ("h100:2x4", "h1000:2x4")]
)
def test_topologies(command, tmp_path, topology, near):
    """Without a compiler for the chips, fake devices replace them, and the title says so."""
    process = command(*QUICK, f"--topology={topology}", f"--workdir={tmp_path}", program="plan")
    assert process.returncode == 0, process.stderr
    assert f"{topology}: 8 x" in process.stdout and "batch 16, 2 per device" in process.stdout
    installed = "(fake devices: " not in process.stdout
    assert ("at most" in process.stdout) is installed is (hardware.devices_of(topology).chip is not None)
    with pytest.raises(UserError, match=f"unknown topology {near!r}. Did you mean"):
        hardware.devices_of(near)


def test_traffic_of_the_default_model_stays_in_its_band():
    """The program of the default train step on a CPU. The figure has no noise; lower the band with it."""
    config = load_config(ConfigArguments("moving_digits", {}, ""))
    run = Learner.create(config, data.load(config.data, config.augment), make_mesh(1, 1, jax.devices()[:1]))
    moved = traffic.count(trace_train_step(run, run.abstract_state()).lower().compile().as_text())
    print(f"{moved.hbm / 64 / 1e6:.2f} MB per example")
    # operations in C++ count by their inputs and outputs, loops by every step
    low, high = (15, 17) if native.available() else (28, 36)
    assert low < moved.hbm / 64 / 1e6 < high


@pytest.mark.parametrize("option", ["--parts=5", "--depth=2"])
def test_options_of_programs_need_one(option):
    with pytest.raises(UserError, match=rf"{option.partition('=')[0]} needs --program=FILE"):
        structvit("plan", "--config=moving_digits", option)
