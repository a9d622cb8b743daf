"""Softmax attention of N queries over M keys, without the N x M matrix of their products in memory.

One rule for differentiation: the forward pass keeps its output and, for every query, the logarithm of its
sum of exponentials; the backward pass computes the weights again, block by block. It has three forms, chosen
by the devices that a program is traced for: loops of matrix products over blocks, kernels for TPUs, and C++
for CPUs. On NVIDIA GPUs in half precision it is cuDNN's attention, with cuDNN's own rule.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops import attention_tpu, native
from structvit_jax.ops.devices import Target, target

METHODS = ("auto", "blocked", "native", "pallas", "cudnn")

# Bytes of products of queries and keys that one step of the loops computes.
_IN_CACHE = 2**23  # CPUs: what stays in the cache
_AT_ONCE = 2**28  # elsewhere: enough to fill the device


def attention(query: jax.Array, key: jax.Array, value: jax.Array, *, method: str = "auto") -> jax.Array:
    """softmax(query keyᵀ / sqrt(channels)) value, for every head; products are float32 at least.

    Args:
      query: [batch, N, heads, channels].
      key, value: [batch, M, heads, channels].
      method: "blocked" is loops over blocks of queries, "native" C++ (float32 on CPUs where there is a
        compiler), "pallas" the kernels for TPUs (interpreted elsewhere), "cudnn" cuDNN's (half precision on
        NVIDIA GPUs); "auto" takes what suits the platform.

    Returns:
      [batch, N, heads, channels], in the arguments' type.

    Raises:
      ValueError: shapes that do not fit, or a method that is unknown or cannot be had.
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
        method = suited_method(query)
    if method == "cudnn":
        return _cudnn(query, key, value)
    if method == "native" and not native.takes(query):
        raise ValueError(f"attention: 'native' is float32 (not {query.dtype}) and needs a C++ compiler")
    heads, flat = query.shape[2], (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
    return _attention(*flat, heads, method, target()).reshape(query.shape)


def suited_method(query: jax.Array) -> str:
    """What "auto" takes for queries [..., channels], on the devices that the program is traced for."""
    where = target()
    if where.platform == "tpu" and query.dtype != jnp.float64:
        return "pallas"
    if where.platform == "cpu" and native.takes(query):
        return "native"
    takes = query.dtype in (jnp.bfloat16, jnp.float16) and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0
    return "cudnn" if where.cudnn and takes else "blocked"  # cuDNN's cannot even be traced elsewhere


def _cudnn(query, key, value):
    """JAX gives cuDNN even lengths alone to train with: odd ones get a query that nobody reads, or a key that
    counts for nothing."""
    rows, keys = query.shape[1], key.shape[1]
    lengths = jnp.full(len(key), keys, jnp.int32) if keys % 2 else None
    even = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (query, key, value))
    return jax.nn.dot_product_attention(*even, implementation="cudnn", key_value_seq_lengths=lengths)[
        :, :rows
    ]


# From here on heads and channels are one axis: apart, TPUs would pad both wherever such an array is kept.


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _attention(query, key, value, heads, method, where):
    return _attention_fwd(query, key, value, heads, method, where)[0]


def _attention_fwd(query, key, value, heads, method, where):
    output, lse = attention_and_lse(query, key, value, heads, method, where)
    return output, (query, key, value, output, lse)


def _attention_bwd(heads, method, where, residuals, cotangent):
    query, key, value, output, lse = residuals
    return attention_gradients(query, key, value, output, cotangent, lse, heads, method, where)


_attention.defvjp(_attention_fwd, _attention_bwd)


def attention_and_lse(
    query: jax.Array, key: jax.Array, value: jax.Array, heads: int, method: str, where: Target
) -> tuple[jax.Array, jax.Array]:
    """The output of "blocked", "native" or "pallas", and the logarithms of sums of exponentials
    [batch, heads, N], for query, key and value [batch, N or M, heads·channels]."""
    if method == "blocked":
        forward = functools.partial(_blocked, heads=heads, limit=_limit(where))
    elif method == "native":
        forward = functools.partial(native.attention, heads=heads)
    else:
        forward = functools.partial(attention_tpu.forward, heads=heads, interpret=where.interpret)
    return where.on_each_device(forward, query, key, value)


