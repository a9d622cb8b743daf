"""The two networks: UniFormer's four stages and DeiT's one, for images and video alike.

Video differs from images only in the grid: (time, height, width) instead of (height, width). StructViT is
UniFormer with structural self-attention. Attribute names follow the released PyTorch model;
`structvit_jax.convert` holds the few exceptions.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from structvit_jax.models.blocks import Block, run_block, split_key
from structvit_jax.models.layers import (
    BatchNorm,
    Conv,
    Dtype,
    LayerNorm,
    Linear,
    NumpyRngs,
    Rngs,
    linear_init,
)
from structvit_jax.models.positions import resize_positions
from structvit_jax.models.variants import Variant, get_variant
from structvit_jax.ops import gelu, use_kernels
from structvit_jax.utils.errors import UserError

Inputs = Float[jax.Array | np.ndarray, "b *grid rgb"]  # images or video
# Called with the name of an embedding or a block, as "patch_embed1" or "blocks1.0", and its output [batch,
# *grid, width]; returns what the next layer sees.
ActivationHook = Callable[[str, jax.Array], jax.Array]


class PatchEmbed(nnx.Module):
    """A strided convolution, then LayerNorm (eps 1e-5). Sides that do not divide are floored."""

    def __init__(
        self,
        inputs: int,
        width: int,
        *,
        window: Sequence[int],
        strides: Sequence[int],
        padding: Sequence[int],
        norm: bool = True,
        dtype: Dtype,
        rngs: Rngs,
    ):
        self.norm = LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs) if norm else None
        self.proj = Conv(
            inputs, width, window=window, strides=strides, padding=padding, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "b *grid i"]) -> Float[Array, "b *_ c"]:
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


class ConvStem(nnx.Module):
    """Overlapping 3x3 convolutions of stride 2 with BatchNorm, GELU between them (images only)."""

    def __init__(self, widths: Sequence[int], *, dtype: Dtype, rngs: Rngs):
        self.convs = nnx.List(
            Conv(*step, window=(3, 3), strides=(2, 2), padding=(1, 1), dtype=dtype, rngs=rngs)
            for step in itertools.pairwise(widths)
        )
        self.norms = nnx.List(BatchNorm(width, dtype=dtype, rngs=rngs) for width in widths[1:])

    def __call__(self, x: Float[Array, "b h w i"]) -> Float[Array, "b _ _ c"]:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(gelu(x) if i else x))
        return x


def _identity(name: str, x: jax.Array) -> jax.Array:
    return x


def _mean(x: jax.Array) -> jax.Array:
    """Return the mean over all positions, in float32 at least."""
    return x.mean(axis=tuple(range(1, x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32))


class Network(nnx.Module):
    """What both networks share: the input's check, pooling and heads.

    Built in evaluation mode; `train()` and `eval()` switch BatchNorm and stochastic depth.
    """

    variant: Variant
    norm: BatchNorm | LayerNorm
    head: Linear | None
    aux_head: Linear | None

    def __call__(
        self,
        x: Inputs,
        *,
        key: jax.Array | None = None,
        hook: ActivationHook = _identity,
    ) -> Float[Array, "b classes"]:
        """Return logits [batch, num_classes], or pooled features [batch, width] if num_classes is 0.

        With a dense head, half of its highest logit at any position is added (the released token labelling).

        Args:
          x: [batch, height, width, 3] or, for video, [batch, time, height, width, 3].
          key: for stochastic depth, needed in training mode if the variant's drop_path is not 0.
          hook: applied to the output of every embedding and block, as to shard it.

        Raises:
          UserError: an input of another shape, or one that leaves an empty grid.
        """
        logits, dense = self.scores(x, key=key, hook=hook)
        return logits if dense is None else logits + 0.5 * dense.max(axis=tuple(range(1, dense.ndim - 1)))

    def scores(
        self,
        x: Inputs,
        *,
        key: jax.Array | None = None,
        hook: ActivationHook = _identity,
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b *_ classes"] | None]:
        """Return logits of the head [batch, num_classes] and of the dense head [batch, *grid, num_classes].

        The arguments are those of a call.
        """
        with self._kernels():
            x = self.norm(self.features(x, key=key, hook=hook)[-1])
            pooled = _mean(x)
            if self.head is None:
                return pooled, None
            return self.head(pooled), None if self.aux_head is None else self.aux_head(x)

    def pooled(self, x: Inputs) -> Float[Array, "b c"]:
        """Return the input of the head, [batch, width]: the normalised last map, averaged over positions."""
        with self._kernels():
            return _mean(self.norm(self.features(x)[-1]))

    def features(
        self,
        x: Inputs,
        *,
        key: jax.Array | None = None,
        hook: ActivationHook = _identity,
    ) -> tuple[jax.Array, ...]:
        """Return the maps [batch, *grid, width] after the four stages, or DeiT's quarters."""
        raise NotImplementedError

    def grid(self, size: int) -> tuple[int, ...]:
        """Return the height and width of the last map of square images."""
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return jax.eval_shape(self.features, image)[-1].shape[1:-1]

    def dense_scores(self, x: Inputs) -> Float[Array, "b *_ classes"]:
        """Return logits of all positions, [batch, *grid, num_classes], by the dense head or else the head."""
        head: Any = self.head if self.aux_head is None else self.aux_head
        with self._kernels():
            return head(self.norm(self.features(x)[-1]))

    @property
    def drop_rates(self) -> list[float]:
        """Rates of stochastic depth of all blocks in order: from 0 up to the variant's drop_path."""
        return np.linspace(0.0, self.variant.drop_path, sum(self.variant.depths)).tolist()

    def _rates_and_keys(self, key: jax.Array | None) -> Iterator[tuple[float, jax.Array | None]]:
        """Return the rate of stochastic depth of each block and its key."""
        rates = self.drop_rates
        return zip(rates, split_key(key, len(rates)), strict=True)

    def _kernels(self) -> contextlib.AbstractContextManager[None]:
        """Apply the variant's `kernels`; "auto" leaves what the caller has set."""
        chosen = self.variant.kernels
        return contextlib.nullcontext() if chosen == "auto" else use_kernels(chosen)

    def _finish(self, norm: BatchNorm | LayerNorm, num_classes: int, rngs: Rngs) -> None:
        """Add the final norm, and the heads, whose logits are float32 at least."""
        self.norm = norm

        def head() -> Linear:
            return Linear(self.variant.widths[-1], num_classes, dtype=None, rngs=rngs)

        self.head = head() if num_classes else None
        self.aux_head = head() if num_classes and self.variant.token_labels else None

    def _checked(self, x: jax.Array | np.ndarray) -> jax.Array:
        v = self.variant
        layout = "[batch, time, height, width, 3]" if v.video else "[batch, height, width, 3]"
        if x.ndim != v.grid_axes + 2 or x.shape[-1] != 3:
            kind = "a video" if v.video else "an image"
            raise UserError(f"{kind} model takes {layout}; the input has shape {list(x.shape)}")
        smallest = v.smallest_input
        if any(n < least for n, least in zip(x.shape[1:-1], smallest, strict=True)):
            least, got = ("x".join(map(str, s)) for s in (smallest, x.shape[1:-1]))
            raise UserError(f"input {got} leaves an empty grid; this model needs {least} at least")
        return jnp.asarray(x)


