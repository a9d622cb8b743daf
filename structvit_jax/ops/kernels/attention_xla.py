"""Attention by XLA: in blocks of matrix products, and by cuDNN; and StructSA that recomputes its keys.

All attention kernels but cuDNN's have one gradient rule. The forward pass keeps its output and, for every
query, the logarithm of its sum of exponentials ("lse"); the backward pass recomputes the weights, block by
block. Heads and channels are merged in one axis, because TPUs would pad both in arrays that are kept.

`attention_in_blocks` loops over groups of heads whose products of queries and keys are within a limit of
bytes. If one head exceeds it, it also loops over blocks of its queries, and backward of its keys, so that the
gradients of keys and values need no sum. Heads come first, so that every step multiplies plain matrices.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from structvit_jax.ops.attention import attention
from structvit_jax.ops.convolution import depthwise_conv
from structvit_jax.ops.kernels.target import current_device
from structvit_jax.ops.structsa import per_channel

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Gradients = tuple[jax.Array, jax.Array, jax.Array]  # of query, key and value
Residuals = tuple[jax.Array, ...]  # query, key, value, output, lse
Part = tuple[Sequence[jax.Array], Sequence[jax.Array]]

_SAVED = "attention"  # name of the residuals of an attention kernel, for jax.checkpoint


def with_gradients(
    forward: Callable[..., tuple[jax.Array, jax.Array]], backward: Callable[..., Gradients]
) -> Attention:
    """Return attention on [batch, length, heads, channels] with this forward and backward pass.

    Args:
      forward: (query, key, value, heads=) -> output and lse, for query and output [batch, N, heads·channels],
        key and value [batch, M, heads·channels], and lse [batch, heads, N].
      backward: ((query, key, value, output, lse), cotangent of the output, heads=) -> gradients.
    """

    @functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
    def attend(query: jax.Array, key: jax.Array, value: jax.Array, heads: int) -> jax.Array:
        return attend_fwd(query, key, value, heads)[0]

    def attend_fwd(
        query: jax.Array, key: jax.Array, value: jax.Array, heads: int
    ) -> tuple[jax.Array, Residuals]:
        output, lse = (checkpoint_name(x, _SAVED) for x in forward(query, key, value, heads=heads))
        return output, (query, key, value, output, lse)

    def attend_bwd(heads: int, residuals: Residuals, cotangent: jax.Array) -> Gradients:
        return backward(residuals, cotangent, heads=heads)

    attend.defvjp(attend_fwd, attend_bwd)

    def run(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        merged = (x.reshape(*x.shape[:2], -1) for x in (query, key, value))
        return attend(*merged, query.shape[2]).reshape(query.shape)

    return run


def recompute_convolved(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    key_kernels: jax.Array,
    value_kernels: jax.Array,
    *,
    stride: int,
) -> jax.Array:
    """Compute StructSA; keep queries, keys, values and the results of attention for the backward pass.

    Convolved keys and values are D times larger than their inputs, so they are recomputed.
    """
    heads, channels = query.shape[-2:]

    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(_SAVED))
    def run(query: jax.Array, key: jax.Array, value: jax.Array, *kernels: jax.Array) -> jax.Array:
        with jax.named_scope("patterns"):
            key_taps, value_taps = (per_channel(x, heads, channels) for x in kernels)
            key = depthwise_conv(key, key_taps, stride=stride)
            value = depthwise_conv(value, value_taps, stride=stride)
        with jax.named_scope("attend"):
            return attention(*(x.reshape(len(x), -1, heads, channels) for x in (query, key, value)))

    merged = (x.reshape(*x.shape[:-2], -1) for x in (query, key, value))
    return run(*merged, key_kernels, value_kernels).reshape(query.shape)


def attention_by_cudnn(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Compute attention by cuDNN, with odd lengths padded, which JAX refuses to train with.

    The result of an additional query is dropped; an additional key is beyond the sequence length.
    """
    rows, keys = query.shape[1], key.shape[1]
    lengths = jnp.full(len(key), keys, jnp.int32) if keys % 2 else None
    even = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (query, key, value))
    output = jax.nn.dot_product_attention(*even, implementation="cudnn", key_value_seq_lengths=lengths)
    return output[:, :rows]


def cudnn_supports(query: jax.Array, *_: jax.Array | None) -> bool:
    """Return whether cuDNN has attention for queries [..., channels]: half precision, Ampere or later."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0 and _is_ampere()


def _is_ampere() -> bool:
    """Return whether the GPU is NVIDIA's with compute capability 8.0 or later.

    Without a GPU in this process, programs are compiled for one of `structvit_jax.performance.hardware`;
    NVIDIA's there are all of such a generation.
    """
    try:
        capability = getattr(jax.devices("gpu")[0], "compute_capability", "")  # "9.0"; AMD's is "gfx90a"
    except RuntimeError:
        return "NVIDIA" in current_device().kind
    return bool(re.fullmatch(r"\d+\.\d", capability)) and float(capability) >= 8.0


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


def _backward(residuals: Residuals, cotangent: jax.Array, *, heads: int, limit: int) -> Gradients:
    *arrays, lse = residuals
    query, key, value, output, cotangent = _heads_first(heads, *arrays, cotangent)
    lse = lse.reshape(len(query), -1, 1)
    delta = jnp.sum(output.astype(lse.dtype) * cotangent.astype(lse.dtype), axis=-1, keepdims=True)
    together, rows = _plan(limit, key, query)
    gradients = functools.partial(_backward_of_head, rows=rows)
    found = _map_heads(gradients, together, query, key, value, lse, delta, cotangent)
    d_query, d_key, d_value = _heads_last(heads, *found)
    return d_query, d_key, d_value


def _heads_first(heads: int, *arrays: jax.Array) -> list[jax.Array]:
    """[batch, length, heads·channels] -> [batch·heads, length, channels].

    The barrier keeps the CPU compiler from computing the arrays in this order, which is slow for a depthwise
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
    """Return the gradients of query, key and value.

    delta [N, 1] is the sum over channels of output times cotangent.
    """
    scale, lse, delta = query.shape[-1] ** -0.5, lse.T, delta.T
    query *= scale

    def part(key: jax.Array, value: jax.Array) -> Part:
        # keys x queries: then four of the five products need no transposition
        weights = jnp.exp(_dot(key, query.T) - lse)
        slopes = weights * (_dot(value, cotangent.T) - delta)
        weights, slopes = weights.astype(value.dtype), slopes.astype(value.dtype)
        of_keys = _dot(slopes, query).astype(key.dtype), _dot(weights, cotangent).astype(value.dtype)
        return of_keys, (_dot(key.T, slopes),)

    (d_key, d_value), (d_query,) = _over_blocks(part, rows, key, value)
    return (d_query.T * scale).astype(query.dtype), d_key, d_value


def _over_blocks(part: Callable[..., Part], rows: int, *arrays: jax.Array) -> Part:
    """Apply `part` to blocks of rows. It returns results of these rows, and terms of sums over blocks."""
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
