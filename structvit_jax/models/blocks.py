"""The residual block of both networks, with optional rematerialisation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from structvit_jax.models import layers
from structvit_jax.models.layers import BatchNorm, DepthwiseConv, Dtype, LayerNorm, Pointwise, Rngs, Sides
from structvit_jax.models.struct_attention import StructAttention
from structvit_jax.models.variants import Variant

# What each block stores for the backward pass, which recomputes the rest of the forward pass.
# "full" stores only the input of a block. "dots" also stores the results of matrix products with weights, but
# not those of queries with keys.
REMAT_POLICIES: dict[str, Callable[..., bool]] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


class ConvMixer(nnx.Module):
    """UniFormer's local relation aggregator: 1x1, depthwise and 1x1 convolutions, without an activation."""

    def __init__(self, width: int, *, window: Sides, dtype: Dtype, rngs: Rngs):
        self.conv1 = Pointwise(width, width, dtype=dtype, rngs=rngs)
        self.depthwise = DepthwiseConv(width, window=window, dtype=dtype, rngs=rngs)
        self.conv2 = Pointwise(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b *grid c"]) -> Float[Array, "b *grid c"]:
        return self.conv2(self.depthwise(self.conv1(x)))


class Block(nnx.Module):
    """A residual block: x += position(x); x += mixer(norm(x)); x += mlp(norm(x)).

    The mixer and MLP branches have layer scale and drop path. In convolution blocks, the mixer is a
    `ConvMixer` and the norms are BatchNorm. In attention blocks, the mixer is `StructAttention` and the norms
    are LayerNorm (eps 1e-6). DeiT's blocks have no position term.
    """

    norm1: BatchNorm | LayerNorm
    norm2: BatchNorm | LayerNorm

    def __init__(self, v: Variant, stage: int, *, conv: bool, rngs: Rngs):
        width, dtype = v.widths[stage], v.compute_dtype
        norm = BatchNorm if conv else functools.partial(LayerNorm, epsilon=1e-6)
        has_position = v.network == "uniformer"
        window = (3,) * v.grid_axes
        self.pos_embed = DepthwiseConv(width, window=window, dtype=dtype, rngs=rngs) if has_position else None
        self.norm1 = norm(width, dtype=dtype, rngs=rngs)
        self.attn = _conv_mixer(v, width, rngs) if conv else _attention(v, width, rngs)
        self.norm2 = norm(width, dtype=dtype, rngs=rngs)
        self.mlp = layers.Mlp(width, layer=Pointwise if conv else layers.Linear, dtype=dtype, rngs=rngs)
        scale = jnp.full(width, v.layer_scale or 0, jnp.float32)
        scaled = v.layer_scale and (v.conv_layer_scale or not conv)
        self.gamma_1, self.gamma_2 = (nnx.Param(scale) if scaled else None for _ in range(2))
        self.drop_path = layers.DropPath()

    def __call__(
        self, x: Float[Array, "b *grid c"], rate: float, key: jax.Array | None
    ) -> Float[Array, "b *grid c"]:
        """Apply the block to [batch, *grid, width]; `rate` and `key` are those of stochastic depth."""
        keys = split_key(key, 2)
        x = self.add_position(x)
        x = self.add_mixer(x, rate, keys[0])
        return self.add_mlp(x, rate, keys[1])

    @jax.named_scope("position")
    def add_position(self, x: jax.Array) -> jax.Array:
        return x if self.pos_embed is None else x + self.pos_embed(x)

    @jax.named_scope("mixer")
    def add_mixer(self, x: jax.Array, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
        return x + self.drop_path(_scale(self.gamma_1, self.attn(self.norm1(x))), rate, key)

    @jax.named_scope("mlp")
    def add_mlp(self, x: jax.Array, rate: float = 0.0, key: jax.Array | None = None) -> jax.Array:
        return x + self.drop_path(_scale(self.gamma_2, self.mlp(self.norm2(x))), rate, key)


def _conv_mixer(v: Variant, width: int, rngs: Rngs) -> ConvMixer:
    return ConvMixer(width, window=(v.mixer_window,) * v.grid_axes, dtype=v.compute_dtype, rngs=rngs)


def _attention(v: Variant, width: int, rngs: Rngs) -> StructAttention:
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
        kernel_init=v.kernel_init,
        dtype=v.compute_dtype,
        rngs=rngs,
    )


def _scale(gamma: nnx.Param | None, x: jax.Array) -> jax.Array:
    return x if gamma is None else gamma[...].astype(x.dtype) * x


def split_key(key: jax.Array | None, count: int) -> Sequence[jax.Array | None] | jax.Array:
    """Split a key into `count` keys; without a key, return `count` times None."""
    return [None] * count if key is None else jax.random.split(key, count)


def run_block(remat: str) -> Callable[[Block, jax.Array, float, jax.Array | None], jax.Array]:
    """Return a function with the arguments of `Block.__call__` that applies a block with rematerialisation.

    Args:
      remat: "none", or a key of `REMAT_POLICIES`.
    """
    if remat == "none":
        return Block.__call__
    recomputing = nnx.remat(Block.__call__, policy=REMAT_POLICIES[remat], static_argnums=(2,))

    def run(block: Block, x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
        evaluates = block.drop_path.deterministic  # evaluation mode: no statistics to update
        return block(x, rate, key) if evaluates else recomputing(block, x, rate, key)

    return run
