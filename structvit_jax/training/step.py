"""The train step and the evaluation step: one jitted function each, shardings given."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from structvit_jax.config import INPUTS
from structvit_jax.models.weights import ModelDef, Weights, batch_stats, training_structure
from structvit_jax.runtime.mesh import put_whole
from structvit_jax.runtime.sharding import batch_sharding, replicated, state_sharding
from structvit_jax.training import losses, mixing, token_labels
from structvit_jax.training.optim import Optimizer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that a run carries from step to step."""

    step: jax.Array  # int32, steps done
    weights: Weights
    optimizer: Any  # optax's state; None in a checkpoint of weights alone
    average: Weights | None = None  # the moving average of the weights, where it is kept

    def scored(self, averaged: bool) -> Weights:
        """What evaluations score."""
        return self.weights if self.average is None or not averaged else self.average


def init_state(weights: Weights, optimizer: Optimizer, mesh: Mesh, *, averaged: bool = False) -> TrainState:
    """The state before the first step, placed on the mesh; every process brings the same weights."""

    init = functools.partial(fresh_state, optimizer, averaged)
    shardings = state_sharding(mesh, jax.eval_shape(init, weights))
    weights = put_whole(weights, shardings.weights)
    return jax.jit(init, in_shardings=(shardings.weights,), out_shardings=shardings)(weights)


def fresh_state(optimizer: Optimizer, averaged: bool, weights: Weights) -> TrainState:
    """The state before the first step."""
    moments = optimizer.transform.init(optimizer.trained(weights.params))
    return TrainState(jnp.zeros((), jnp.int32), weights, moments, weights if averaged else None)


