"""Planning: operations as traced, memory and traffic of compiled programs, the largest batch."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT

from structvit_jax import cost, data
from structvit_jax.config import default_config, model_arguments
from structvit_jax.ops.kernels import native
from structvit_jax.performance import plan, traffic
from structvit_jax.performance.operations import operations as operations_of
from structvit_jax.runtime.mesh import make_mesh
from structvit_jax.training.compilation import trace_train_step
from structvit_jax.training.run import Run, abstract_state
from structvit_jax.utils.errors import UserError

QUICK = [
    "--config=configs/moving_digits.py",
    "--config.model.name=deit_tiny_struct_1_video",
    "--config.model.widths=(16,)",
    "--config.model.depths=(1,)",
    "--config.data.batch_size=16",
    "--mode=plan",
]


def operations(function, *args):
    return operations_of(jax.make_jaxpr(function)(*args))


def of_a_step(run):
    return operations_of(trace_train_step(run, abstract_state(run)).jaxpr)


def test_operations_by_hand():
    a, b = jnp.zeros((3, 4, 5)), jnp.zeros((3, 5, 6))
    assert operations(jnp.matmul, a, b) == 2 * 3 * 4 * 5 * 6
    loop = lambda x: jax.lax.scan(lambda c, _: (c @ c, None), x, length=7)[0]  # noqa: E731
    assert operations(loop, jnp.zeros((5, 5))) == 7 * 2 * 5**3
    again = jax.grad(lambda x: jax.checkpoint(lambda x: jnp.sin(x @ x) @ x)(x).sum())
    assert operations(again, jnp.zeros((5, 5))) == (2 + 1 + 4) * 2 * 5**3  # the product inside sin, twice
    choice = lambda p, x: jax.lax.cond(p, lambda x: x @ x, lambda x: x, x)  # noqa: E731
    assert operations(choice, True, jnp.zeros((5, 5))) == 2 * 5**3
    forms = {"default": lambda x: x @ x, "cuda": lambda x: x @ x @ x}
    either = lambda x: jax.lax.platform_dependent(x, **forms)  # noqa: E731
    assert operations(either, jnp.zeros((5, 5))) == 2 * 5**3


@pytest.mark.parametrize(
    ("stride", "padding", "pairs"), [(1, 1, 3 * 8 - 2), (2, 1, 3 * 4 - 1), (2, 0, 3 * 3)]
)
def test_operations_of_convolutions_leave_zeros_out(stride, padding, pairs):
    """By hand along one axis of 8; and each gradient multiplies what the forward pass does."""
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


def a_run(name, shape, classes, **model):
    """A run on one device for data that are not there."""
    config = default_config()
    config.model.name, config.data.batch_size = name, 8
    config.model.update(model)
    source = types.SimpleNamespace(
        shape=shape,
        arrays={"inputs": (shape, np.uint8), "labels": ((), np.int32)},
        class_names=[str(i) for i in range(classes)],
        rows_per_epoch=800,
    )
    return Run.prepare(config, source, make_mesh(1, 1, jax.devices()[:1]))


@pytest.mark.parametrize(
    ("name", "shape"), [("structvit_s_4_1", (224, 224, 3)), ("structvit_s_4_1_video", (16, 224, 224, 3))]
)
def test_a_step_takes_three_times_the_forward_pass(name, shape):
    run = a_run(name, shape, 400)
    arguments = model_arguments(run.config)
    counted = cost(arguments.pop("name"), shape, 400, **arguments)
    forward, twice = 2 * 8 * counted.macs, 8 * counted.kinds["attention"]  # the products of queries and keys
    assert of_a_step(run) == pytest.approx(3 * forward + twice, rel=0.02)
    again = of_a_step(a_run(name, shape, 400, remat="full"))
    assert 3.5 * forward < again - twice < 4 * forward


def test_read_size():
    assert plan.read_size("24GB") == 24e9 and plan.read_size(" 1.5 GiB ") == 1.5 * 2**30
    with pytest.raises(UserError, match=r"config\.device_memory is '24'; write 24GB"):
        plan.read_size("24")


@pytest.mark.parametrize("first", [1, 8, 64, 5000])
def test_the_largest_batch(first):
    """It fits and the next does not, for memory that grows unevenly, with few programs compiled."""
    asked = []

    def needs(batch):
        asked.append(batch)
        return 1000 + 17 * batch + 50 * (batch // 64)

    for least in (1, 8):
        asked.clear()
        best = plan.largest_batch(needs, 9000, least, first=first)
        assert best % least == 0 and needs(best) <= 9000 < needs(best + least)
        assert len(asked) <= 10
    with pytest.raises(UserError, match="not even 8 examples fit"):
        plan.largest_batch(needs, 1100, 8, first=first)


def test_the_command_finds_the_largest_batch(command, tmp_path):
    process = command(
        *QUICK, "--config.train.grad_accum_steps=8", "--config.device_memory=6MB", f"--workdir={tmp_path}"
    )
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
    """Chips that are not there; where nothing compiles for them the program is one for fake devices, and that
    is said."""
    process = command(*QUICK, f"--config.topologies=({topology!r},)", f"--workdir={tmp_path}")
    assert process.returncode == 0, process.stderr
    assert f"{topology}: 8 x" in process.stdout and "batch 16, 2 a device" in process.stdout
    compiled_for_it = "is not installed" not in process.stdout
    assert ("at most" in process.stdout) is compiled_for_it
    wrong = command(*QUICK, f"--config.topologies=({near!r},)", f"--workdir={tmp_path}")
    assert wrong.returncode == 2 and f"unknown topology {near!r}. Did you mean" in wrong.stderr


def test_traffic_of_the_default_model_stays_in_its_band():
    """The program for CPUs, of the default train step: a figure without noise. A change that moves it
    should move it down, and this band with it."""
    namespace: dict = {}
    exec((ROOT / "configs" / "moving_digits.py").read_text(), namespace)
    config = namespace["get_config"]()
    run = Run.prepare(config, data.load(config.data, config.augment), make_mesh(1, 1, jax.devices()[:1]))
    moved = traffic.count(trace_train_step(run, abstract_state(run)).lower().compile().as_text())
    print(f"{moved.hbm / 64 / 1e6:.2f} MB an example")
    # operations in C++ count by what goes in and comes out, loops by every step
    least, most = (15, 17) if native.available() else (28, 36)
    assert least < moved.hbm / 64 / 1e6 < most
