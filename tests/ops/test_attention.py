"""The forms of attention against its definition, values and gradients.

The kernels for TPUs run here in Pallas's interpreter, and are compiled for a TPU where libtpu is installed.
They have run on no TPU. cuDNN's form is compiled for a GPU where JAX's CUDA plugin is installed; the test of
its numbers needs a GPU, is skipped without, and has run on an H100.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structvit_jax.ops import attention as module
from structvit_jax.ops import native
from structvit_jax.ops.attention import attention
from structvit_jax.ops.devices import batch_split_over
from structvit_jax.performance.cost import count_flops
from structvit_jax.runtime.mesh import make_mesh

# batch, queries, keys, heads, channels: odd sizes, and of the networks the smallest grid; and the bytes of
# products at a time: of a part of a head, of one, of three and then two, of all
CASES = [
    ((1, 49, 196, 2, 64), 2**14),
    ((2, 13, 29, 3, 8), 2000),
    ((1, 13, 29, 5, 8), 5000),
    ((1, 1, 5, 2, 16), 2**30),
    ((2, 17, 1, 1, 4), 2**30),
]


def definition(query, key, value):
    """With the whole matrix, in float32 at least; JAX's gradients."""
    query, key, value = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (query, key, value))
    logits = jnp.einsum("bnhc,bmhc->bhnm", query, key, precision="highest") / np.sqrt(query.shape[-1])
    return jnp.einsum("bhnm,bmhc->bnhc", jax.nn.softmax(logits), value, precision="highest")


def value_and_grads(function, query, key, value, cotangent):
    output, pull = jax.vjp(function, query, key, value)
    return output, *pull(cotangent.astype(output.dtype))


def arrays(shape, dtype):
    """Query, key, value and cotangent."""
    batch, queries, keys, heads, channels = shape
    rng = np.random.default_rng(sum(shape))
    sizes = [(batch, n, heads, channels) for n in (queries, keys, keys, queries)]
    return [jnp.asarray(2 * rng.standard_normal(size), dtype) for size in sizes]


def assert_close(ours, expected, tolerance):
    """Relative to the largest of each array; where all should be zero, absolutely."""
    for a, b in zip(ours, expected, strict=True):
        a, b = (np.asarray(x, np.float64) for x in (a, b))
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * max(np.abs(b).max(), 1.0)


FORMS = {name: functools.partial(attention, method=name) for name in ("blocked", "native", "pallas")}
needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
in_cpp = pytest.param("native", marks=needs_compiler)
forms = pytest.mark.parametrize("form", ["blocked", in_cpp, "pallas"])


@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
@forms
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_every_form_equals_the_definition(monkeypatch, form, shape, size, dtype, tolerance):
    """In bfloat16 the definition gets the rounded arguments."""
    if form == "native" and dtype != "float32":
        pytest.skip("has float32 alone")
    args = arrays(shape, dtype)
    monkeypatch.setattr(module, "_IN_CACHE", size)
    monkeypatch.setattr(module.attention_tpu, "_PRODUCTS", size)
    ours = jax.jit(functools.partial(value_and_grads, FORMS[form]))(*args)
    assert all(array.dtype == dtype for array in ours)
    assert_close(ours, value_and_grads(definition, *args), tolerance)


def test_float64_is_exact_to_rounding(x64, monkeypatch):
    args = arrays((2, 13, 29, 3, 8), jnp.float64)
    monkeypatch.setattr(module, "_IN_CACHE", 500)
    assert_close(value_and_grads(attention, *args), value_and_grads(definition, *args), 1e-13)


@forms
def test_large_logits_neither_overflow_nor_vanish(form):
    query, key, value, cotangent = arrays((1, 7, 33, 1, 8), jnp.float32)
    args = 30 * query, key, value, cotangent
    assert_close(value_and_grads(FORMS[form], *args), value_and_grads(definition, *args), 1e-4)


def test_no_matrix_of_queries_and_keys_is_in_memory():
    """Neither forward nor backward, by what the compiled programs need beside arguments and results."""
    batch, length, keys, heads, channels = 1, 784, 3136, 2, 16
    args = arrays((batch, length, keys, heads, channels), jnp.float32)
    whole = 4 * heads * length * keys

    def needs(function):
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert needs(functools.partial(value_and_grads, definition)) > whole
    assert needs(functools.partial(value_and_grads, attention)) < whole


@forms
def test_each_device_computes_its_examples(form):
    """Eight devices, the kernel in the interpreter: the numbers of one."""
    args = arrays((8, 5, 12, 2, 8), jnp.float32)
    mesh = make_mesh(-1, 2, jax.devices("cpu")[:8])
    assert mesh.size == 8, "conftest.py makes eight devices"
    with batch_split_over(mesh):
        split = jax.jit(functools.partial(value_and_grads, FORMS[form]))(*args)
    assert_close(split, value_and_grads(definition, *args), 1e-5)


