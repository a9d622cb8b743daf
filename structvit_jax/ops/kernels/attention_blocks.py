"""Attention as loops of matrix products over blocks, in JAX alone.

Loops run over groups of heads whose products of queries and keys are within a limit of bytes. If one head
exceeds it, they also run over blocks of its queries, and backward of its keys, so that the gradients of keys
and values need no sum. Heads are brought to the front, so that every step multiplies plain matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from structvit_jax.ops.kernels.attention import Attention, Gradients, with_gradients

Part = tuple[Sequence[jax.Array], Sequence[jax.Array]]


def attention_in_blocks(limit: int) -> Attention:
    """Return attention that computes this many bytes of products at a time."""
    return with_gradients(functools.partial(_forward, limit=limit), functools.partial(_backward, limit=limit))


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int, limit: int
) -> tuple[jax.Array, jax.Array]:
    query, key, value = _heads_first(heads, query, key, value)
    together, rows = _plan(limit, query, key)
    output, lse = _map_heads(functools.partial(_forward_of_head, rows=rows), together, query, key, value)
    return _heads_last(heads, output)[0], lse.reshape(-1, heads, lse.shape[1])


def _backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    output: jax.Array,
    cotangent: jax.Array,
    lse: jax.Array,
    *,
    heads: int,
    limit: int,
) -> Gradients:
    arrays = _heads_first(heads, query, key, value, output, cotangent)
    query, key, value, output, cotangent = arrays
    lse = lse.reshape(len(query), -1, 1)
    delta = jnp.sum(output.astype(lse.dtype) * cotangent.astype(lse.dtype), axis=-1, keepdims=True)
    together, rows = _plan(limit, key, query)
    gradients = functools.partial(_backward_of_head, rows=rows)
    found = _map_heads(gradients, together, query, key, value, lse, delta, cotangent)
    d_query, d_key, d_value = _heads_last(heads, *found)
    return d_query, d_key, d_value


def _heads_first(heads: int, *arrays: jax.Array) -> list[jax.Array]:
    """[batch, length, heads·channels] -> [batch·heads, length, channels].

    Without the barrier the CPU compiler computes the arrays in this order, which is slow after a depthwise
    convolution.
    """
    arrays = lax.optimization_barrier(arrays)
    apart = [jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2) for x in arrays]
    return [x.reshape(-1, *x.shape[2:]) for x in apart]


def _heads_last(heads: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Invert `_heads_first`."""
    apart = [jnp.swapaxes(x.reshape(-1, heads, *x.shape[1:]), 1, 2) for x in arrays]
    return tuple(lax.optimization_barrier([x.reshape(*x.shape[:2], -1) for x in apart]))


def _plan(limit: int, cut: jax.Array, whole: jax.Array) -> tuple[int, int]:
    """Return how many heads are computed together, and the rows of a block of the array that is cut."""
    heads, length, _ = cut.shape
    of_head = 4 * length * whole.shape[1]
    groups = -(-heads // max(limit // of_head, 1))
    least = -(-of_head // limit)
    blocks = next((n for n in range(least, 2 * least) if length % n == 0), least)
    return -(-heads // groups), -(-length // blocks)


def _map_heads(
    function: Callable[..., Sequence[jax.Array]], together: int, *arrays: jax.Array
) -> Sequence[jax.Array]:
    """Apply a function of matrices to each of [heads, length, channels], `together` heads at a time."""
    if together == len(arrays[0]):
        return jax.vmap(function)(*arrays)
    size = together if together > 1 else None  # batches of one would not be plain matrices
    return lax.map(lambda of_head: function(*of_head), arrays, batch_size=size)


def _forward_of_head(query: jax.Array, key: jax.Array, value: jax.Array, *, rows: int) -> Sequence[jax.Array]:
    """query [N, channels], key and value [M, channels] -> output [N, channels], lse [N, 1]."""

    def part(query: jax.Array) -> Part:
        logits = _dot(query * query.shape[-1] ** -0.5, key.T)
        top = logits.max(axis=-1, keepdims=True)
        weights = jnp.exp(logits - top)
        total = weights.sum(axis=-1, keepdims=True)
        output = _dot(weights.astype(value.dtype), value) / total
        return (output.astype(value.dtype), top + jnp.log(total)), ()

    return _over_blocks(part, rows, query)[0]


def _backward_of_head(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    cotangent: jax.Array,
    *,
    rows: int,
) -> Gradients:
    """Return the gradients of query, key and value; delta [N, 1] is the sum over channels of output times
    cotangent."""
    scale, lse, delta = query.shape[-1] ** -0.5, lse.T, delta.T
    query *= scale

    def part(
        key: jax.Array, value: jax.Array
    ) -> Part:  # keys x queries: of the five products four then are plain
        weights = jnp.exp(_dot(key, query.T) - lse)
        slopes = weights * (_dot(value, cotangent.T) - delta)
        weights, slopes = weights.astype(value.dtype), slopes.astype(value.dtype)
        of_keys = _dot(slopes, query).astype(key.dtype), _dot(weights, cotangent).astype(value.dtype)
        return of_keys, (_dot(key.T, slopes),)

    (d_key, d_value), (d_query,) = _over_blocks(part, rows, key, value)
    return (d_query.T * scale).astype(query.dtype), d_key, d_value


def _over_blocks(part: Callable[..., Part], rows: int, *arrays: jax.Array) -> Part:
    """Apply `part` to blocks of rows: it returns results for these rows, and terms of sums over blocks."""
    length = len(arrays[0])
    blocks = -(-length // rows)
    if blocks == 1:
        return part(*arrays)
    padded = [jnp.pad(x, ((0, blocks * rows - length), (0, 0))) for x in arrays]

    def of_block(i: jax.Array | int) -> Part:
        return part(*(lax.dynamic_slice_in_dim(x, i * rows, rows) for x in padded))

    def step(
        i: jax.Array, carry: tuple[list[jax.Array], list[jax.Array]]
    ) -> tuple[list[jax.Array], list[jax.Array]]:
        made, terms = of_block(i)
        put = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * rows, axis=0)
        return list(map(put, carry[0], made)), list(map(jnp.add, carry[1], terms))

    results, sums = jax.eval_shape(of_block, 0)
    start = [jnp.zeros((blocks * rows, x.shape[1]), x.dtype) for x in results]
    results, sums = lax.fori_loop(0, blocks, step, (start, [jnp.zeros(x.shape, x.dtype) for x in sums]))
    return tuple(x[:length] for x in results), sums


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
