"""The train step and the evaluation step: one jitted function each, shardings given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from structvit_jax.models.weights import Structure, Weights, batch_stats, split
from structvit_jax.training import losses
from structvit_jax.training.mesh import batch_sharding, replicated, state_sharding

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: jax.Array  # int32, steps done
    weights: Weights
    optimizer: Any  # optax's state


def init_state(weights: Weights, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, placed on the mesh."""

    def init(weights):
        return TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights.params))

    shardings = state_sharding(mesh, jax.eval_shape(init, weights))
    return jax.jit(init, out_shardings=shardings)(weights)


def make_train_step(
    model: Any,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    state: TrainState,
) -> Any:
    """One optimizer step, jitted: (state, batch) -> (state, metrics). The given state's buffers are reused.

    Every random number derives from config.train.seed and the step, so a resumed run draws what an
    uninterrupted one would.
    """
    model.train()
    structure, _ = split(model)
    model.eval()

    def loss_fn(params, stats, batch, key):
        network = structure.model(Weights(params, stats))
        logits = network(normalize(batch["inputs"], config), key=key)
        loss = losses.cross_entropy(logits, batch["labels"], batch["mask"], config.train.label_smoothing)
        top1 = losses.masked_mean(losses.in_top(logits, batch["labels"], 1), batch["mask"])
        return loss, (batch_stats(network), top1)

    def step_fn(state, batch):
        key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, (stats, top1)), grads = value_and_grad(*state.weights, batch, key)
        updates, opt_state = optimizer.update(grads, state.optimizer, state.weights.params)
        params = optax.apply_updates(state.weights.params, updates)
        metrics = {
            "loss": loss,
            "top1": top1,
            "grad_norm": optax.tree.norm(grads),
            "lr": schedule(state.step),
        }
        return TrainState(state.step + 1, Weights(params, stats), opt_state), metrics

    shardings = state_sharding(mesh, state)
    return jax.jit(
        step_fn,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(
    structure: Structure, config: ml_collections.ConfigDict, mesh: Mesh, weights: Weights
) -> Callable[[Weights, Batch], Metrics]:
    """Counts of one batch: examples, and those with the label among the first one and five."""

    def step_fn(weights, batch):
        logits = structure.model(weights)(normalize(batch["inputs"], config))
        hits = {f"top{k}": losses.in_top(logits, batch["labels"], k) & batch["mask"] for k in (1, 5)}
        return {name: jnp.sum(hit) for name, hit in (hits | {"examples": batch["mask"]}).items()}

    shardings = state_sharding(mesh, weights)
    return jax.jit(step_fn, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))


def normalize(inputs: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
    """uint8 pixels to float32 with the configured mean and deviation of channels scaled to 0..1."""
    mean, std = jnp.array(config.data.mean, jnp.float32), jnp.array(config.data.std, jnp.float32)
    return (inputs.astype(jnp.float32) / 255.0 - mean) / std
