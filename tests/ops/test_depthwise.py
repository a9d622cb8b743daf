"""Kernels of the depthwise convolution against its definition, values and gradients.

The kernel for TPUs runs here in Pallas's interpreter, and is compiled for a TPU if libtpu is installed. It
has not run on a TPU. The kernels for GPUs run here on the CPU, and are compiled for a GPU if JAX's CUDA
plugin is installed; their tests have run on an H100, too.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structvit_jax.ops import depthwise_conv, kernels
from structvit_jax.ops.kernels import native
from structvit_jax.runtime.mesh import make_mesh

odd = st.sampled_from([1, 3, 5])


@st.composite
def cases(draw):
    axes = draw(st.sampled_from([2, 3]))
    grid = [draw(st.integers(1, 7)) for _ in range(axes)]
    window = [draw(odd) for _ in range(axes)]
    batch, channels, multiplier, stride = (draw(st.integers(1, 3)) for _ in range(4))
    return (batch, *grid, channels), (*window, channels, multiplier), stride


def definition(x, kernel, *, stride):
    """XLA's grouped convolution and its gradients, independent of the package."""
    axes, (*window, channels, multiplier) = "THW"[5 - x.ndim :], kernel.shape
    out = jax.lax.conv_general_dilated(
        x,
        kernel.reshape(*window, 1, channels * multiplier),
        (1,) * (len(window) - 2) + (stride, stride),
        [(k // 2, k // 2) for k in window],
        dimension_numbers=(f"N{axes}C", f"{axes}IO", f"N{axes}C"),
        feature_group_count=channels,
    )
    return jnp.moveaxis(out.reshape(*out.shape[:-1], channels, multiplier), -1, 1)


def value_and_grads(convolve, x, kernel, stride):
    """With a cotangent that differs everywhere."""

    def loss(x, kernel):
        return jnp.sum(jnp.sin(convolve(x, kernel, stride=stride).astype(jnp.promote_types(x.dtype, "f"))))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)


NAMES = ("grouped", "library", "shifts", "sums", "bands")
KERNELS = {name: kernels.named(f"depthwise_{name}").run for name in NAMES}


def largest_difference(a, b):
    """Relative to the largest of each."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.max(jnp.abs(x - y)) / (jnp.max(jnp.abs(y)) + 1e-30)) for x, y in pairs)


def arrays(x_shape, kernel_shape, dtype):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in (x_shape, kernel_shape)]


def together(functions, *args):
    """Values and gradients of several functions, as one program: compiling takes most of the time."""
    *arrays, stride = args
    return jax.jit(lambda *arrays: [value_and_grads(f, *arrays, stride) for f in functions])(*arrays)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(cases())
def test_all_kernels_equal_the_definition(case):
    x_shape, kernel_shape, stride = case
    with jax.enable_x64(True):
        x, kernel = arrays(x_shape, kernel_shape, jnp.float64)
        expected, *found = together((definition, *KERNELS.values()), x, kernel, stride)
        for name, results in zip(KERNELS, found, strict=True):
            assert largest_difference(results, expected) < 1e-10, name


@pytest.mark.parametrize(
    ("shape", "window", "multiplier", "stride"),
    [
        ((2, 9, 8, 7, 5), (5, 5, 5), 1, 1),  # the scan over the window's leading axis
        ((1, 3, 6, 7, 4), (3, 3, 3), 4, 2),  # several kernels per channel
        ((3, 11, 10, 6), (5, 5), 2, 3),
        ((1, 6, 7, 5, 3), (5, 3, 5), 2, 2),
        ((1, 2, 3, 4, 126), (3, 3, 3), 2, 1),  # rows as long as to get channels for the cache's sake
        ((1, 4, 3, 256), (3, 3), 1, 2),
        ((1, 3, 4, 61, 2), (3, 3, 5), 1, 1),  # rows that are cut, the last part short
        ((1, 5, 70, 2), (3, 5), 2, 2),
    ],
)
def test_windows_of_the_networks(x64, shape, window, multiplier, stride):
    x, kernel = arrays(shape, (*window, shape[-1], multiplier), jnp.float64)
    expected, *double = together((definition, *KERNELS.values()), x, kernel, stride)
    for name, results in zip(KERNELS, double, strict=True):
        assert largest_difference(results, expected) < 1e-12, name
    if len(window) == 2:  # the cheaper ones in single precision as well
        single = together(KERNELS.values(), *(array.astype(jnp.float32) for array in (x, kernel)), stride)
        for name, results in zip(KERNELS, single, strict=True):
            assert largest_difference(results, expected) < 1e-5, name


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_in_bfloat16(name):
    """As near to the exact ones as rounding of arguments and results allows."""
    x, kernel = arrays((2, 4, 9, 8, 6), (3, 5, 5, 6, 2), jnp.bfloat16)
    exact = value_and_grads(definition, *(array.astype(jnp.float32) for array in (x, kernel)), 2)
    half = value_and_grads(KERNELS[name], x, kernel, 2)
    assert all(gradient.dtype == jnp.bfloat16 for gradient in half[1])
    assert largest_difference(half[1], exact[1]) < 2**-5


CPP = kernels.named("depthwise_cpp").run
needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")


def value_and_vjp(convolve, x, kernel, stride):
    """With a cotangent of its own: nothing cancels, as sums of sines would in float32."""

    @jax.jit
    def run(x, kernel):
        out, pull = jax.vjp(functools.partial(convolve, stride=stride), x, kernel)
        cotangent = np.random.default_rng(1).standard_normal(out.shape)
        return out, *pull(jnp.asarray(cotangent, out.dtype))

    return run(x, kernel)


@needs_compiler
@settings(max_examples=6, deadline=None, derandomize=True)
@given(cases())
def test_cpp_equals_the_definition(case):
    x_shape, kernel_shape, stride = case
    args = arrays(x_shape, kernel_shape, jnp.float32)
    ours, expected = (value_and_vjp(function, *args, stride) for function in (CPP, definition))
    assert largest_difference(ours, expected) < 2e-6


@needs_compiler
@pytest.mark.parametrize(
    ("shape", "window", "multiplier", "stride"),
    [
        ((2, 3, 15, 17, 37), (3, 5, 5), 2, 1),  # more rows, columns and channels than a task or a strip has
        ((1, 6, 22, 17, 20), (3, 5, 7), 3, 2),
        ((3, 29, 30, 16), (5, 5), 4, 3),
        ((1, 8, 64, 9, 70), (3, 3, 3), 1, 1),  # parts of rows
        ((40, 7, 8, 3), (3, 3), 1, 1),  # more examples than sums are kept apart for
        ((2, 9, 6, 5), (3, 3), 2, 3),  # columns that no window sees
        ((1, 3, 8, 12, 3), (3, 1, 3), 1, 4),
    ],
)
def test_cpp_at_more_sizes(x64, shape, window, multiplier, stride):
    """Against sums of shifts in float64, which equal the definition and are fast."""
    args = arrays(shape, (*window, shape[-1], multiplier), jnp.float32)
    ours = value_and_vjp(CPP, *args, stride)
    exact = value_and_vjp(KERNELS["shifts"], *(array.astype(jnp.float64) for array in args), stride)
    assert largest_difference(ours, exact) < 2e-6
    again = value_and_vjp(CPP, *args, stride)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), ours, again))


PALLAS = kernels.named("depthwise_pallas").run


@pytest.mark.parametrize(
    ("shape", "window", "multiplier"),
    [
        ((2, 7, 5, 3), (3, 3), 4),
        ((1, 9, 14, 6), (5, 3), 1),
        ((2, 3, 6, 7, 4), (3, 3, 3), 2),
        ((1, 2, 5, 9, 3), (5, 3, 5), 1),  # fewer frames than the window has
        ((1, 6, 3, 4, 5), (5, 1, 3), 2),
    ],
)
def test_the_kernel_for_gradients_equals_the_definition(shape, window, multiplier):
    x, kernel = arrays(shape, (*window, shape[-1], multiplier), jnp.float32)
    expected, found = together((definition, PALLAS), x, kernel, 1)
    assert largest_difference(found, expected) < 1e-5
    half = [array.astype(jnp.bfloat16) for array in (x, kernel)]
    gradients = value_and_grads(PALLAS, *half, 1)[1]
    assert all(gradient.dtype == jnp.bfloat16 for gradient in gradients)
    exact = value_and_grads(definition, *(array.astype(jnp.float32) for array in half), 1)[1]
    assert largest_difference(gradients, exact) < 2**-5


@pytest.mark.parametrize("name", ["depthwise_pallas", pytest.param("depthwise_cpp", marks=needs_compiler)])
def test_each_device_runs_the_kernel_on_its_examples(only, name):
    """Eight devices give the numbers of one."""
    only(name)
    x, kernel = arrays((8, 5, 4, 3), (3, 3, 3, 2), jnp.float32)
    with jax.set_mesh(make_mesh(-1, 2, jax.devices("cpu")[:8])):
        split = value_and_grads(depthwise_conv, x, kernel, 1)
    assert largest_difference(split, value_and_grads(definition, x, kernel, 1)) < 1e-5


@pytest.mark.parametrize(
    ("shape", "window", "multiplier"),
    [((56, 56, 64), (5, 5), 1), ((14, 14, 320), (3, 3), 4), ((8, 14, 14, 320), (3, 3, 3), 4)],
)
def test_the_kernel_compiles_for_a_tpu(tpu, shape, window, multiplier):
    shapes = (2, *shape), (*window, shape[-1], multiplier)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=tpu) for shape in shapes]

    def gradients(x, kernel):
        out, pull = jax.vjp(depthwise_conv, x, kernel)
        return pull(out)

    assert "tpu_custom_call" in jax.jit(gradients).lower(*args).compile().as_text()


@pytest.mark.parametrize(
    ("shape", "window", "multiplier"),
    [((64, 56, 56, 64), (5, 5), 1), ((64, 14, 14, 320), (3, 3), 4), ((4, 8, 14, 14, 320), (3, 3, 3), 4)],
)
def test_what_gpus_get(gpu, shape, window, multiplier):
    """Compiled for a GPU that is not present: cuDNN for images with one kernel a channel, and for the input
    gradient of all images; otherwise sums, whose kernel gradient needs most memory."""
    shapes = shape, (*window, shape[-1], multiplier)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=gpu) for shape in shapes]

    def both(x, kernel):
        out, pull = jax.vjp(depthwise_conv, x, kernel)
        return out, pull(jax.lax.optimization_barrier(out))

    compiled = jax.jit(both).lower(*args).compile()
    text, library = compiled.as_text(), multiplier == 1
    assert text.count("__cudnn$convBackwardFilter") == library
    assert ("__cudnn$convForward" in text) == (len(window) == 2)
    assert ("dot_general" in text) == (not library)
    assert compiled.memory_analysis().temp_size_in_bytes < 16 * 2 * math.prod(shape)


def test_windows_of_clips_are_bands_on_gpus(gpu):
    """cuDNN's convolutions for all three, in groups of 32 positions: rows of 56 are cut in two."""
    x, kernel = (4, 8, 56, 56, 64), (5, 5, 5, 64, 1)
    args = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=gpu) for shape in (x, kernel)]

    def both(x, kernel):
        out, pull = jax.vjp(depthwise_conv, x, kernel)
        return out, pull(jax.lax.optimization_barrier(out))

    text = jax.jit(both).lower(*args).compile().as_text()
    assert text.count("__cudnn$convForward") == 2
    assert text.count("__cudnn$convBackwardFilter") == 1
    assert "feature_group_count=128" in text and "feature_group_count=64" not in text