def attention_gradients(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    heads: int,
    method: str,
    where: Target,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of query, key and value, from what `attention_and_lse` returned, and the cotangent of the output."""
    if method == "blocked":
        backward = functools.partial(_blocked_gradients, heads=heads, limit=_limit(where))
    elif method == "native":
        backward = functools.partial(native.attention_gradients, heads=heads)
    else:
        backward = functools.partial(attention_tpu.backward, heads=heads, interpret=where.interpret)
    return where.on_each_device(backward, query, key, value, output, cotangent, lse)


# The loops: over groups of heads, as many as have products within the limit; where one has more, also over
# blocks of its queries, backward of its keys. Heads are brought to the front, so that every step multiplies
# plain matrices.


def _limit(where):
    return _IN_CACHE if where.platform == "cpu" else _AT_ONCE


def _blocked(query, key, value, *, heads, limit):
    query, key, value = _heads_first(heads, query, key, value)
    together, rows = _plan(limit, query, key)
    output, lse = _each(functools.partial(_of_matrices, rows=rows), together, query, key, value)
    return *_heads_last(heads, output), lse.reshape(-1, heads, lse.shape[1])


def _blocked_gradients(query, key, value, output, cotangent, lse, *, heads, limit):
    arrays = _heads_first(heads, query, key, value, output, cotangent)
    query, key, value, output, cotangent = arrays
    lse = lse.reshape(len(query), -1, 1)
    delta = jnp.sum(output.astype(lse.dtype) * cotangent.astype(lse.dtype), axis=-1, keepdims=True)
    together, rows = _plan(limit, key, query)
    gradients = functools.partial(_gradients_of_matrices, rows=rows)
    return _heads_last(heads, *_each(gradients, together, query, key, value, lse, delta, cotangent))


def _heads_first(heads, *arrays):
    """[batch, length, heads·channels] -> [batch·heads, length, channels]. Without the barrier CPUs make the
    arrays in this order, which is slow where it is a depthwise convolution that makes them."""
    arrays = lax.optimization_barrier(arrays)
    apart = [jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2) for x in arrays]
    return [x.reshape(-1, *x.shape[2:]) for x in apart]


def _heads_last(heads, *arrays):
    """The inverse of `_heads_first`."""
    apart = [jnp.swapaxes(x.reshape(-1, heads, *x.shape[1:]), 1, 2) for x in arrays]
    return tuple(lax.optimization_barrier([x.reshape(*x.shape[:2], -1) for x in apart]))


def _plan(limit, cut, whole):
    """How many heads are computed together, and the rows of a block of queries or keys, whichever is cut."""
    heads, length, _ = cut.shape
    of_head = 4 * length * whole.shape[1]
    groups = -(-heads // max(limit // of_head, 1))
    least = -(-of_head // limit)
    blocks = next((n for n in range(least, 2 * least) if length % n == 0), least)
    return -(-heads // groups), -(-length // blocks)


def _each(function, together, *arrays):
    """Applies a function of matrices to each of [heads, length, channels], so many at a time."""
    if together == len(arrays[0]):
        return jax.vmap(function)(*arrays)
    size = together if together > 1 else None  # batches of one would not be plain matrices
    return lax.map(lambda of_head: function(*of_head), arrays, batch_size=size)


def _of_matrices(query, key, value, *, rows):
    """query [N, channels], key and value [M, channels] -> output [N, channels], lse [N, 1]."""

    def part(query):
        logits = _dot(query * query.shape[-1] ** -0.5, key.T)
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        output = _dot(weights.astype(value.dtype), value) / total
        return (output.astype(value.dtype), top + jnp.log(total)), ()

    return _over_blocks(part, rows, query)[0]


def _gradients_of_matrices(query, key, value, lse, delta, cotangent, *, rows):
    """The gradients of the three; delta [N, 1] is the sum over channels of output times cotangent."""
    scale, lse, delta = query.shape[-1] ** -0.5, lse.T, delta.T
    query *= scale

    def part(key, value):  # keys x queries: of the five products four then are plain
        weights = jnp.exp(_dot(key, query.T) - lse)
        slopes = weights * (_dot(value, cotangent.T) - delta)
        weights, slopes = weights.astype(value.dtype), slopes.astype(value.dtype)
        of_keys = _dot(slopes, query).astype(key.dtype), _dot(weights, cotangent).astype(value.dtype)
        return of_keys, (_dot(key.T, slopes),)

    of_keys, (d_query,) = _over_blocks(part, rows, key, value)
    return (d_query.T * scale).astype(query.dtype), *of_keys


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
