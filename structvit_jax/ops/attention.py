"""Softmax attention of N queries over M keys, without the N x M matrix of their products in memory.

One rule for differentiation: the forward pass keeps its output and, for every query, the logarithm of its
sum of exponentials; the backward pass computes the weights again, block by block. It has two forms, chosen by
the platform that a program is lowered for: loops of matrix products over blocks, and kernels for TPUs. On
NVIDIA GPUs in half precision it is cuDNN's attention, with cuDNN's own rule.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from structvit_jax.ops import attention_tpu

METHODS = ("auto", "blocked", "pallas", "cudnn")

# Bytes of products of queries and keys that one step of the loop computes.
_IN_CACHE = 2**23  # CPUs: what stays in the cache
_AT_ONCE = 2**28  # elsewhere: enough to fill the device


_mesh: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar("mesh", default=None)


@contextlib.contextmanager
def batch_split_over(mesh: Mesh) -> Iterator[None]:
    """Inside, batches are split over all axes of the mesh. Kernels have to be told, since the compiler can
    only run them as they are: each device runs them on its examples."""
    token = _mesh.set(mesh)
    try:
        yield
    finally:
        _mesh.reset(token)


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, method: str = "auto") -> jax.Array:
    """softmax(query keyᵀ / sqrt(channels)) value, for every head; products are float32 at least.

    Args:
      query: [batch, N, heads, channels].
      key, value: [batch, M, heads, channels].
      method: "blocked" is loops over blocks of queries, "pallas" the kernels for TPUs (interpreted
        elsewhere), "cudnn" cuDNN's (half precision on NVIDIA GPUs); "auto" takes what suits the platform.

    Returns:
      [batch, N, heads, channels], in the arguments' type.

    Raises:
      ValueError: shapes that do not fit, or an unknown method.
    """
    if method not in METHODS:
        raise ValueError(f"attention: method {method!r} is not one of {', '.join(METHODS)}")
    alike = query.ndim == 4 and key.shape == (query.shape[0], *key.shape[1:2], *query.shape[2:])
    if not alike or value.shape != key.shape:
        raise ValueError(
            f"attention: query {query.shape}, key {key.shape} and value {value.shape} should be"
            " [batch, length, heads, channels], with one length for keys and values"
        )
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if method == "cudnn" or (method == "auto" and half and _has_cudnn()):
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    return _attention(query, key, value, method, _mesh.get())


def _has_cudnn() -> bool:
    """cuDNN's attention cannot even be traced without a GPU of NVIDIA's."""
    return jax.default_backend() == "gpu" and "cuda" in jax.devices()[0].client.platform_version


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attention(query, key, value, method, mesh):
    return _attention_fwd(query, key, value, method, mesh)[0]


def _attention_fwd(query, key, value, method, mesh):
    output, lse = _choose(method, mesh, _blocked, _kernel, query, key, value)
    return output, (query, key, value, output, lse)


def _attention_bwd(method, mesh, residuals, cotangent):
    return _choose(method, mesh, _blocked_gradients, _kernel_gradients, *residuals, cotangent)


_attention.defvjp(_attention_fwd, _attention_bwd)


def _choose(method, mesh, blocked, kernel, *args):
    apart = functools.partial(blocked, size=_IN_CACHE, apart=True)
    if method == "blocked":
        return apart(*args)
    if method == "pallas":
        kernel = functools.partial(kernel, interpret=jax.default_backend() != "tpu")
        return _on_each_device(kernel, mesh)(*args)
    forms = {"cpu": apart}
    if args[0].dtype != jnp.float64:
        forms["tpu"] = _on_each_device(kernel, mesh)
    together = functools.partial(blocked, size=_AT_ONCE, apart=False)
    return lax.platform_dependent(*args, **forms, default=together)


def _on_each_device(kernel, mesh):
    """A kernel that each device of the mesh runs on its part of the batch."""
    if mesh is None or mesh.size == 1:
        return kernel
    examples = PartitionSpec(mesh.axis_names)
    return jax.shard_map(kernel, mesh=mesh, in_specs=examples, out_specs=examples, check_vma=False)


# The loops: over blocks of queries, backward over blocks of keys; on CPUs around them over examples and
# heads, so that every step multiplies plain matrices. What a step needs is cut out of [batch, length, heads,
# channels] and its results are written back: to bring the heads of whole arrays to the front takes longer
# than all else.


def _blocked(query, key, value, *, size, apart):
    rows = _rows(query, key, size, apart)
    output, lse = _each(functools.partial(_of_matrices, rows=rows), apart, query, key, value)
    return output, jnp.swapaxes(lse[..., 0], 1, 2)


def _blocked_gradients(query, key, value, output, lse, cotangent, *, size, apart):
    rows = _rows(key, query, size, apart)
    delta = jnp.sum(output.astype(lse.dtype) * cotangent.astype(lse.dtype), axis=-1, keepdims=True)
    lse = jnp.swapaxes(lse, 1, 2)[..., None]
    gradients = functools.partial(_gradients_of_matrices, rows=rows)
    return tuple(_each(gradients, apart, query, key, value, lse, delta, cotangent))


def _rows(cut, whole, size, apart):
    """Rows of a block of one of queries and keys, whose products with all of the other take about `size`
    bytes."""
    batch, length, heads, _ = cut.shape
    least = -(-4 * (1 if apart else batch * heads) * length * whole.shape[1] // size)
    blocks = next((n for n in range(least, 2 * least) if length % n == 0), least)
    return -(-length // blocks)


def _each(function, apart, *arrays):
    """Applies a function of matrices to every example and head of [batch, length, heads, channels]."""
    if not apart:
        return jax.vmap(jax.vmap(function, 1, 1))(*arrays)
    batch, _, heads, _ = arrays[0].shape

    def step(i, results):
        corner = (i // heads, 0, i % heads, 0)
        matrices = [lax.dynamic_slice(x, corner, (1, x.shape[1], 1, x.shape[3]))[0, :, 0] for x in arrays]
        made = function(*matrices)
        return [
            lax.dynamic_update_slice(whole, part[None, :, None], corner)
            for whole, part in zip(results, made, strict=True)
        ]

    shapes = jax.eval_shape(function, *(x[0, :, 0] for x in arrays))
    start = [jnp.zeros((batch, x.shape[0], heads, x.shape[1]), x.dtype) for x in shapes]
    return lax.fori_loop(0, batch * heads, step, start)


def _of_matrices(query, key, value, *, rows):
    """query [N, channels], key and value [M, channels] -> output [N, channels], lse [N, 1]."""

    def part(query):
        logits = _dot(query, key.T) * query.shape[-1] ** -0.5
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        output = _dot(weights.astype(value.dtype), value) / total
        return (output.astype(value.dtype), top + jnp.log(total)), ()

    return _over_blocks(part, rows, query)[0]


def _gradients_of_matrices(query, key, value, lse, delta, cotangent, *, rows):
    """The gradients of the three; delta [N, 1] is the sum over channels of output times cotangent."""
    scale, lse, delta = query.shape[-1] ** -0.5, lse.T, delta.T

    def part(key, value):  # keys x queries: of the five products four then are plain
        weights = jnp.exp(_dot(key, query.T) * scale - lse)
        slopes = weights * (_dot(value, cotangent.T) - delta) * scale
        weights, slopes = weights.astype(value.dtype), slopes.astype(value.dtype)
        of_keys = _dot(slopes, query).astype(key.dtype), _dot(weights, cotangent).astype(value.dtype)
        return of_keys, (_dot(key.T, slopes),)

    of_keys, (d_query,) = _over_blocks(part, rows, key, value)
    return d_query.T.astype(query.dtype), *of_keys


def _over_blocks(part, rows, *arrays):
    """Applies `part` to blocks of so many rows: it gives results of these rows, and terms of sums."""
    length = len(arrays[0])
    blocks = -(-length // rows)
    if blocks == 1:
        return part(*arrays)
    padded = [jnp.pad(x, ((0, blocks * rows - length), (0, 0))) for x in arrays]

    def of_block(i):
        return part(*(lax.dynamic_slice_in_dim(x, i * rows, rows) for x in padded))

    def step(i, carry):
        made, terms = of_block(i)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * rows, axis=0)
        return list(map(put, carry[0], made)), list(map(jnp.add, carry[1], terms))

    results, sums = jax.eval_shape(of_block, 0)
    start = [jnp.zeros((blocks * rows, x.shape[1]), x.dtype) for x in results]
    results, sums = lax.fori_loop(0, blocks, step, (start, [jnp.zeros(x.shape, x.dtype) for x in sums]))
    return tuple(x[:length] for x in results), sums


def _dot(a, b):
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))


# Kernels for TPUs, which take [batch, N, heads·channels].


def _kernel(query, key, value, interpret=False):
    q, k, v = map(_flat, (query, key, value))
    output, lse = attention_tpu.forward(q, k, v, heads=query.shape[2], interpret=interpret)
    return output.reshape(query.shape), lse


def _kernel_gradients(query, key, value, output, lse, cotangent, interpret=False):
    q, k, v, o, do = map(_flat, (query, key, value, output, cotangent))
    gradients = attention_tpu.backward(q, k, v, o, do, lse, heads=query.shape[2], interpret=interpret)
    return tuple(x.reshape(like.shape) for x, like in zip(gradients, (query, key, value), strict=True))


def _flat(x):
    return x.reshape(*x.shape[:2], -1)
