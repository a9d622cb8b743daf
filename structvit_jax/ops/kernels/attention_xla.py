"""Attention in XLA: block by block, or with cuDNN. StructSA that recomputes convolved keys and values.

All attention kernels except cuDNN's share one gradient rule. The forward pass stores its output and, for
every query, the log-sum-exp of its logits ("lse"). The backward pass recomputes the attention weights, block
by block. Stored arrays have one merged axis for heads and channels, because TPUs would pad separate ones.

`attention_in_blocks` loops over groups of heads whose logits take at most a given number of bytes. If the
logits of one head are larger, it also loops over blocks of rows: of queries in the forward pass, and of keys
in the backward pass, so that gradients of keys and values need no sum over blocks. Heads come first, so that
every step multiplies plain matrices.
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
# Results for the rows of one block, and terms of sums over all blocks.
Part = tuple[Sequence[jax.Array], Sequence[jax.Array]]

_SAVED = "attention"  # name by which jax.checkpoint finds the output and lse of an attention kernel


def with_gradients(
    forward: Callable[..., tuple[jax.Array, jax.Array]], backward: Callable[..., Gradients]
) -> Attention:
    """Combine a forward and a backward pass to attention on [batch, length, heads, channels].

    Args:
      forward: (query, key, value, heads=) -> (output, lse). Shapes: query and output
        [batch, N, heads·channels], key and value [batch, M, heads·channels], lse [batch, heads, N].
      backward: ((query, key, value, output, lse), cotangent of the output, heads=) -> gradients of query,
        key and value.
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
    """Compute StructSA; store queries, keys, values and the results of attention for the backward pass.

    Convolved keys and values are D times larger than their inputs, so the backward pass recomputes them.
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
    """Compute attention with cuDNN.

    JAX cannot differentiate cuDNN's attention for odd lengths, so they are padded by one. The result of the
    added query is dropped; the added key is masked by the sequence length.
    """
    rows, keys = query.shape[1], key.shape[1]
    lengths = jnp.full(len(key), keys, jnp.int32) if keys % 2 else None
    even = (jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)]) for x in (query, key, value))
    output = jax.nn.dot_product_attention(*even, implementation="cudnn", key_value_seq_lengths=lengths)
    return output[:, :rows]


def cudnn_supports(query: jax.Array, *_: jax.Array | None) -> bool:
    """Return whether cuDNN supports these queries: half precision, up to 128 channels, Ampere or later."""
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    return half and query.shape[-1] <= 128 and query.shape[-1] % 8 == 0 and _is_ampere()


def _is_ampere() -> bool:
    """Return whether the GPU is an NVIDIA GPU with compute capability 8.0 or later.

    If no GPU is attached, the program is compiled for a GPU in `structvit_jax.performance.hardware`. All
    NVIDIA GPUs listed there have such a capability.
    """
    try:
        capability = getattr(jax.devices("gpu")[0], "compute_capability", "")  # "9.0"; AMD's is "gfx90a"
    except RuntimeError:
        return "NVIDIA" in current_device().kind
    return bool(re.fullmatch(r"\d+\.\d", capability)) and float(capability) >= 8.0


def attention_in_blocks(limit: int) -> Attention:
    """Return attention that computes at most `limit` bytes of logits at a time."""
    return with_gradients(functools.partial(_forward, limit=limit), functools.partial(_backward, limit=limit))


def _forward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, heads: int, limit: int
) -> tuple[jax.Array, jax.Array]:
    query, key, value = _heads_first(heads, query, key, value)
    group, rows = _plan(limit, query, key)
    output, lse = _map_heads(functools.partial(_forward_of_head, rows=rows), group, query, key, value)
    return _heads_last(heads, output)[0], lse.reshape(-1, heads, lse.shape[1])


def _backward(residuals: Residuals, cotangent: jax.Array, *, heads: int, limit: int) -> Gradients:
    *arrays, lse = residuals
    query, key, value, output, cotangent = _heads_first(heads, *arrays, cotangent)
    lse = lse.reshape(len(query), -1, 1)
    delta = jnp.sum(output.astype(lse.dtype) * cotangent.astype(lse.dtype), axis=-1, keepdims=True)
    group, rows = _plan(limit, key, query)
    gradients = functools.partial(_backward_of_head, rows=rows)
    found = _map_heads(gradients, group, query, key, value, lse, delta, cotangent)
    d_query, d_key, d_value = _heads_last(heads, *found)
    return d_query, d_key, d_value


def _heads_first(heads: int, *arrays: jax.Array) -> list[jax.Array]:
    """Transpose arrays: [batch, length, heads·channels] -> [batch·heads, length, channels].

    Without the barrier, the CPU compiler would also transpose the operations that compute these arrays. This
    is slow for depthwise convolutions.
    """
    arrays = lax.optimization_barrier(arrays)
    separate = [jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2) for x in arrays]
    return [x.reshape(-1, *x.shape[2:]) for x in separate]


def _heads_last(heads: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Invert `_heads_first`."""
    separate = [jnp.swapaxes(x.reshape(-1, heads, *x.shape[1:]), 1, 2) for x in arrays]
    return tuple(lax.optimization_barrier([x.reshape(*x.shape[:2], -1) for x in separate]))


