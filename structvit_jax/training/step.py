"""The train step and the evaluation step: one jitted function each, shardings given."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from structvit_jax.models.weights import Structure, Weights, batch_stats, split
from structvit_jax.training import losses, mixing
from structvit_jax.training.mesh import put_whole
from structvit_jax.training.placement import batch_sharding, replicated, state_sharding

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: jax.Array  # int32, steps done
    weights: Weights
    optimizer: Any  # optax's state


def init_state(weights: Weights, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, placed on the mesh; every process brings the same weights."""

    init = functools.partial(fresh_state, optimizer)
    shardings = state_sharding(mesh, jax.eval_shape(init, weights))
    weights = put_whole(weights, shardings.weights)
    return jax.jit(init, in_shardings=(shardings.weights,), out_shardings=shardings)(weights)


def fresh_state(optimizer: optax.GradientTransformation, weights: Weights) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), weights, optimizer.init(weights.params))


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
    uninterrupted one would. A step whose loss or gradient is not finite changes nothing but the count of
    steps, and is marked in its metrics.
    """
    model.train()
    structure, _ = split(model)
    model.eval()
    shardings = state_sharding(mesh, state)
    examples = batch_sharding(mesh)

    def place(x):
        return jax.lax.with_sharding_constraint(x, examples)

    def loss_fn(params, stats, part, key):
        """Sums over a part of the batch, as shares of the whole batch's means."""
        network = structure.model(Weights(params, stats))
        logits = network(part["inputs"], key=key, place=place)
        loss = losses.cross_entropy(logits, part["targets"], part["mask"])
        top1 = losses.masked_mean(losses.in_top(logits, part["labels"], 1), part["mask"])
        return loss * part["share"], (batch_stats(network), top1 * part["share"])

    def gradients(weights, batch, step):
        """Loss, top1, new statistics and gradients of a batch, in as many parts as configured."""
        drop_key, augment_key = step_keys(config, step)
        with jax.named_scope("augment"):
            inputs, targets = prepare_batch(augment_key, batch, weights.params["head.bias"].size, config)
        whole = {"inputs": inputs, "targets": targets, "labels": batch["labels"], "mask": batch["mask"]}
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        if config.train.accumulate == 1:
            part = whole | {"share": jnp.float32(1)}
            (loss, (stats, top1)), grads = value_and_grad(*weights, part, drop_key)
            return loss, top1, stats, grads

        def add(carry, part_and_key):
            stats, *sums = carry
            (loss, (stats, top1)), grads = value_and_grad(weights.params, stats, *part_and_key)
            return (stats, *jax.tree.map(jnp.add, tuple(sums), (loss, top1, grads))), None

        parts = split_batch(whole, config.train.accumulate, mesh)
        zeros = jax.tree.map(jnp.zeros_like, weights.params)
        start = (weights.batch_stats, jnp.float32(0), jnp.float32(0), zeros)
        keys = jax.random.split(drop_key, config.train.accumulate)
        with jax.named_scope(f"times{config.train.accumulate}"):
            (stats, loss, top1, grads), _ = jax.lax.scan(add, start, (parts, keys))
        return loss, top1, stats, grads

    def step_fn(state, batch):
        loss, top1, stats, grads = gradients(state.weights, batch, state.step)
        grads = jax.lax.with_sharding_constraint(grads, shardings.weights.params)
        lr, grad_norm = schedule(state.step), optax.tree.norm(grads)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(grads, state.optimizer, state.weights.params)
        params = jax.tree.map(lambda param, update: param - lr * update, state.weights.params, updates)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        new, old = (Weights(params, stats), opt_state), (state.weights, state.optimizer)
        weights, opt_state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
        metrics = {"loss": loss, "top1": top1, "grad_norm": grad_norm, "lr": lr, "skipped": ~finite}
        return TrainState(state.step + 1, weights, opt_state), metrics | {"index": batch["index"]}

    return jax.jit(
        step_fn,
        in_shardings=(shardings, examples),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def split_batch(batch: dict[str, jax.Array], parts: int, mesh: Mesh) -> dict[str, jax.Array]:
    """[examples, ...] -> [parts, examples / parts, ...], every device's examples staying where they are;
    and each part's share of the examples that count."""
    sharding = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def cut(rows):
        rows = jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(rows, sharding)

    cuts = jax.tree.map(cut, batch)
    counts = cuts["mask"].sum(axis=1)
    return cuts | {"share": counts / jnp.maximum(counts.sum(), 1)}


def make_eval_step(
    structure: Structure, config: ml_collections.ConfigDict, mesh: Mesh, weights: Weights
) -> Any:
    """(weights, batch) -> scores of examples with all their views, jitted: float32 [rows, classes], the mean
    over views, with labels, mask and index, and whether the label is among the first one and five; whole on
    every process."""

    def step_fn(weights, batch):
        network = structure.model(weights)

        def scores(view):
            logits = network(normalize(view, config)).astype(jnp.float32)
            return jax.nn.softmax(logits) if config.eval.average == "softmax" else logits

        views = jnp.moveaxis(batch["inputs"], 1, 0)
        mean = jnp.mean(jax.lax.map(scores, views), axis=0) if len(views) > 1 else scores(views[0])
        hits = {f"top{k}": losses.in_top(mean, batch["labels"], k) for k in (1, 5)}
        return {"scores": mean, **hits, **{key: batch[key] for key in ("labels", "mask", "index")}}

    shardings = state_sharding(mesh, weights)
    return jax.jit(step_fn, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))


def step_keys(config: ml_collections.ConfigDict, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The keys of a step, for stochastic depth and for the augmentation of its batch."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    drop_key, augment_key = jax.random.split(key)
    return drop_key, augment_key


def prepare_batch(
    key: jax.Array, batch: Batch, classes: int, config: ml_collections.ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """What a training step feeds the model: normalised, erased and mixed inputs, and their targets."""
    inputs, labels = stand_in(batch)
    targets = losses.smooth_targets(labels, classes, config.train.label_smoothing)
    return mixing.augment(key, normalize(inputs, config), targets, config.augment)


def stand_in(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Inputs and labels in which every masked row repeats the first row that is not: batch statistics and
    mixing then see real pictures only. The mask still keeps the row out of the loss."""
    mask = batch["mask"]
    valid = jnp.argmax(mask)

    def fill(rows):
        return jnp.where(mask.reshape(-1, *[1] * (rows.ndim - 1)), rows, rows[valid])

    return fill(batch["inputs"]), fill(batch["labels"])


def normalize(inputs: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
    """uint8 pixels to float32 with the configured mean and deviation of channels scaled to 0..1."""
    mean, std = jnp.array(config.data.mean, jnp.float32), jnp.array(config.data.std, jnp.float32)
    return (inputs.astype(jnp.float32) / 255.0 - mean) / std
