"""The two networks, UniFormer and DeiT, for images and video.

Video differs from images only in the grid: (time, height, width) instead of (height, width). StructViT is
UniFormer with structural self-attention. Attribute names are those of the released PyTorch model, with a few
exceptions that `structvit_jax.convert` lists.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
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
    Sides,
    linear_init,
)
from structvit_jax.models.positions import resize_positions
from structvit_jax.models.variants import Variant, get_variant
from structvit_jax.ops import gelu, use_kernels
from structvit_jax.utils.errors import UserError

Inputs = Float[jax.Array | np.ndarray, "b *grid rgb"]  # images or video
# A function of the name of an embedding or block, such as "patch_embed1" or "blocks1.0", and of its output
# [batch, *grid, width]. It returns the input of the next layer.
ActivationHook = Callable[[str, jax.Array], jax.Array]
Layer = Callable[..., jax.Array]  # an embedding, or a Block


class PatchEmbed(nnx.Module):
    """A strided convolution, followed by LayerNorm (eps 1e-5) if `norm`.

    Sizes are rounded down: pixels that do not fill a patch are dropped.
    """

    def __init__(
        self, inputs: int, width: int, *, window: Sides, strides: Sides, norm: bool, dtype: Dtype, rngs: Rngs
    ):
        # The norm is created first: the order of creation decides which weights a seed gives.
        self.norm = LayerNorm(width, epsilon=1e-5, dtype=dtype, rngs=rngs) if norm else None
        self.proj = Conv(inputs, width, window=window, strides=strides, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b *grid i"]) -> Float[Array, "b *_ c"]:
        x = self.proj(x)
        return x if self.norm is None else self.norm(x)


class ConvStem(nnx.Module):
    """Overlapping 3x3 convolutions with stride 2 and BatchNorm, and GELU between them (images only)."""

    def __init__(self, widths: Sequence[int], *, dtype: Dtype, rngs: Rngs):
        self.convs = nnx.List(
            Conv(*step, window=(3, 3), strides=(2, 2), dtype=dtype, rngs=rngs)
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
    """Return the mean over all positions, in at least float32."""
    return x.mean(axis=tuple(range(1, x.ndim - 1)), dtype=jnp.promote_types(x.dtype, jnp.float32))


class Network(nnx.Module):
    """Base class of both networks: checks the input, loops over blocks, and has pooling and heads.

    A network is built in evaluation mode. `train()` and `eval()` switch BatchNorm and stochastic depth.
    """

    variant: Variant
    norm: BatchNorm | LayerNorm
    head: Linear | None
    aux_head: Linear | None

    def __call__(
        self, x: Inputs, *, key: jax.Array | None = None, hook: ActivationHook = _identity
    ) -> Float[Array, "b classes"]:
        """Return logits [batch, num_classes], or pooled features [batch, width] if num_classes is 0.

        If there is a dense head, half of its maximum over all positions is added to the logits, as in the
        released models with token labelling.

        Args:
          x: [batch, height, width, 3] or, for video, [batch, time, height, width, 3].
          key: random key for stochastic depth; needed in training mode if the variant's drop_path is not 0.
          hook: applied to the output of every embedding and block, for example to shard it.

        Raises:
          UserError: the input has the wrong shape, or is so small that a grid would be empty.
        """
        logits, dense = self._heads(self.features(x, key=key, hook=hook)[-1])
        return logits if dense is None else logits + 0.5 * dense.max(axis=tuple(range(1, dense.ndim - 1)))

    def scores(
        self, x: Inputs, *, key: jax.Array | None = None, hook: ActivationHook = _identity
    ) -> tuple[Float[Array, "b classes"], Float[Array, "b *_ classes"] | None]:
        """Return logits of the head [batch, num_classes] and of the dense head [batch, *grid, num_classes].

        The second is None without a dense head. The arguments are those of `__call__`.
        """
        return self._heads(self.features(x, key=key, hook=hook)[-1])

    def dense_scores(self, x: Inputs) -> Float[Array, "b *_ classes"]:
        """Return logits of all positions, [batch, *grid, num_classes], by the dense head or else the head."""
        head = self.head if self.aux_head is None else self.aux_head
        assert head is not None, "the model has no head: num_classes is 0"
        with self._kernels():
            return head(self.norm(self.features(x)[-1]))

    def pooled(self, x: Inputs) -> Float[Array, "b c"]:
        """Return the input of the head, [batch, width]: the mean of the normalised last feature map."""
        with self._kernels():
            return _mean(self.norm(self.features(x)[-1]))

    def features(
        self, x: Inputs, *, key: jax.Array | None = None, hook: ActivationHook = _identity
    ) -> tuple[jax.Array, ...]:
        """Return the feature maps [batch, *grid, width] after each of the four stages.

        For DeiT, which has one stage, they are those after each quarter of the blocks. The arguments are
        those of `__call__`.
        """
        rates, maps = self.drop_rates, []
        draws = zip(rates, split_key(key, len(rates)), strict=True)
        run, y = run_block(self.variant.remat), self._checked(x)
        with self._kernels():
            for scope, layers in self._stages().items():
                with jax.named_scope(scope):
                    for name, layer in layers.items():
                        y = run(layer, y, *next(draws)) if isinstance(layer, Block) else layer(y)
                        y = hook(name, y)
                maps.append(y)
        return tuple(maps)

    def grid(self, size: int) -> tuple[int, ...]:
        """Return the height and width of the last feature map for square images with this side."""
        image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
        return jax.eval_shape(self.features, image)[-1].shape[1:-1]

    @property
    def drop_rates(self) -> list[float]:
        """Rates of stochastic depth of all blocks, in order: from 0 up to the variant's drop_path."""
        return np.linspace(0.0, self.variant.drop_path, sum(self.variant.depths)).tolist()

    def _stages(self) -> dict[str, dict[str, Layer]]:
        """Return the embeddings and blocks of every stage by name, in the order of the forward pass."""
        raise NotImplementedError

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Return logits (without a head: pooled features) and dense logits (or None) of the last map."""
        with self._kernels():
            x = self.norm(x)
            pooled = _mean(x)
            if self.head is None:
                return pooled, None
            return self.head(pooled), None if self.aux_head is None else self.aux_head(x)

    def _kernels(self) -> contextlib.AbstractContextManager[None]:
        """Return the context for the variant's `kernels`; "auto" keeps the choice of the caller."""
        chosen = self.variant.kernels
        return contextlib.nullcontext() if chosen == "auto" else use_kernels(chosen)

    def _add_heads(self, num_classes: int, rngs: Rngs) -> None:
        """Add the heads; their logits are at least float32."""
        width, dense = self.variant.widths[-1], self.variant.token_labels
        self.head = Linear(width, num_classes, dtype=None, rngs=rngs) if num_classes else None
        self.aux_head = Linear(width, num_classes, dtype=None, rngs=rngs) if num_classes and dense else None

    def _checked(self, x: jax.Array | np.ndarray) -> jax.Array:
        v = self.variant
        if x.ndim != v.grid_axes + 2 or x.shape[-1] != 3:
            takes = "a video model takes [batch, time," if v.video else "an image model takes [batch,"
            raise UserError(f"{takes} height, width, 3]; the input has shape {list(x.shape)}")
        if any(n < least for n, least in zip(x.shape[1:-1], v.smallest_input, strict=True)):
            least, got = ("x".join(map(str, sides)) for sides in (v.smallest_input, x.shape[1:-1]))
            raise UserError(
                f"input {got} is too small: a grid would be empty; this model needs {least} at least"
            )
        return jnp.asarray(x)


