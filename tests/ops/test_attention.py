"""Attention kernels against the definition, values and gradients.

The kernels for TPUs run here in Pallas's interpreter, and are compiled for a TPU if libtpu is installed. They
have not run on a TPU. cuDNN's attention is compiled for a GPU if JAX's CUDA plugin is installed; the test of
its numbers needs a GPU, is skipped without, and has run on an H100.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from structvit_jax.ops import kernels, use_kernels
from structvit_jax.ops.attention import attention
from structvit_jax.ops.kernels import attention_tpu, native
from structvit_jax.ops.kernels.attention_xla import attention_in_blocks
from structvit_jax.runtime.mesh import make_mesh

# batch, queries, keys, heads, channels: odd sizes, and the smallest grid of the networks; and the bytes of
# products at a time: part of a head, one head, three and then two, all
CASES = [
    ((1, 49, 196, 2, 64), 2**14),
    ((2, 13, 29, 3, 8), 2000),
    ((1, 13, 29, 5, 8), 5000),
    ((1, 1, 5, 2, 16), 2**30),
    ((2, 17, 1, 1, 4), 2**30),
]


def definition(query, key, value):
    """The equation in float32 at least, independent of the package; JAX's gradients."""
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


NAMES = ("attention_blocks", "attention_cpp", "attention_pallas")
KERNELS = {name: kernels.named(name).run for name in NAMES} | {"definition": attention.definition}
needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
in_cpp = pytest.param("attention_cpp", marks=needs_compiler)
all_kernels = pytest.mark.parametrize(
    "kernel", ["definition", "attention_blocks", in_cpp, "attention_pallas"]
)


@pytest.mark.parametrize(("shape", "size"), CASES, ids=str)
@all_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_every_kernel_equals_the_definition(monkeypatch, kernel, shape, size, dtype, tolerance):
    """In bfloat16 the definition gets the rounded arguments."""
    if kernel == "attention_cpp" and dtype != "float32":
        pytest.skip("float32 only")
    args = arrays(shape, dtype)
    monkeypatch.setattr(attention_tpu, "_LOGITS", size)
    function = attention_in_blocks(size) if kernel == "attention_blocks" else KERNELS[kernel]
    ours = jax.jit(functools.partial(value_and_grads, function))(*args)
    assert all(array.dtype == dtype for array in ours)
    assert_close(ours, value_and_grads(definition, *args), tolerance)


@pytest.mark.parametrize("function", [attention, attention.definition, attention_in_blocks(500)])
def test_float64_is_exact_to_rounding(x64, function):
    args = arrays((2, 13, 29, 3, 8), jnp.float64)
    assert_close(value_and_grads(function, *args), value_and_grads(definition, *args), 1e-13)


@all_kernels
def test_large_logits_neither_overflow_nor_vanish(kernel):
    query, key, value, cotangent = arrays((1, 7, 33, 1, 8), jnp.float32)
    args = 30 * query, key, value, cotangent
    assert_close(value_and_grads(KERNELS[kernel], *args), value_and_grads(definition, *args), 1e-4)


def test_no_matrix_of_queries_and_keys_is_in_memory():
    """Neither forward nor backward, by the memory of compiled programs beside arguments and results."""
    batch, length, keys, heads, channels = 1, 784, 3136, 2, 16
    args = arrays((batch, length, keys, heads, channels), jnp.float32)
    whole = 4 * heads * length * keys

    def needs(function):
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert needs(functools.partial(value_and_grads, definition)) > whole
    assert needs(functools.partial(value_and_grads, attention)) < whole


@pytest.mark.parametrize("kernel", ["attention_blocks", in_cpp, "attention_pallas"])
def test_each_device_computes_its_examples(only, kernel):
    """Eight devices give the numbers of one."""
    only(kernel)
    args = arrays((8, 5, 12, 2, 8), jnp.float32)
    mesh = make_mesh(-1, 2, jax.devices("cpu")[:8])
    assert mesh.size == 8, "conftest.py makes eight devices"
    with jax.set_mesh(mesh):
        traced = jax.jit(functools.partial(value_and_grads, attention)).trace(*args)
        assert "shard_map" in str(traced.jaxpr)
        split = traced.lower().compile()(*args)
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
    cpp = functools.partial(value_and_grads, KERNELS["attention_cpp"])
    ours = cpp(*args)
    assert_close(ours, value_and_grads(definition, *args), 1e-5)
    again = jax.jit(cpp)(*args)
    assert all((a == b).all() for a, b in zip(ours, again, strict=True))


@needs_compiler
def test_cpus_get_cpp_and_blocks_without_a_compiler(monkeypatch):
    def traced(dtype):
        args = arrays((1, 3, 4, 1, 8), dtype)
        return str(jax.make_jaxpr(lambda *qkv: attention(*qkv))(*args[:3]))

    assert "structvit_attention_forward" in traced(jnp.float32)
    assert "structvit_attention" not in traced(jnp.bfloat16)
    with use_kernels("reference"):
        assert "custom_vjp" not in traced(jnp.float32)
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
    """In half precision, compiled for a GPU that is not present; otherwise blocks are."""

    def traced(dtype, channels=64):
        lengths = queries, keys, keys, queries
        shapes = [jax.ShapeDtypeStruct((2, n, 3, channels), dtype) for n in lengths]
        function = functools.partial(value_and_grads, attention)
        return jax.jit(function, in_shardings=gpu, out_shardings=gpu).trace(*shapes)

    half = traced(jnp.bfloat16)
    text = half.lower().compile().as_text()
    assert "__cudnn$fmhaSoftmax" in text and "__cudnn$fmhaSoftmaxBackward" in text
    for others in traced(jnp.float32), traced(jnp.bfloat16, channels=12):
        assert "__cudnn$fmha" not in others.lower().as_text()


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("queries, keys", [(196, 784), (49, 49)])
def test_cudnn_equals_the_definition(queries, keys):
    args = arrays((2, queries, keys, 5, 64), jnp.bfloat16)
    cudnn = kernels.named("attention_cudnn").run
    assert_close(value_and_grads(cudnn, *args), value_and_grads(definition, *args), 2e-2)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 4, 16)] * 3, "should be"),
        ([(1, 4, 2, 8), (1, 5, 2, 8), (1, 6, 2, 8)], "one length for keys and values"),
        ([(1, 4, 2, 8), (1, 4, 3, 8), (1, 4, 3, 8)], "should be"),
        ([(1, 4, 2, 8), (1, 4, 2, 4), (1, 4, 2, 4)], "should be"),
    ],
)
def test_bad_arguments_are_one_line(shapes, message):
    with pytest.raises(ValueError, match=message) as error:
        attention(*(jnp.zeros(shape, "bfloat16") for shape in shapes))
    assert "\n" not in str(error.value)