class UniFormer(Network):
    """UniFormer and StructViT: two stages of convolution blocks, two of attention blocks, BatchNorm, mean."""

    def __init__(self, v: Variant, *, num_classes: int, rngs: Rngs):
        self.variant = v
        for stage, depth in enumerate(v.depths):
            blocks = [Block(v, stage, conv=stage < 2, rngs=rngs) for _ in range(depth)]
            setattr(self, f"patch_embed{stage + 1}", _uniformer_embed(v, stage, rngs))
            setattr(self, f"blocks{stage + 1}", nnx.List(blocks))
        self._finish(BatchNorm(v.widths[-1], dtype=v.compute_dtype, rngs=rngs), num_classes, rngs)

    def features(
        self,
        x: Inputs,
        *,
        key: jax.Array | None = None,
        hook: ActivationHook = _identity,
    ) -> tuple[jax.Array, ...]:
        run, draws, maps = run_block(self.variant.remat), self._rates_and_keys(key), []
        y = self._checked(x)
        with self._kernels():
            for stage in range(1, 5):
                with jax.named_scope(f"stage{stage}"):
                    y = hook(f"patch_embed{stage}", getattr(self, f"patch_embed{stage}")(y))
                    for i, block in enumerate(getattr(self, f"blocks{stage}")):
                        y = hook(f"blocks{stage}.{i}", run(block, y, *next(draws)))
                maps.append(y)
        return tuple(maps)


