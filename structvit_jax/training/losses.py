"""Losses and metrics of a batch; masked examples do not count."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def smooth_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Return smoothed labels: int [batch] -> float32 [batch, classes].

    Every class has the target smoothing / classes, and the label 1 - smoothing in addition.
    """
    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean cross-entropy: logits and targets [batch, classes], mask bool [batch] -> float32 []."""
    return masked_mean(optax.softmax_cross_entropy(logits, targets), mask)


def token_labelling(
    logits: jax.Array,
    dense_logits: jax.Array,
    targets: jax.Array,
    dense_targets: jax.Array,
    mask: jax.Array,
    weight: float,
) -> jax.Array:
    """Return the loss of the head plus `weight` times the loss of the dense head, both cross-entropies.

    The loss of the dense head is the mean over positions.

    Args:
      logits, targets: of the head, [batch, classes].
      dense_logits, dense_targets: of the dense head, [batch, ..., classes].
      mask: bool [batch].
      weight: config.train.dense_weight.
    """
    positions = optax.softmax_cross_entropy(dense_logits, dense_targets)
    per_image = positions.mean(axis=tuple(range(1, positions.ndim)))
    return cross_entropy(logits, targets, mask) + weight * masked_mean(per_image, mask)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Return the mean over unmasked examples, 0 if there are none: both [batch] -> []."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Return whether each label is among the k highest logits: [batch, classes], int [batch] -> bool [batch].

    Ties go to the lower class; an example with a NaN among its logits is never correct.
    """
    label_logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    lower_class = jnp.arange(logits.shape[-1]) < labels[:, None]
    ahead = (logits > label_logit) | ((logits == label_logit) & lower_class)
    return (jnp.sum(ahead, axis=-1) < k) & ~jnp.isnan(logits).any(axis=-1)
