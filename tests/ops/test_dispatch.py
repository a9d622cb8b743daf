"""Which kernels run, and how they run on several devices."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from structvit_jax.ops import depthwise_conv, kernels, mlp, use_kernels
from structvit_jax.ops.attention import attention
from structvit_jax.ops.kernels.target import current_device
from structvit_jax.utils.errors import UserError


def arrays(batch=8):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((batch, 6, 2, 4)), jnp.float32) for _ in range(3)]


def mesh(kind, shape=(4, 2), names=("data", "fsdp")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names), devices=jax.devices("cpu")[:8])


@pytest.fixture
def marked(only):
    """A table of one kernel, which adds one to show that it ran; each device runs it on its examples."""
    row = kernels.named("attention_cpp")._replace(run=lambda *qkv: attention.definition(*qkv) + 1, name="one")
    only(row)


def ran(output, expected):
    """Return whether the marked kernel computed an output."""
    difference = np.asarray(output - expected)
    assert np.allclose(difference, difference.round(), atol=1e-5)
    return bool(difference.round().all())


def test_use_kernels_retraces(marked):
    args, call = arrays(), jax.jit(lambda *qkv: attention(*qkv))
    expected = attention.definition(*args)
    assert ran(call(*args), expected)
    for choice, uses in (("reference", False), ("auto", True), ("portable", False)):
        with use_kernels(choice):
            assert ran(call(*args), expected) == uses, choice
            with use_kernels("auto"):
                assert ran(call(*args), expected)
    assert ran(call(*args), expected)
    with use_kernels("reference"):  # of this thread alone
        found = []
        thread = threading.Thread(target=lambda: found.append(call(*args)))
        thread.start()
        thread.join()
        assert ran(found[0], expected)
    with pytest.raises(UserError, match="unknown kernels 'fast'"), use_kernels("fast"):
        pass


def test_the_table_is_well_formed():
    operations = {
        "attention",
        "convolve",
        "depthwise_conv",
        "layer_norm",
        "linear",
        "mlp",
        "struct_attention",
    }
    assert {kernel.operation for kernel in kernels.TABLE} == operations
    assert {kernel.platform for kernel in kernels.TABLE} == {"cpu", "gpu", "tpu", "portable"}
    rows = [
        (kernel.name, kernel.platform) for kernel in kernels.TABLE if kernel.name != "mlp_recomputing_gelu"
    ]
    assert len(set(rows)) == len(rows)
    for kernel in kernels.TABLE:
        assert kernel.executed and kernel.why and (kernel.platform != "portable" or not kernel.batched)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_kernels_run_on_the_examples_of_every_device(marked, kind):
    args = arrays()
    expected = attention.definition(*args)
    with jax.set_mesh(mesh(kind)) as _, jax.set_mesh(mesh(kind)):
        placed = [jax.device_put(x, PartitionSpec(("data", "fsdp"))) for x in args]
        traced = jax.jit(lambda *qkv: attention(*qkv)).trace(*placed)
        assert "shard_map" in str(traced.jaxpr)
        output = traced.lower().compile()(*placed)
    assert ran(output, expected) and len(output.sharding.device_set) == 8


def test_a_batch_that_does_not_divide_takes_the_definition(marked):
    args = arrays(batch=6)
    with jax.set_mesh(mesh(AxisType.Auto)):
        assert not ran(jax.jit(lambda *qkv: attention(*qkv))(*args), attention.definition(*args))


def test_explicit_axes_that_split_something_else_take_the_definition(marked):
    args = arrays()
    expected = attention.definition(*args)
    with jax.set_mesh(mesh(AxisType.Explicit)):
        heads = [jax.device_put(x, PartitionSpec("data", None, "fsdp")) for x in args]
        assert not ran(jax.jit(lambda *qkv: attention(*qkv))(*heads), expected)
        batch = [jax.device_put(x, PartitionSpec("data")) for x in args]
        assert ran(jax.jit(lambda *qkv: attention(*qkv))(*batch), expected)


def test_manual_axes_call_the_kernel_as_it_is(marked):
    args = arrays()
    examples = PartitionSpec(("data", "fsdp"))
    with jax.set_mesh(mesh(AxisType.Auto)):
        split = jax.shard_map(lambda *qkv: attention(*qkv), in_specs=(examples,) * 3, out_specs=examples)
        traced = jax.jit(split).trace(*args)
        assert str(traced.jaxpr).count("shard_map") == 1
        assert ran(jax.jit(split)(*args), attention.definition(*args))


def test_sums_over_devices_are_rounded_once(only):
    """Gradients of shared weights in bfloat16 are as exact on eight devices as on one."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((8, 9, 8, 6)), jnp.bfloat16)
    kernel = jnp.asarray(rng.standard_normal((3, 3, 6, 2)), jnp.bfloat16)
    only("depthwise_sums")

    def gradient(x, kernel):
        return jax.grad(lambda kernel: depthwise_conv(x, kernel).astype(jnp.float32).sum())(kernel)

    exact = gradient(x.astype(jnp.float32), kernel.astype(jnp.float32))
    one = gradient(x, kernel)
    with jax.set_mesh(mesh(AxisType.Auto)):
        eight = jax.jit(gradient)(x, kernel)
    assert eight.dtype == one.dtype == jnp.bfloat16
    errors = [float(jnp.abs(found - exact).max() / jnp.abs(exact).max()) for found in (one, eight)]
    assert errors[1] <= 2**-8 + errors[0]


def test_the_device_is_that_of_the_context():
    assert current_device().platform == jax.default_backend()
    abstract = jax.sharding.AbstractMesh(
        (4,), ("x",), axis_types=(AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu"),
    )  # fmt: skip
    with jax.sharding.use_abstract_mesh(abstract):
        assert current_device() == ("tpu", "TPU v5 lite")
        jaxpr = str(jax.make_jaxpr(lambda *qkv: attention(*qkv))(*arrays()))
    assert "pallas_call" in jaxpr and "interpret=False" in jaxpr


def test_gradients_flow_under_fsdp():
    """Weights that are split over devices: the same gradients, in the same places."""
    rng = np.random.default_rng(0)
    shapes = (8, 5, 16), (16, 64), (64,), (64, 16), (16,)
    x, *weights = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)
    gradients = jax.grad(lambda weights: (mlp(x, *weights) ** 2).sum())
    expected, context = gradients(weights), mesh(AxisType.Auto)
    split = [NamedSharding(context, PartitionSpec("fsdp"))] * 4
    with jax.set_mesh(context):
        found = jax.jit(gradients, in_shardings=(split,), out_shardings=split)(weights)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_gradients_need_no_context(choice):
    """A backward pass may be traced after the block in which the forward pass was."""
    args = arrays()
    with use_kernels(choice):
        output, pull = jax.vjp(functools.partial(attention), *args)
    expected, pull_expected = jax.vjp(attention.definition, *args)
    for a, b in zip(pull(output), pull_expected(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