class UniFormer(Network):
    """UniFormer and StructViT: two stages of convolution blocks, then two stages of attention blocks.

    The last feature map passes BatchNorm and is averaged over all positions.
    """

    def __init__(self, v: Variant, *, num_classes: int, rngs: Rngs):
        self.variant = v
        for stage, depth in enumerate(v.depths):
            blocks = [Block(v, stage, conv=stage < 2, rngs=rngs) for _ in range(depth)]
            setattr(self, f"patch_embed{stage + 1}", _uniformer_embed(v, stage, rngs))
            setattr(self, f"blocks{stage + 1}", nnx.List(blocks))
        self.norm = BatchNorm(v.widths[-1], dtype=v.compute_dtype, rngs=rngs)
        self._add_heads(num_classes, rngs)

    def _stages(self) -> dict[str, dict[str, Layer]]:
        stages = {}
        for stage in range(1, 5):
            embed, blocks = f"patch_embed{stage}", f"blocks{stage}"
            layers = {f"{blocks}.{i}": block for i, block in enumerate(getattr(self, blocks))}
            stages[f"stage{stage}"] = {embed: getattr(self, embed)} | layers
        return stages


def _uniformer_embed(v: Variant, stage: int, rngs: Rngs) -> PatchEmbed | ConvStem:
    inputs, width = (3, *v.widths)[stage : stage + 2]
    if v.stem == "conv":
        widths = [3, width // 2, width] if stage == 0 else [inputs, width]
        return ConvStem(widths, dtype=v.compute_dtype, rngs=rngs)
    sides, times = (v.patch if stage == 0 else 2,) * 2, (3, 2) if stage == 0 else (1, 1)
    # Patches do not overlap in space. In time, those of the first embedding do (3 frames, stride 2), and the
    # other embeddings keep the number of frames.
    window, strides = ((time,) * v.video + sides for time in times)
    return PatchEmbed(
        inputs, width, window=window, strides=strides, norm=True, dtype=v.compute_dtype, rngs=rngs
    )


class DeiT(Network):
    """DeiT without a class token, which would not be on the grid. The head reads the mean over positions.

    Position embeddings are learned jointly over time and space, for the grid of the variant. For other grids
    they are resized by bicubic interpolation, as in PyTorch.
    """

    def __init__(self, v: Variant, *, num_classes: int, rngs: Rngs):
        self.variant = v
        (width,), (depth,), dtype = v.widths, v.depths, v.compute_dtype
        tubelet = v.smallest_input  # size of a token, ([tubelet,] patch, patch); tokens do not overlap
        self.patch_embed = PatchEmbed(
            3, width, window=tubelet, strides=tubelet, norm=False, dtype=dtype, rngs=rngs
        )
        size = (v.num_frames,) * v.video + (v.image_size,) * 2
        grid = [max(1, n // side) for n, side in zip(size, tubelet, strict=True)]
        self.pos_embed = nnx.Param(linear_init(rngs.params(), (*grid, width), jnp.float32))
        self.blocks = nnx.List([Block(v, 0, conv=False, rngs=rngs) for _ in range(depth)])
        self.norm = LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self._add_heads(num_classes, rngs)

    def _stages(self) -> dict[str, dict[str, Layer]]:
        blocks = {f"blocks.{i}": block for i, block in enumerate(self.blocks)}
        ends = [math.ceil(len(blocks) * quarter / 4) for quarter in range(5)]
        stages: dict[str, dict[str, Layer]] = {}
        for quarter, (start, end) in enumerate(itertools.pairwise(ends), start=1):
            stages[f"quarter{quarter}"] = dict(itertools.islice(blocks.items(), start, end))
        stages["quarter1"] = {"patch_embed": self._embed} | stages["quarter1"]
        return stages

    def _embed(self, x: jax.Array) -> jax.Array:
        y = self.patch_embed(x)
        return y + resize_positions(self.pos_embed[...], y.shape[1:-1]).astype(y.dtype)


def create_model(name: str, *, num_classes: int, seed: int | None = 0, **overrides: Any) -> Network:
    """Build a model by name, with random weights, in evaluation mode.

    Args:
      name: see `list_models`. For example, "structvit_s_4_1_video" is StructViT-S with D = 4 and stride 1
        for video.
      num_classes: number of outputs. With 0 there is no head, and calls return pooled features.
      seed: seed of the weights. None sets them to zero, for a model whose weights will be replaced.
      **overrides: fields of `Variant`, such as `structure_dim=8` or `kernels="reference"`.

    Raises:
      UserError: a name or override is unknown or invalid, or does not fit the others.
    """
    variant = get_variant(name, **overrides)
    if min(num_classes, seed or 0) < 0:
        raise UserError(f"num_classes={num_classes} and seed={seed} should not be negative")
    network = {"uniformer": UniFormer, "deit": DeiT}[variant.network]
    return network(variant, num_classes=num_classes, rngs=NumpyRngs(seed))
