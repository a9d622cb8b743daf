"""Losses and scores of a batch; masked examples count nowhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax


def smooth_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Targets s / classes off, 1 - s + s / classes on: int [batch] -> float32 [batch, classes]."""
    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def cross_entropy(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean cross-entropy: logits and targets [batch, classes], mask bool [batch] -> scalar float32."""
    return masked_mean(optax.softmax_cross_entropy(logits, targets), mask)


def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1)


def in_top(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether each label is among the k highest logits: bool [batch].

    Ties go to the lower class; an example with a NaN among its logits is never correct.
    """
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    lower_class = jnp.arange(logits.shape[-1]) < labels[:, None]
    ahead = (logits > own) | ((logits == own) & lower_class)
    return (jnp.sum(ahead, axis=-1) < k) & ~jnp.isnan(logits).any(axis=-1)