@needs_compiler
@pytest.mark.parametrize(
    "shape",
    [
        (1, 300, 700, 2, 24),  # several blocks and parts of both; channels that fill no register
        (3, 121, 481, 6, 16),  # one query, and one key, more than blocks
        (1, 2, 1000, 1, 3),
    ],
)
def test_native_at_sizes_of_its_own(shape):
    args = arrays(shape, jnp.float32)
    ours = value_and_grads(FORMS["native"], *args)
    assert_close(ours, value_and_grads(definition, *args), 1e-5)
    again = jax.jit(functools.partial(value_and_grads, FORMS["native"]))(*args)
    assert all((a == b).all() for a, b in zip(ours, again, strict=True))
    assert count_flops(jax.make_jaxpr(functools.partial(value_and_grads, FORMS["native"]))(*args)) == (
        (2 + 5) * 2 * math.prod(shape)
    )


@needs_compiler
def test_native_is_what_cpus_get_and_loops_without_a_compiler(monkeypatch):
    def traced(dtype):
        args = arrays((1, 3, 4, 1, 8), dtype)
        return str(jax.make_jaxpr(lambda *qkv: attention(*qkv))(*args[:3]))

    assert "structvit_attention_forward" in traced(jnp.float32)
    assert "structvit_attention" not in traced(jnp.bfloat16)
    monkeypatch.setattr(native, "available", lambda: False)
    assert "structvit_attention" not in traced(jnp.float32)


def test_a_compiler_that_fails_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler in ("no-such-compiler", "false"):
        monkeypatch.setenv("CXX", compiler)
        assert not native.available.__wrapped__()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize(
    "queries, keys, heads", [(196, 784, 5), (49, 196, 8), (1568, 6272, 5), (392, 1568, 8)]
)
def test_the_kernels_compile_for_a_tpu(tpu, queries, keys, heads):
    shapes = [jax.ShapeDtypeStruct((2, n, heads, 64), jnp.bfloat16) for n in (queries, keys, keys, queries)]
    function = jax.jit(functools.partial(value_and_grads, attention), in_shardings=tpu, out_shardings=tpu)
    text = function.lower(*shapes).compile().as_text()
    assert text.count("tpu_custom_call") >= 2


@pytest.mark.parametrize("queries, keys", [(196, 784), (49, 196), (49, 49), (1568, 6272), (392, 1568)])
def test_cudnn_is_what_gpus_get(gpu, queries, keys):
    """In half precision, compiled for one that is not there; otherwise the loops are."""

    def traced(dtype, channels=64):
        lengths = queries, keys, keys, queries
        shapes = [jax.ShapeDtypeStruct((2, n, 3, channels), dtype) for n in lengths]
        function = functools.partial(value_and_grads, attention)
        return jax.jit(function, in_shardings=gpu, out_shardings=gpu).trace(*shapes)

    half = traced(jnp.bfloat16)
    text = half.lower().compile().as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    pairs = (queries + queries % 2) * (keys + keys % 2)
    assert count_flops(half.jaxpr) == (2 + 5) * 2 * pairs * 2 * 3 * 64
    for others in traced(jnp.float32), traced(jnp.bfloat16, channels=12):
        assert "__cudnn$fmha" not in others.lower().as_text()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("queries, keys", [(196, 784), (49, 49)])
def test_cudnn_equals_the_definition(queries, keys):
    args = arrays((2, queries, keys, 5, 64), jnp.bfloat16)
    form = functools.partial(attention, method="cudnn")
    assert_close(value_and_grads(form, *args), value_and_grads(definition, *args), 2e-2)


@pytest.mark.parametrize(
    ("shapes", "method", "message"),
    [
        ([(1, 4, 2, 8)] * 3, "fast", "method 'fast' is not one of auto, blocked"),
        ([(1, 4, 2, 8)] * 3, "native", "is float32 .not bfloat16"),
        ([(1, 4, 16)] * 3, "auto", "should be"),
        ([(1, 4, 2, 8), (1, 5, 2, 8), (1, 6, 2, 8)], "auto", "one length for keys and values"),
        ([(1, 4, 2, 8), (1, 4, 3, 8), (1, 4, 3, 8)], "auto", "should be"),
        ([(1, 4, 2, 8), (1, 4, 2, 4), (1, 4, 2, 4)], "auto", "should be"),
    ],
)
def test_bad_arguments_are_one_line(shapes, method, message):
    with pytest.raises(ValueError, match=message) as error:
        attention(*(jnp.zeros(shape, "bfloat16") for shape in shapes), method=method)
    assert "\n" not in str(error.value)