def make_train_step(
    model: Any,
    optimizer: Optimizer,
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
    gradients = _gradients(model, optimizer, config, mesh)
    shardings = state_sharding(mesh, state)

    def step_fn(state, batch):
        loss, top1, stats, grads = gradients(state.weights, batch, state.step)
        grads = jax.lax.with_sharding_constraint(grads, optimizer.trained(shardings.weights.params))
        lr, grad_norm = schedule(state.step), optax.tree.norm(grads)
        trained = optimizer.trained(state.weights.params)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        with jax.named_scope("optimizer"), use_abstract_mesh(mesh.abstract_mesh):
            updates, moments = optimizer.transform.update(grads, state.optimizer, trained, finite=finite)
        trained = jax.tree.map(lambda param, update: param - lr * update, trained, updates)
        weights, average = Weights(state.weights.params | trained, stats), state.average
        if average is not None:
            decay = config.optimizer.ema
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, weights)
        changed = (weights, average), (state.weights, state.average)
        weights, average = jax.tree.map(functools.partial(jnp.where, finite), *changed)
        new = TrainState(state.step + 1, weights, moments, average)
        metrics = {"loss": loss, "top1": top1, "grad_norm": grad_norm, "lr": lr, "skipped": ~finite}
        return new, metrics | {"index": batch["index"]}

    return jax.jit(
        step_fn,
        in_shardings=(shardings, batch_sharding(mesh)),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def _gradients(model: Any, optimizer: Optimizer, config: ml_collections.ConfigDict, mesh: Mesh) -> Callable:
    """(weights, batch, step) -> loss, top1, new statistics and gradients of a batch, in as many parts as
    configured."""
    structure = training_structure(model, optimizer.frozen)
    grid = model.grid(config.data.size) if config.data.label_maps else None
    examples = batch_sharding(mesh)

    def shard(name, x):
        return jax.lax.with_sharding_constraint(x, examples)

    def loss_fn(trained, frozen, stats, part, key):
        """Sums over a part of the batch, as shares of the whole batch's means."""
        network = structure.model(Weights(frozen | trained, stats))
        with use_abstract_mesh(mesh.abstract_mesh):
            logits, loss = forward(network, part, key, shard, config)
        top1 = losses.masked_mean(losses.in_top(logits, part["labels"], 1), part["mask"])
        return loss * part["share"], (batch_stats(network), top1 * part["share"])

    def gradients(weights, batch, step):
        drop_key, augment_key = step_keys(config, step)
        with jax.named_scope("augment"):
            prepared = prepare_batch(augment_key, batch, weights.params["head.bias"].size, config, grid)
        whole = {**prepared, "labels": batch["labels"], "mask": batch["mask"]}
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        trained = optimizer.trained(weights.params)
        frozen = {name: weights.params[name] for name in optimizer.frozen}
        if config.train.grad_accum_steps == 1:
            part = whole | {"share": jnp.float32(1)}
            (loss, (stats, top1)), grads = value_and_grad(
                trained, frozen, weights.batch_stats, part, drop_key
            )
            return loss, top1, stats, grads

        def add(carry, part_and_key):
            stats, *sums = carry
            (loss, (stats, top1)), grads = value_and_grad(trained, frozen, stats, *part_and_key)
            return (stats, *jax.tree.map(jnp.add, tuple(sums), (loss, top1, grads))), None

        parts = split_batch(whole, config.train.grad_accum_steps, mesh)
        zeros = jax.tree.map(jnp.zeros_like, trained)
        start = (weights.batch_stats, jnp.float32(0), jnp.float32(0), zeros)
        keys = jax.random.split(drop_key, config.train.grad_accum_steps)
        with jax.named_scope(f"times{config.train.grad_accum_steps}"):
            (stats, loss, top1, grads), _ = jax.lax.scan(add, start, (parts, keys))
        return loss, top1, stats, grads

    return gradients


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
    structure: ModelDef, config: ml_collections.ConfigDict, mesh: Mesh, weights: Weights
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
        with use_abstract_mesh(mesh.abstract_mesh):
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


def forward(
    network: Any, part: Batch, key: jax.Array, shard: Callable, config: ml_collections.ConfigDict
) -> tuple[jax.Array, jax.Array]:
    """Logits of a part of a batch in training, and their loss."""
    if not network.variant.token_labels:
        logits = network(part["inputs"], key=key, hook=shard)
        return logits, losses.cross_entropy(logits, part["targets"], part["mask"])
    mix = token_labels.MixToken(jax.random.fold_in(key, 1), config.augment.mix_token)
    mixes = bool(config.augment.mix_token)

    def hook(name, x):
        return shard(name, mix(x) if mixes and name == "patch_embed1" else x)

    logits, dense_logits = network.scores(part["inputs"], key=key, hook=hook)
    whole, shape = part["targets"], dense_logits.shape
    positions = whole.reshape(len(whole), *[1] * (len(shape) - 2), -1)
    dense = part["dense"] if "dense" in part else jnp.broadcast_to(positions, shape)
    if mixes:
        whole, dense = mix.targets(whole, dense)
    weight = config.train.dense_weight
    return logits, token_labels.loss(logits, dense_logits, whole, dense, part["mask"], weight)


def prepare_batch(
    key: jax.Array,
    batch: Batch,
    classes: int,
    config: ml_collections.ConfigDict,
    grid: tuple[int, int] | None = None,
) -> dict[str, jax.Array]:
    """What a training step feeds the model: normalised, erased and mixed `inputs`, and their `targets`; for a
    grid of positions with label maps also `dense`, their targets, of which `targets` are the mean."""
    batch = fill_masked_rows(batch)
    smoothing = config.train.label_smoothing
    inputs = normalize(batch["inputs"], config)
    targets = losses.smooth_targets(batch["labels"], classes, smoothing)
    prepared = {}
    if grid:
        dense = token_labels.dense_targets(batch, grid, classes)
        prepared["dense"] = optax.smooth_labels(dense, smoothing)
        targets = prepared["dense"].mean(axis=(1, 2))
    inputs, targets = mixing.augment(key, inputs, targets, config.augment)
    return {"inputs": inputs, "targets": targets, **prepared}


def fill_masked_rows(batch: Batch) -> Batch:
    """A batch in which every masked row repeats the first row that is not: batch statistics and mixing then
    see real pictures only. The mask still keeps the row out of the loss."""
    mask = batch["mask"]
    first = jnp.arange(mask.size) == jnp.argmax(mask)

    def fill(rows):
        first_, mask_ = (flags.reshape(-1, *[1] * (rows.ndim - 1)) for flags in (first, mask))
        # Not rows[place], for which every device would get the whole batch.
        row = jnp.where(first_, rows, 0).sum(axis=0, dtype=rows.dtype)
        return jnp.where(mask_, rows, row)

    return {key: rows if key in ("mask", "index") else fill(rows) for key, rows in batch.items()}


def normalize(inputs: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
    """uint8 pixels to float32 with the configured mean and deviation of channels scaled to 0..1."""
    mean, std = (jnp.array(config.data[key] or INPUTS[key], jnp.float32) for key in ("mean", "std"))
    return (inputs.astype(jnp.float32) / 255.0 - mean) / std
