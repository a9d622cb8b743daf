"""Softmax attention of N queries over M keys, without the N x M matrix of their products in memory.

One rule for differentiation: the forward pass keeps its output and, for every query, the logarithm of its
sum of exponentials; the backward pass computes the weights again, block by block. It has two forms, chosen by
the platform that a program is lowered for: loops of matrix products over blocks, and kernels for TPUs. On
NVIDIA GPUs in half precision it is cuDNN's attention, with cuDNN's own rule.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops import attention_tpu
from structvit_jax.ops.devices import Target, target

METHODS = ("auto", "blocked", "pallas", "cudnn")

# Bytes of products of queries and keys. That one step of the loop computes:
_IN_CACHE = 2**23  # CPUs: what stays in the cache
_AT_ONCE = 2**28  # elsewhere: enough to fill the device
_FEW = 2**17  # of a head whose products CPUs rather compute together with others


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
    if method == "auto":
        method = suited_method(query.dtype)
    if method == "cudnn":
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")
    heads, flat = query.shape[2], (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    return _attention(*flat, heads, method, target()).reshape(query.shape)


def suited_method(dtype) -> str:
    """What "auto" takes for the devices that the program is traced for."""
    platform = target().platform
    if platform == "tpu" and dtype != jnp.float64:
        return "pallas"
    half = dtype in (jnp.bfloat16, jnp.float16)
    if platform == "gpu" and half and "cuda" in jax.devices()[0].client.platform_version:
        return "cudnn"  # which cannot even be traced elsewhere
    return "blocked"


# From here on heads and channels are one axis: apart, TPUs would pad both wherever such an array is kept.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attention(query, key, value, heads, method, where):
    return _attention_fwd(query, key, value, heads, method, where)[0]


def _attention_fwd(query, key, value, heads, method, where):
    output, lse = attention_and_lse(query, key, value, heads, method, where)
    return output, (query, key, value, output, lse)


def _attention_bwd(heads, method, where, residuals, cotangent):
    query, key, value, output, lse = residuals
    return attention_gradients(query, key, value, output, lse, cotangent, heads, method, where)


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention_and_lse(
    query: jax.Array, key: jax.Array, value: jax.Array, heads: int, method: str, where: Target
) -> tuple[jax.Array, jax.Array]:
    """The output of "blocked" or "pallas", and the logarithms of sums of exponentials [batch, heads, N], for
    query, key and value [batch, N or M, heads·channels]."""
    if method == "blocked":
        output, lse = _blocked(where.platform, *_of_heads(heads, query, key, value))
        return output.reshape(query.shape), lse
    forward = functools.partial(attention_tpu.forward, heads=heads, interpret=where.interpret)
    return where.on_each_device(forward, query, key, value)


def attention_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output: jax.Array,
    lse: jax.Array,
    cotangent: jax.Array,
    heads: int,
    method: str,
    where: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of query, key and value, from what `attention_and_lse` returned and the cotangent of the output."""
    if method == "blocked":
        arrays = _of_heads(heads, query, key, value, output, cotangent)
        d_query, d_key, d_value = _blocked_gradients(where.platform, lse, *arrays)
        return d_query.reshape(query.shape), d_key.reshape(key.shape), d_value.reshape(value.shape)
    backward = functools.partial(attention_tpu.backward, heads=heads, interpret=where.interpret)
    return where.on_each_device(backward, query, key, value, output, cotangent, lse)


def _of_heads(heads, *arrays):
    return [x.reshape(*x.shape[:2], heads, -1) for x in arrays]


# The loops: over blocks of queries, backward over blocks of keys; on CPUs around them over examples and
# heads, unless these are small, so that every step multiplies plain matrices. What a step needs is cut out
# of [batch, length, heads, channels] and its results are written back: to bring the heads of whole arrays to
# the front takes longer than all else.


def _blocked(platform, query, key, value):
    apart, rows = _plan(platform, query, key)
    output, lse = _each(functools.partial(_of_matrices, rows=rows), apart, query, key, value)
    return output, jnp.swapaxes(lse[..., 0], 1, 2)


def _blocked_gradients(platform, lse, query, key, value, output, cotangent):
    apart, rows = _plan(platform, key, query)
    delta = jnp.sum(output.astype(lse.dtype) * cotangent.astype(lse.dtype), axis=-1, keepdims=True)
    lse = jnp.swapaxes(lse, 1, 2)[..., None]
    gradients = functools.partial(_gradients_of_matrices, rows=rows)
    return tuple(_each(gradients, apart, query, key, value, lse, delta, cotangent))


def _plan(platform, cut, whole):
    """Whether heads are computed one by one, and the rows of a block of queries or keys, whichever is cut,
    whose products with all of the other take what the platform likes."""
    batch, length, heads, _ = cut.shape
    of_head = 4 * length * whole.shape[1]
    on_cpu = platform == "cpu"
    apart = on_cpu and of_head > _FEW
    least = -(-of_head * (1 if apart else batch * heads) // (_IN_CACHE if on_cpu else _AT_ONCE))
    blocks = next((n for n in range(least, 2 * least) if length % n == 0), least)
    return apart, -(-length // blocks)


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
