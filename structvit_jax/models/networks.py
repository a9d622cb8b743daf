"""The two networks: UniFormer's four stages and DeiT's one, for images and video alike.

A network sees a grid, (height, width) or (time, height, width); that is all that tells video from
images. StructViT is UniFormer with structural self-attention, no fork of it. Attribute names follow
the released PyTorch model; `structvit_jax.convert` holds the few exceptions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from structvit_jax.models.blocks import ActivationHook, Block, run_blocks, split_key
from structvit_jax.models.layers import BatchNorm, Conv, LayerNorm, Linear, NumpyRngs, linear_init
from structvit_jax.models.positions import resize_positions
from structvit_jax.models.variants import Variant, get_variant
from structvit_jax.ops import gelu
from structvit_jax.utils.errors import UserError


class PatchEmbed(nnx.Module):
    """A strided convolution, then LayerNorm (eps 1e-5). Sides that do not divide are floored."""

    def __init__(self, inputs: int, width: int, *, window, strides, padding, norm: bool = True, dtype, rngs):
        self.norm = LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs) if norm else None
        self.proj = Conv(
            inputs, width, window=window, strides=strides, padding=padding, dtype=dtype, rngs=rngs
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


class ConvStem(nnx.Module):
    """Overlapping 3x3 convolutions of stride 2 with BatchNorm, GELU between them (images only)."""

    def __init__(self, widths: Sequence[int], *, dtype, rngs):
        self.convs = nnx.List(
            Conv(*step, window=(3, 3), strides=(2, 2), padding=(1, 1), dtype=dtype, rngs=rngs)
            for step in itertools.pairwise(widths)
        )
        self.norms = nnx.List(BatchNorm(width, dtype=dtype, rngs=rngs) for width in widths[1:])

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(gelu(x) if i else x))
        return x


def _identity(x: jax.Array) -> jax.Array:
    return x


def _mean(x: jax.Array) -> jax.Array:
    """Over all positions, in float32 at least."""
    return x.mean(axis=tuple(range(1, x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32))


class Network(nnx.Module):
    """What both networks share: the input's check, stages, pooling and head.

    Built in evaluation mode; `train()` and `eval()` switch BatchNorm and stochastic depth.
    """

    variant: Variant

    def __call__(
        self, x: jax.Array, *, key: jax.Array | None = None, place: ActivationHook = _identity
    ) -> jax.Array:
        """Logits [batch, num_classes], or pooled features [batch, width] where num_classes is 0.

        With a dense head they are those of the head plus half of the highest at any position (the released
        token labelling).

        Args:
          x: [batch, height, width, 3] or, for video, [batch, time, height, width, 3].
          key: for stochastic depth, needed in training mode where the variant's drop_path is not 0.
          place: applied to every block's input and output, as to pin them to devices.
        """
        logits, dense = self.scores(x, key=key, place=place)
        return logits if dense is None else logits + 0.5 * dense.max(axis=tuple(range(1, dense.ndim - 1)))

    def scores(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        place: ActivationHook = _identity,
        mix: ActivationHook = _identity,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The head's logits [batch, num_classes], and those of the dense head, [batch, *grid, num_classes].

        Args:
          x, key, place: as for a call.
          mix: applied to the first embedding, as MixToken does.
        """
        x = self.norm(self.features(x, key=key, place=place, mix=mix)[-1])
        pooled = _mean(x)
        if self.head is None:
            return pooled, None
        return self.head(pooled), None if self.aux_head is None else self.aux_head(x)

    def pooled(self, x: jax.Array) -> jax.Array:
        """What the head sees, [batch, width]: the mean over positions of the last map, normalised."""
        return _mean(self.norm(self.features(x)[-1]))

    def features(
        self,
        x: jax.Array,
        *,
        key: jax.Array | None = None,
        place: ActivationHook = _identity,
        mix: ActivationHook = _identity,
    ) -> tuple[jax.Array, ...]:
        """The maps [batch, *grid, width] after the four stages (DeiT: after each quarter of its depth)."""
        raise NotImplementedError

    def grid(self, size: int) -> tuple[int, ...]:
        """Positions along height and width of the last map of square images."""
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return jax.eval_shape(self.features, image)[-1].shape[1:-1]

    def dense_scores(self, x: jax.Array) -> jax.Array:
        """Logits of every position, [batch, *grid, num_classes]: the dense head's, or else the head's."""
        head: Any = self.head if self.aux_head is None else self.aux_head
        return head(self.norm(self.features(x)[-1]))

    @property
    def drop_rates(self) -> list[float]:
        """Of stochastic depth, for all blocks in order: from 0 up to the variant's drop_path."""
        return np.linspace(0.0, self.variant.drop_path, sum(self.variant.depths)).tolist()

    def _rows(self, lengths, key):
        """(rates, keys) for rows of so many blocks each."""
        rates, keys = self.drop_rates, split_key(key, sum(lengths))
        ends = list(itertools.accumulate(lengths, initial=0))
        return [(rates[start:end], keys[start:end]) for start, end in itertools.pairwise(ends)]

    def _finish(self, norm, num_classes, rngs):
        """The final norm, and the heads, whose logits are float32 at least."""
        self.norm = norm

        def head():
            return Linear(self.variant.widths[-1], num_classes, dtype=None, rngs=rngs)

        self.head = head() if num_classes else None
        self.aux_head = head() if num_classes and self.variant.token_labels else None

    def _check(self, x):
        v = self.variant
        layout = "[batch, time, height, width, 3]" if v.video else "[batch, height, width, 3]"
        if x.ndim != v.grid_axes + 2 or x.shape[-1] != 3:
            kind = "a video" if v.video else "an image"
            raise UserError(f"{kind} model takes {layout}; the input has shape {list(x.shape)}")
        smallest = v.smallest_input
        if any(n < least for n, least in zip(x.shape[1:-1], smallest, strict=True)):
            least, got = ("x".join(map(str, s)) for s in (smallest, x.shape[1:-1]))
            raise UserError(f"input {got} leaves an empty grid; this model needs {least} at least")


