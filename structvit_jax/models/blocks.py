"""The block that both networks stack, and the ways to run a row of equal ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from structvit_jax.models.attention import StructAttention
from structvit_jax.models.layers import BatchNorm, DepthwiseConv, DropPath, LayerNorm, Linear, Mlp, Pointwise
from structvit_jax.models.variants import Variant
from structvit_jax.utils.errors import UserError

# What the backward pass finds in memory of each block; the rest of the forward pass is computed again.
# "dots": its input and the results of matrix products with weights, but no correlations of attention.
REMAT_POLICIES: dict[str, Callable] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}
ActivationHook = Callable[[jax.Array], jax.Array]


class ConvMixer(nnx.Module):
    """Local mixing without an activation: 1x1, depthwise, 1x1 (UniFormer's local relation aggregator)."""

    def __init__(self, width: int, *, window: Sequence[int], dtype, rngs):
        self.conv1 = Pointwise(width, width, dtype=dtype, rngs=rngs)
        self.depthwise = DepthwiseConv(width, window=window, dtype=dtype, rngs=rngs)
        self.conv2 = Pointwise(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.conv2(self.depthwise(self.conv1(x)))


class Block(nnx.Module):
    """x += position(x); x += mixer(norm(x)); x += mlp(norm(x)); the last two with layer scale and drop path.

    Convolution blocks mix with a `ConvMixer` under BatchNorm, attention blocks with `StructAttention`
    under LayerNorm (eps 1e-6). DeiT's blocks have no position term.
    """

    def __init__(self, v: Variant, stage: int, *, conv: bool, rngs):
        width, common = v.widths[stage], {"dtype": v.compute_dtype, "rngs": rngs}
        norm = BatchNorm if conv else functools.partial(LayerNorm, epsilon=1e-6)
        has_position = v.network == "uniformer"
        self.pos_embed = DepthwiseConv(width, window=(3,) * v.grid_axes, **common) if has_position else None
        self.norm1 = norm(width, **common)
        self.attn = _conv_mixer(v, width, rngs) if conv else _attention(v, width, rngs)
        self.norm2 = norm(width, **common)
        self.mlp = Mlp(width, layer=Pointwise if conv else Linear, **common)
        self.gamma_1 = _layer_scale(v, width, conv)
        self.gamma_2 = _layer_scale(v, width, conv)
        self.drop_path = DropPath()

    def __call__(self, x: jax.Array, rate: ArrayLike, key: jax.Array | None) -> jax.Array:
        """[batch, *grid, width] -> the same; `rate` of stochastic depth, with its key."""
        keys = split_key(key, 2)
        x = self.add_position(x)
        x = self.add_mixer(x, rate, keys[0])
        return self.add_mlp(x, rate, keys[1])

    @jax.named_scope("position")
    def add_position(self, x: jax.Array) -> jax.Array:
        return x if self.pos_embed is None else x + self.pos_embed(x)

    @jax.named_scope("mixer")
    def add_mixer(self, x: jax.Array, rate: ArrayLike = 0.0, key: jax.Array | None = None) -> jax.Array:
        return x + self.drop_path(_scale(self.gamma_1, self.attn(self.norm1(x))), rate, key)

    @jax.named_scope("mlp")
    def add_mlp(self, x: jax.Array, rate: ArrayLike = 0.0, key: jax.Array | None = None) -> jax.Array:
        return x + self.drop_path(_scale(self.gamma_2, self.mlp(self.norm2(x))), rate, key)


def _conv_mixer(v: Variant, width: int, rngs) -> nnx.Module:
    return ConvMixer(width, window=(v.mixer_window,) * v.grid_axes, dtype=v.compute_dtype, rngs=rngs)


def _attention(v: Variant, width: int, rngs) -> nnx.Module:
    return StructAttention(
        width,
        heads=width // v.head_width,
        grid_axes=v.grid_axes,
        structure_dim=v.structure_dim,
        key_window=v.key_window,
        value_window=v.value_window if v.aggregation == "context" else 1,
        key_kernels=v.key_kernels,
        value_kernels=v.value_kernels,
        stride=v.stride,
        method=v.attention,
        kernel_init=v.kernel_init,
        dtype=v.compute_dtype,
        rngs=rngs,
    )


def _layer_scale(v: Variant, width: int, conv: bool) -> nnx.Param | None:
    if not v.layer_scale or (conv and not v.conv_layer_scale):
        return None
    return nnx.Param(jnp.full(width, v.layer_scale, jnp.float32))


def _scale(gamma: nnx.Param | None, x: jax.Array) -> jax.Array:
    return x if gamma is None else gamma[...].astype(x.dtype) * x


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None] | jax.Array:
    """`count` keys, or as many None where there is no key."""
    return [None] * count if key is None else jax.random.split(key, count)


def run_blocks(
    blocks: Sequence[Block],
    x: jax.Array,
    rates: Sequence[float],
    keys: Sequence[jax.Array | None] | jax.Array,
    v: Variant,
    place: ActivationHook,
) -> jax.Array:
    """Applies equal blocks one after the other, as the variant's `scan_blocks` and `remat` say.

    Scanned, they are compiled once whatever their number; `place` is applied to what each returns.
    """
    if not blocks:  # a quarter of a DeiT of fewer than four blocks
        return x
    scanned = v.scan_blocks and len(blocks) > 1
    if v.remat == "none" and not scanned:
        for block, rate, key in zip(blocks, rates, keys, strict=True):
            x = place(block(x, rate, key))
        return x

    graphdefs, *states = zip(*(nnx.split(block, nnx.Param, nnx.BatchStat) for block in blocks), strict=True)
    states = list(zip(*states, strict=True))
    if scanned and any(graphdef != graphdefs[0] for graphdef in graphdefs):
        raise UserError("scan_blocks: a stage is frozen in part; freeze the whole of it, or scan none")

    def apply(graphdef):
        def run(x, state, rate, key):
            block = nnx.merge(graphdef, *state)
            return place(block(x, rate, key)), nnx.state(block, nnx.BatchStat)

        if v.remat == "none":
            return run
        return jax.checkpoint(run, policy=REMAT_POLICIES[v.remat], prevent_cse=not scanned)

    if scanned:
        run = apply(graphdefs[0])
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
        rows = jnp.array(rates, jnp.float32) if any(rates) else None, None if keys[0] is None else keys
        with jax.named_scope(f"times{len(blocks)}"):
            x, stats = lax.scan(lambda x, block: run(x, *block), x, (stacked, *rows))
        stats = [jax.tree.map(lambda array, i=i: array[i], stats) for i in range(len(blocks))]
    else:
        stats = []
        for graphdef, state, rate, key in zip(graphdefs, states, rates, keys, strict=True):
            x, new = apply(graphdef)(x, state, rate, key)
            stats.append(new)
    for block, new in zip(blocks, stats, strict=True):
        if not block.drop_path.deterministic:  # in evaluation no statistics change
            nnx.update(block, new)
    return x
