"""The depthwise convolution against XLA's grouped convolution, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from structvit_jax.ops import depthwise_conv

odd = st.sampled_from([1, 3, 5])


@st.composite
def cases(draw):
    axes = draw(st.sampled_from([2, 3]))
    grid = [draw(st.integers(1, 7)) for _ in range(axes)]
    window = [draw(odd) for _ in range(axes)]
    batch, channels, multiplier, stride = (draw(st.integers(1, 3)) for _ in range(4))
    return (batch, *grid, channels), (*window, 1, channels * multiplier), stride


def value_and_grads(method, x, kernel, stride):
    def loss(x, kernel):
        return jnp.sum(jnp.sin(depthwise_conv(x, kernel, stride=stride, method=method)))

    return jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)


def largest_difference(a, b):
    scale = max(float(jnp.max(jnp.abs(y))) for y in jax.tree.leaves(b))
    return (
        max(float(jnp.max(jnp.abs(x - y))) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True))
        / scale
    )


@settings(max_examples=10, deadline=None, derandomize=True)
@given(cases())
def test_shifted_equals_grouped(case):
    x_shape, kernel_shape, stride = case
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = jnp.array(rng.standard_normal(x_shape)), jnp.array(rng.standard_normal(kernel_shape))
        shifted = value_and_grads("shifted", x, kernel, stride)
        assert largest_difference(shifted, value_and_grads("grouped", x, kernel, stride)) < 1e-12


@pytest.mark.parametrize(
    ("shape", "window", "multiplier", "stride"),
    [
        ((2, 9, 8, 7, 5), (5, 5, 5), 1, 1),  # the scan over the window's leading axis
        ((1, 3, 6, 7, 4), (3, 3, 3), 4, 2),  # the scan over planes, in the gradient
        ((3, 11, 10, 6), (5, 5), 2, 3),
    ],
)
def test_long_sums_are_scanned_to_the_same_numbers(x64, shape, window, multiplier, stride):
    rng = np.random.default_rng(1)
    x = jnp.array(rng.standard_normal(shape))
    kernel = jnp.array(rng.standard_normal((*window, 1, shape[-1] * multiplier)))
    shifted = value_and_grads("shifted", x, kernel, stride)
    assert largest_difference(shifted, value_and_grads("grouped", x, kernel, stride)) < 1e-12


def test_auto_on_cpu_is_shifted_and_float32_agrees():
    rng = np.random.default_rng(2)
    x = jnp.array(rng.standard_normal((2, 4, 9, 8, 6)), jnp.float32)
    kernel = jnp.array(rng.standard_normal((3, 5, 5, 1, 12)), jnp.float32)
    auto = value_and_grads("auto", x, kernel, 2)
    shifted = value_and_grads("shifted", x, kernel, 2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), auto, shifted))
    assert largest_difference(auto, value_and_grads("grouped", x, kernel, 2)) < 1e-5


def test_bfloat16_sums_in_float32():
    rng = np.random.default_rng(3)
    x, kernel = (jnp.array(rng.standard_normal(s), jnp.bfloat16) for s in ((1, 16, 16, 4), (5, 5, 1, 4)))
    exact = depthwise_conv(x.astype(jnp.float32), kernel.astype(jnp.float32), method="grouped")
    out = depthwise_conv(x, kernel)
    assert out.dtype == jnp.bfloat16
    assert float(jnp.max(jnp.abs(out - exact)) / jnp.max(jnp.abs(exact))) < 2**-8  # one rounding


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        ((1, 4, 4, 2), (2, 3, 1, 2), {}, "even"),
        ((1, 4, 4, 2), (3, 3, 1, 3), {}, "does not fit 2 channels"),
        ((1, 4, 4, 2), (3, 1, 2), {}, "grid"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"stride": 0}, "stride"),
        ((1, 4, 4, 2), (3, 3, 1, 2), {"method": "fast"}, "method"),
    ],
)
def test_bad_arguments_are_one_line(x, kernel, options, message):
    with pytest.raises(ValueError, match=message) as error:
        depthwise_conv(jnp.zeros(x), jnp.zeros(kernel), **options)
    assert "\n" not in str(error.value)