class UniFormer(Network):
    """UniFormer and StructViT: two stages of convolution blocks, two of attention blocks, BatchNorm, mean."""

    def __init__(self, v: Variant, *, num_classes: int, rngs):
        self.variant = v
        for stage, depth in enumerate(v.depths):
            blocks = [Block(v, stage, conv=stage < 2, rngs=rngs) for _ in range(depth)]
            setattr(self, f"patch_embed{stage + 1}", _uniformer_embed(v, stage, rngs))
            setattr(self, f"blocks{stage + 1}", nnx.List(blocks))
        self._finish(BatchNorm(v.widths[-1], dtype=v.compute_dtype, rngs=rngs), num_classes, rngs)

    def features(self, x, *, key=None, place=_identity, mix=_identity) -> tuple[jax.Array, ...]:
        self._check(x)
        rows, maps = self._rows(self.variant.depths, key), []
        for stage, (rates, keys) in enumerate(rows, start=1):
            with jax.named_scope(f"stage{stage}"):
                x = getattr(self, f"patch_embed{stage}")(x)
                x = place(mix(x) if stage == 1 else x)
                x = run_blocks(getattr(self, f"blocks{stage}"), x, rates, keys, self.variant, place)
            maps.append(x)
        return tuple(maps)


def _uniformer_embed(v, stage, rngs):
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
    """DeiT without a class token, which has no place on the grid: LayerNorm, then the mean over positions.

    Positions are learned, jointly over time and space, for the variant's own grid, and resized
    bicubically for other grids, as in torch.
    """

    def __init__(self, v: Variant, *, num_classes: int, rngs):
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

    def features(self, x, *, key=None, place=_identity, mix=_identity) -> tuple[jax.Array, ...]:
        self._check(x)
        x = mix(self.patch_embed(x))
        positions = self.pos_embed[...]
        x = place(x + resize_positions(positions, x.shape[1:-1]).astype(x.dtype))
        ends = [math.ceil(len(self.blocks) * quarter / 4) for quarter in range(5)]
        quarters = [end - start for start, end in itertools.pairwise(ends)]
        maps = []
        for quarter, (rates, keys) in enumerate(self._rows(quarters, key)):
            row = self.blocks[ends[quarter] : ends[quarter + 1]]
            with jax.named_scope(f"quarter{quarter + 1}"):
                x = run_blocks(row, x, rates, keys, self.variant, place)
            maps.append(x)
        return tuple(maps)


def create_model(name: str, *, num_classes: int, seed: int | None = 0, **overrides) -> Network:
    """Builds a model by name, with fresh weights, in evaluation mode.

    Args:
      name: see `list_models`; "structvit_s_4_1_video" is StructViT-S, D = 4, stride 1, for video.
      num_classes: outputs of the head; 0 leaves the head out, so that calls give pooled features.
      seed: of the weights; None draws none, for a model that gets others or is only counted.
      **overrides: fields of `Variant`, as `structure_dim=8` or `drop_path=0.2`.

    Raises:
      UserError: an unknown name or override, or one that does not fit the others.
    """
    variant = get_variant(name, **overrides)
    if min(num_classes, seed or 0) < 0:
        raise UserError(f"num_classes={num_classes} and seed={seed} should not be negative")
    network = {"uniformer": UniFormer, "deit": DeiT}[variant.network]
    return network(variant, num_classes=num_classes, rngs=NumpyRngs(seed))