def test_a_bias_is_added_to_all_positions(only):
    """On one device and on eight; its gradient is a sum over positions."""
    x, kernel = arrays((8, 5, 4, 37), (3, 3, 37, 2), jnp.float32)
    bias, cotangent = arrays((37, 2), (8, 2, 5, 4, 37), jnp.float32)
    expected, pull = jax.vjp(lambda *args: definition(*args, stride=1), x, kernel)
    expected += bias.T[:, None, None]
    exact = expected, *pull(cotangent), np.einsum("bdyxc->cd", np.asarray(cotangent, np.float64))
    names = [f"depthwise_{name}" for name in (*NAMES, "pallas", *(["cpp"] if native.available() else []))]

    def run(*args):
        found = {}
        for name in names:
            only(name)
            out, pull = jax.vjp(depthwise_conv, *args)
            found[name] = out, *pull(cotangent)
        only()
        out, pull = jax.vjp(depthwise_conv, *args)
        return found | {"definition": (out, *pull(cotangent))}

    for devices in (1, 8):
        with jax.set_mesh(make_mesh(-1, devices // 4 or 1, jax.devices("cpu")[:devices])):
            for name, found in jax.jit(run)(x, kernel, bias).items():
                assert largest_difference(found, exact) < 2e-6, name


@needs_compiler
def test_cpus_get_cpp_and_shifts_without_a_compiler_or_in_half_precision(monkeypatch):
    def same(function, x, kernel):
        pairs = (value_and_grads(function, x, kernel, 2) for function in (function, depthwise_conv))
        return jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), *pairs))

    args = arrays((2, 4, 9, 8, 6), (3, 5, 5, 6, 2), jnp.float32)
    assert same(CPP, *args)
    assert same(KERNELS["shifts"], *(array.astype(jnp.bfloat16) for array in args))
    monkeypatch.setattr(native, "available", lambda: False)
    assert same(KERNELS["shifts"], *args)


