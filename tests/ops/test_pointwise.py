"""GELU and the two layers around it against plain JAX, values and gradients.

The kernels for TPUs run here in Pallas's interpreter, and are compiled for a TPU if libtpu is installed. They
have not run on a TPU.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structvit_jax.ops import gelu, kernels, linear, mlp
from structvit_jax.ops.kernels import mlp_tpu
from structvit_jax.runtime.mesh import make_mesh

PALLAS = kernels.named("mlp_pallas").run


def definition(x, kernel1, bias1, kernel2, bias2):
    return jax.nn.gelu(x @ kernel1 + bias1, approximate=False) @ kernel2 + bias2


def arrays(shape, hidden, outputs, dtype):
    rng = np.random.default_rng(0)
    sizes = (shape, (shape[-1], hidden), (hidden,), (hidden, outputs), (outputs,), (*shape[:-1], outputs))
    return [jnp.asarray(rng.standard_normal(size), dtype) for size in sizes]


def value_and_grads(function, *args):
    *args, cotangent = args
    output, pull = jax.vjp(function, *args)
    return [output, *pull(cotangent)]


def assert_close(ours, expected, tolerance):
    for a, b in zip(ours, expected, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


@pytest.mark.parametrize(
    ("shape", "hidden", "outputs"),
    [((2, 3, 5, 7), 13, 7), ((2, 1, 3, 2, 6), 3, 9)],  # wider and narrower than the input
)
def test_mlp_equals_the_definition(x64, shape, hidden, outputs):
    args = arrays(shape, hidden, outputs, jnp.float64)
    for function in (mlp, mlp.definition):
        assert_close(value_and_grads(function, *args), value_and_grads(definition, *args), 1e-13)
        single = [array.astype(jnp.float32) for array in args]
        assert_close(value_and_grads(function, *single), value_and_grads(definition, *args), 1e-5)


@pytest.mark.parametrize("function", [mlp, mlp.definition, PALLAS])
def test_mlp_in_bfloat16(function):
    """As near to the exact numbers as plain JAX in bfloat16, or nearer."""
    args = arrays((4, 33, 24), 96, 24, jnp.bfloat16)
    ours = value_and_grads(function, *args)
    assert all(array.dtype == jnp.bfloat16 for array in ours)
    assert_close(ours, value_and_grads(definition, *(array.astype(jnp.float32) for array in args)), 2e-2)


@pytest.mark.parametrize(
    ("shape", "hidden", "outputs", "rows"),
    [
        ((2, 3, 5, 7), 13, 7, 16),  # the last of two steps has 14 rows of 30
        ((3, 16, 6), 24, 9, 16),
        ((1, 1, 3), 5, 2, 16),
    ],
)
def test_the_kernels_equal_the_definition(monkeypatch, shape, hidden, outputs, rows):
    monkeypatch.setattr(mlp_tpu, "_HIDDEN", 4 * hidden * rows)
    args = arrays(shape, hidden, outputs, jnp.float32)
    assert_close(value_and_grads(PALLAS, *args), value_and_grads(definition, *args), 1e-5)


def test_each_device_runs_the_kernels_on_its_examples(only):
    """Eight devices give the numbers of one."""
    only("mlp_pallas")
    args = arrays((8, 3, 6), 24, 9, jnp.float32)
    with jax.set_mesh(make_mesh(-1, 2, jax.devices("cpu")[:8])):
        split = jax.jit(functools.partial(value_and_grads, mlp))(*args)
    assert_close(split, value_and_grads(definition, *args), 1e-5)


@pytest.mark.parametrize(("function", "hidden_arrays"), [(mlp, 1), (PALLAS, 0)])
def test_mlp_keeps_one_hidden_array_or_none(function, hidden_arrays):
    """Beside its arguments."""
    *args, _ = arrays((64, 48), 480, 48, jnp.float32)
    _, pull = jax.vjp(function, *args)
    kept = [x.size for x in jax.tree.leaves(pull) if isinstance(x, jax.Array)]
    assert sum(size >= 64 * 480 for size in kept) == hidden_arrays


@pytest.mark.parametrize(("rows", "width"), [(3136, 64), (196, 320), (49, 640)])
def test_the_kernels_compile_for_a_tpu(tpu, rows, width):
    shapes = [
        jax.ShapeDtypeStruct(array.shape, jnp.bfloat16)
        for array in arrays((3, rows, width), 4 * width, width, jnp.bfloat16)
    ]
    function = jax.jit(functools.partial(value_and_grads, mlp), in_shardings=tpu, out_shardings=tpu)
    text = function.lower(*shapes).compile().as_text()
    assert text.count("tpu_custom_call") >= 2


def test_linear_is_a_product(x64):
    x, kernel, bias, *_ = arrays((2, 3, 5, 7), 4, 3, jnp.float64)
    for function in (linear, linear.definition):
        np.testing.assert_allclose(function(x, kernel, bias), x @ kernel + bias, rtol=1e-13)


def test_gelu_is_exact(x64):
    x = jnp.linspace(-12, 12, 1001)
    expected = jax.nn.gelu(x, approximate=False)
    np.testing.assert_allclose(gelu(x), expected, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(
        jax.vmap(jax.grad(gelu))(x), jax.vmap(jax.grad(lambda x: jax.nn.gelu(x, approximate=False)))(x),
        rtol=1e-12, atol=1e-15,
    )  # fmt: skip
    half = gelu(x.astype(jnp.bfloat16))
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        half.astype(float), gelu(x.astype(jnp.bfloat16).astype(float)), rtol=2**-8, atol=1e-6
    )
