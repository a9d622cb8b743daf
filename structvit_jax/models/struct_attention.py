"""StructAttention: structural self-attention as a layer, for StructViT and other transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float

from structvit_jax.models.layers import Dtype, Initializer, Key, Linear, Rngs, normal_init
from structvit_jax.ops import StructAttentionMaps, struct_attention, struct_attention_maps
from structvit_jax.utils.errors import UserError, check_choice


def normal_kernels(key: Key, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Draw from a normal distribution with standard deviation 1 / sqrt(number of positions in the window).

    A convolution with these kernels keeps the variance of uncorrelated features.
    """
    return normal_init(1 / math.sqrt(math.prod(shape[:-3])))(key, shape, dtype)


def delta_kernels(key: Key, shape: Sequence[int], dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Return kernels that are one at the centre of the window and zero elsewhere.

    With these kernels and stride 1, StructSA equals plain attention, because all D kernels are the same.
    """
    centre = tuple((k - 1) // 2 for k in shape[:-3])
    return jnp.zeros(shape, dtype).at[centre].set(1.0)


Operands = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]
KERNEL_INITS: dict[str, Initializer] = {"normal": normal_kernels, "delta": delta_kernels}


class StructAttention(nnx.Module):
    """Multi-head StructSA (paper, section 3): [batch, *grid, width] -> [batch, *grid, width].

    One linear layer computes queries, keys and values; another one projects the output. The paper leaves some
    details open. Here, `kernel_init` initialises the kernels, there is no bias or normalisation after the
    kernels, and logits are scaled by 1 / sqrt(width / heads).

    On several devices, call it under `jax.set_mesh`; every device then runs the kernels of
    `structvit_jax.ops.kernels` on its shard of the batch.

    Args:
      width: channels of input and output, a multiple of `heads`.
      heads: number of heads; each has its own kernels.
      grid_axes: 2 for images (height, width), 3 for video (time, height, width).
      structure_dim: D, the number of structure kernels. 0 gives plain self-attention, 1 gives ConvSA.
      key_window, value_window: odd window sides, one number for all axes or one per axis. A value
        window of 1 is the paper's element aggregation.
      key_kernels, value_kernels: "channel" for D kernels per channel (appendix A), or "shared" for D
        kernels per head (keys: dot-product correlation, equation 2; values: shared aggregation,
        equation 5).
      stride: spatial stride of the windows of keys and values.
      kernel_init: "normal", "delta", or a function (key, shape, dtype) -> array with shape
        [*window, heads, channels or 1, D].
      dtype: dtype of the computation; parameters are float32.
      rngs: `nnx.Rngs` with a stream `params`.

    Raises:
      UserError: an argument is invalid, or does not fit the others.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        grid_axes: int = 2,
        structure_dim: int = 4,
        key_window: int | Sequence[int] = 3,
        value_window: int | Sequence[int] = 3,
        key_kernels: str = "channel",
        value_kernels: str = "channel",
        stride: int = 1,
        kernel_init: str | Initializer = "normal",
        dtype: Dtype = None,
        rngs: Rngs,
    ):
        if heads < 1 or width % heads:
            raise UserError(f"StructAttention: width {width} is not a multiple of {heads} heads")
        if not structure_dim and stride != 1:
            raise UserError(
                "StructAttention: a stride needs structure_dim >= 1; plain self-attention has no window"
            )
        for kind in (key_kernels, value_kernels):
            check_choice("StructAttention kernels", kind, ("channel", "shared"))
        init = kernel_init
        if isinstance(init, str):
            init = KERNEL_INITS[check_choice("kernel_init", init, KERNEL_INITS)]

        def kernels(window: int | Sequence[int], kind: str) -> nnx.Param | None:
            if not structure_dim:
                return None
            window = (window,) * grid_axes if isinstance(window, int) else tuple(window)
            if len(window) != grid_axes or any(k < 1 or k % 2 == 0 for k in window):
                raise UserError(f"StructAttention: window {window} should be {grid_axes} odd sides")
            channels = width // heads if kind == "channel" else 1
            return nnx.Param(init(rngs.params(), (*window, heads, channels, structure_dim), jnp.float32))

        self.heads, self.stride = heads, stride
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, dtype=dtype, rngs=rngs)
        self.key_kernels = kernels(key_window, key_kernels)
        self.value_kernels = kernels(value_window, value_kernels)

    def __call__(self, x: Float[Array, "b *grid c"]) -> Float[Array, "b *grid c"]:
        y = struct_attention(*self.operands(x), stride=self.stride)
        return self.proj(y.reshape(x.shape))

    def key_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Return the grid of convolved keys and values; a stride reduces height and width."""
        return (*grid[:-2], *(-(-n // self.stride) for n in grid[-2:]))

    def maps(self, x: Float[Array, "b *grid c"], queries: ArrayLike | Sequence[int]) -> StructAttentionMaps:
        """Return the attention maps and dynamic kernels of queries (see `struct_attention_maps`)."""
        return struct_attention_maps(*self.operands(x), stride=self.stride, queries=queries)

    def operands(self, x: Float[Array, "b *grid c"]) -> Operands:
        """Return the arguments of `structvit_jax.ops.struct_attention`.

        These are queries, keys and values [batch, *grid, heads, channels], then the two kernels or None.
        """
        qkv = self.qkv(x)
        parts = jnp.split(qkv, 3, axis=-1)
        query, key, value = (part.reshape(*x.shape[:-1], self.heads, -1) for part in parts)
        params = self.key_kernels, self.value_kernels
        key_kernels, value_kernels = (None if p is None else p[...].astype(qkv.dtype) for p in params)
        return query, key, value, key_kernels, value_kernels