def _uniformer_embed(v: Variant, stage: int, rngs: Rngs) -> nnx.Module:
    inputs, width = (3, *v.widths)[stage : stage + 2]
    if v.stem == "conv":
        return ConvStem(
            [3, width // 2, width] if stage == 0 else [inputs, width], dtype=v.compute_dtype, rngs=rngs
        )
    side = v.patch if stage == 0 else 2
    window, strides, padding = [side, side], [side, side], [0, 0]
    if v.video:  # time is halved once, by an overlapping stem
        window = [3 if stage == 0 else 1, *window]
        strides = [2 if stage == 0 else 1, *strides]
        padding = [1 if stage == 0 else 0, *padding]
    return PatchEmbed(
        inputs, width, window=window, strides=strides, padding=padding, dtype=v.compute_dtype, rngs=rngs
    )


class DeiT(Network):
    """DeiT without a class token, which is not on the grid: LayerNorm, then the mean over positions.

    Position embeddings are learned, jointly over time and space, for the variant's own grid, and resized
    bicubically for other grids, as in torch.
    """

    def __init__(self, v: Variant, *, num_classes: int, rngs: Rngs):
        self.variant = v
        (width,), (depth,) = v.widths, v.depths
        tubelet = v.smallest_input  # tubelets do not overlap
        self.patch_embed = PatchEmbed(
            3,
            width,
            window=tubelet,
            strides=tubelet,
            padding=[0] * v.grid_axes,
            norm=False,
            dtype=v.compute_dtype,
            rngs=rngs,
        )
        size = (v.num_frames,) * v.video + (v.image_size,) * 2
        grid = [max(1, n // side) for n, side in zip(size, tubelet, strict=True)]
        self.pos_embed = nnx.Param(linear_init(rngs.params(), (*grid, width), jnp.float32))
        self.blocks = nnx.List([Block(v, 0, conv=False, rngs=rngs) for _ in range(depth)])
        self._finish(LayerNorm(width, epsilon=1e-6, dtype=v.compute_dtype, rngs=rngs), num_classes, rngs)

    def features(
        self,
        x: Inputs,
        *,
        key: jax.Array | None = None,
        hook: ActivationHook = _identity,
    ) -> tuple[jax.Array, ...]:
        run, draws, maps = run_block(self.variant.remat), self._rates_and_keys(key), []
        with self._kernels():
            y = self.patch_embed(self._checked(x))
            y = hook("patch_embed", y + resize_positions(self.pos_embed[...], y.shape[1:-1]).astype(y.dtype))
            ends = [math.ceil(len(self.blocks) * quarter / 4) for quarter in range(5)]
            for quarter, (start, end) in enumerate(itertools.pairwise(ends), start=1):
                with jax.named_scope(f"quarter{quarter}"):
                    for i in range(start, end):
                        y = hook(f"blocks.{i}", run(self.blocks[i], y, *next(draws)))
                maps.append(y)
        return tuple(maps)


def create_model(name: str, *, num_classes: int, seed: int | None = 0, **overrides: Any) -> Network:
    """Build a model by name, with random weights, in evaluation mode.

    Args:
      name: see `list_models`; "structvit_s_4_1_video" is StructViT-S, D = 4, stride 1, for video.
      num_classes: outputs of the head; 0 leaves the head out, so that calls return pooled features.
      seed: of the weights; None makes them zero, for a model whose weights are replaced.
      **overrides: fields of `Variant`, as `structure_dim=8` or `kernels="reference"`.

    Raises:
      UserError: an unknown name or override, or one that does not fit the others.
    """
    variant = get_variant(name, **overrides)
    if min(num_classes, seed or 0) < 0:
        raise UserError(f"num_classes={num_classes} and seed={seed} should not be negative")
    network = {"uniformer": UniFormer, "deit": DeiT}[variant.network]
    return network(variant, num_classes=num_classes, rngs=NumpyRngs(seed))