def _plan(limit: int, split: jax.Array, whole: jax.Array) -> tuple[int, int]:
    """Return the number of heads per group, and the number of rows per block of the array `split`."""
    heads, length, _ = split.shape
    head_bytes = 4 * length * whole.shape[1]
    groups = -(-heads // max(limit // head_bytes, 1))
    fewest = -(-head_bytes // limit)
    blocks = next((n for n in range(fewest, 2 * fewest) if length % n == 0), fewest)
    return -(-heads // groups), -(-length // blocks)


def _map_heads(
    function: Callable[..., Sequence[jax.Array]], group: int, *arrays: jax.Array
) -> Sequence[jax.Array]:
    """Apply a function of matrices to every head of [heads, length, channels], `group` heads at a time."""
    if group == len(arrays[0]):
        return jax.vmap(function)(*arrays)
    size = group if group > 1 else None  # None: no batch axis, plain matrices
    return lax.map(lambda head: function(*head), arrays, batch_size=size)


def _forward_of_head(query: jax.Array, key: jax.Array, value: jax.Array, *, rows: int) -> Sequence[jax.Array]:
    """Compute query [N, channels], key and value [M, channels] -> output [N, channels], lse [N, 1]."""

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

    delta [N, 1] is the sum of output times cotangent over channels.
    """
    scale, lse, delta = query.shape[-1] ** -0.5, lse.T, delta.T
    query *= scale

    def part(key: jax.Array, value: jax.Array) -> Part:
        # The weights are [keys, queries]: then four of the five products need no transposition.
        weights = jnp.exp(_dot(key, query.T) - lse)
        slopes = weights * (_dot(value, cotangent.T) - delta)
        weights, slopes = weights.astype(value.dtype), slopes.astype(value.dtype)
        key_gradients = _dot(slopes, query).astype(key.dtype), _dot(weights, cotangent).astype(value.dtype)
        return key_gradients, (_dot(key.T, slopes),)

    (d_key, d_value), (d_query,) = _over_blocks(part, rows, key, value)
    return (d_query.T * scale).astype(query.dtype), d_key, d_value


def _over_blocks(part: Callable[..., Part], rows: int, *arrays: jax.Array) -> Part:
    """Apply `part` to blocks of rows; concatenate its results for rows, and add up its terms (see `Part`)."""
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
        rows_of_block, terms = of_block(i)
        write = functools.partial(lax.dynamic_update_slice_in_dim, start_index=i * rows, axis=0)
        return list(map(write, carry[0], rows_of_block)), list(map(jnp.add, carry[1], terms))

    results, sums = jax.eval_shape(of_block, 0)
    start = [jnp.zeros((blocks * rows, x.shape[1]), x.dtype) for x in results]
    results, sums = lax.fori_loop(0, blocks, step, (start, [jnp.zeros(x.shape, x.dtype) for x in sums]))
    return tuple(x[:length] for x in results), sums


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, preferred_element_type=jnp.promote_types(a.dtype, jnp.float32))
