"""AdamW with UniFormer's decay rule, warm-up and cosine."""

from __future__ import annotations

import jax
import ml_collections
import optax

from structvit_jax.config import Durations


def learning_rate(config: ml_collections.ConfigDict, durations: Durations) -> optax.Schedule:
    """Linear from `warmup_lr` to `lr`, then half a cosine that would reach `end_lr` after the last step."""
    total, warmup = durations.total, durations.warmup
    ramp = optax.linear_schedule(config.warmup_lr, config.lr, max(warmup, 1))
    cosine = optax.cosine_decay_schedule(config.lr, max(total - warmup, 1), alpha=config.end_lr / config.lr)
    return optax.join_schedules([ramp, cosine], [warmup])


def decays(name: str, array: jax.Array) -> bool:
    """Weight decay spares vectors (biases, norms, layer scales) and DeiT's position table.

    Depthwise kernels decay, position encoding's included, as in the released UniFormer; so do the
    structure kernels, which the paper leaves open.
    """
    return array.ndim > 1 and name != "pos_embed"


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW's direction, after clipping by global norm where `clip_norm` is set.

    The step takes it times minus the learning rate, which is a function of the step alone.
    """
    adamw = [
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps),
        optax.add_decayed_weights(
            config.weight_decay,
            mask=lambda params: {name: decays(name, array) for name, array in params.items()},
        ),
    ]
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    return optax.chain(*clip, *adamw)