@pytest.mark.parametrize(
    ("x", "window", "multiplier", "stride", "fits"),
    [
        ((1, 14, 14, 320), (3, 3), 4, 1, True),
        ((1, 14, 14, 320), (3, 3), 4, 2, False),
        ((1, 224, 224, 640), (5, 5), 4, 1, False),  # frames larger than vector memory
    ],
)
def test_where_the_kernel_for_tpus_fits(x, window, multiplier, stride, fits):
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, (*window, x[-1], multiplier)))
    assert kernels.named("depthwise_pallas").supports(x, kernel, None, stride=stride) == fits


def test_bfloat16_sums_in_float32():
    rng = np.random.default_rng(3)
    x, kernel = (jnp.array(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 16, 16, 4), (5, 5, 4, 1)))
    exact = definition(x.astype(jnp.float32), kernel.astype(jnp.float32), stride=1)
    out = depthwise_conv(x, kernel)
    assert out.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(out - exact)) / jnp.max(jnp.abs(exact))) < 2**-8  # one rounding


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        ((1, 4, 4, 2), (2, 3, 2, 1), {}, "even"),
        ((1, 4, 4, 2), (3, 3, 3, 1), {}, "does not fit 2 channels"),
        ((1, 4, 4, 2), (3, 2, 1), {}, "grid"),
        ((1, 4, 4, 2), (3, 3, 2, 1), {"stride": 0}, "stride"),
    ],
)
def test_bad_arguments_are_one_line(x, kernel, options, message):
    with pytest.raises(ValueError, match=message) as error:
        depthwise_conv(jnp.zeros(x), jnp.zeros(kernel), **options)
    assert "\n" not in str(error.value)


def test_a_bias_of_other_channels_is_one_line():
    with pytest.raises(ValueError, match=r"bias \(2,\) does not fit kernel .*; it should be \[channels"):
        depthwise_conv(jnp.zeros((1, 4, 4, 2)), jnp.zeros((3, 3, 2, 1)), jnp.zeros(2))
