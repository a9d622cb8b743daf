"""Token labelling (from LV-ViT, as UniFormer uses it): a target for every position, and MixToken.

Targets are read from a teacher's label maps where the crop lies in the image; without maps, every position
has the label of its image.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from structvit_jax.training import losses, mixing

_SAMPLES = 2  # sampling points of the map along each side of a position


def dense_targets(batch: Mapping[str, jax.Array], grid: tuple[int, ...], classes: int) -> jax.Array:
    """Return the targets of all positions, float32 [batch, *grid, classes], each summing to one.

    The map is interpolated bilinearly at the positions of the crop in the image, and is zero outside the
    image. The difference to a sum of one is spread over all classes.

    Args:
      batch: with `map_classes` and `map_scores` [batch, height, width, k], and `pose` [batch, 2, 3], which
        maps a point (x, y, 1) of the crop to the image, with x and y from 0 to 1 in both.
      grid: positions along height and width.
      classes: their number.
    """
    scores, chosen = jnp.nan_to_num(batch["map_scores"].astype(jnp.float32)), batch["map_classes"]
    dense = jnp.einsum("bhwk,bhwkc->bhwc", scores, jax.nn.one_hot(chosen, classes))
    ys, xs = ((jnp.arange(n * _SAMPLES) + 0.5) / (n * _SAMPLES) for n in grid)
    points = jnp.stack([*jnp.meshgrid(xs, ys), jnp.ones((len(ys), len(xs)))], axis=-1)
    positions = jnp.einsum("bij,yxj->byxi", batch["pose"], points, precision="highest")
    inside = jnp.all((positions >= 0) & (positions <= 1), axis=-1).astype(jnp.float32)
    rows, columns = (_hats(positions[..., axis], dense.shape[2 - axis]) for axis in (1, 0))
    weights = jnp.einsum("byx,byxh,byxw->byxhw", inside, rows, columns)
    weights = weights.reshape(-1, grid[0], _SAMPLES, grid[1], _SAMPLES, *dense.shape[1:3]).mean(axis=(2, 4))
    read = jnp.einsum("byxhw,bhwc->byxc", weights, dense)
    return read + (1 - read.sum(axis=-1, keepdims=True)) / classes


def _hats(positions: jax.Array, cells: int) -> jax.Array:
    """Return linear interpolation weights [..., cells] of the cells' centres, for positions from 0 to 1."""
    centres = jnp.clip(positions * cells - 0.5, 0, cells - 1)
    return jnp.maximum(0, 1 - jnp.abs(centres[..., None] - jnp.arange(cells)))


class MixToken:
    """Replaces a box of the first embedding with that of the reversed batch, in one forward pass.

    As released: one box for the batch, with lambda drawn from Beta(alpha, alpha). In the targets, on the
    coarser grid of positions, the edges of the box are rounded down.
    """

    def __init__(self, key: jax.Array, alpha: float):
        self._key, self._alpha = key, alpha

    def __call__(self, x: jax.Array) -> jax.Array:
        """Mix an embedding [batch, [time,] height, width, channels]."""
        lam_key, position = jax.random.split(self._key)
        lam = jax.random.beta(lam_key, self._alpha, self._alpha)
        self._sides = x.shape[-3:-1]
        self._edges = mixing.box_edges(position, lam, *self._sides)
        return jnp.where(mixing.box(self._edges, *self._sides)[:, :, None], x[::-1], x)

    def targets(self, whole: jax.Array, dense: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mix targets like the embedding: [batch, classes] of images, [batch, ..., height, width, classes]
        of their positions. Call it after the embedding was mixed."""
        sides = dense.shape[-3:-1]
        ratios = [fine // coarse for fine, coarse in zip(self._sides, sides, strict=True)]
        edges = [(low // n, high // n) for (low, high), n in zip(self._edges, ratios, strict=True)]
        inside = mixing.box(edges, *sides)
        kept = 1 - inside.mean()
        dense = jnp.where(inside[:, :, None], dense[::-1], dense)
        return kept * whole + (1 - kept) * whole[::-1], dense


def loss(
    logits: jax.Array,
    dense_logits: jax.Array,
    whole: jax.Array,
    dense: jax.Array,
    mask: jax.Array,
    weight: float,
) -> jax.Array:
    """Return the cross-entropy of the head plus `weight` times that of the dense head, a mean over positions.

    Args:
      logits, whole: of the head and its targets, [batch, classes].
      dense_logits, dense: of the dense head, [batch, ..., classes].
      mask: bool [batch].
      weight: config.train.dense_weight.
    """
    positions = optax.softmax_cross_entropy(dense_logits, dense)
    per_image = positions.mean(axis=tuple(range(1, positions.ndim)))
    return losses.cross_entropy(logits, whole, mask) + weight * losses.masked_mean(per_image, mask)
