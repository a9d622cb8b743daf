"""The train step and the evaluation steps: one jitted function each, with explicit shardings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, use_abstract_mesh

from structvit_jax.config import INPUTS
from structvit_jax.models import Network
from structvit_jax.models.networks import ActivationHook
from structvit_jax.models.weights import ModelDef, Weights, batch_stats, training_structure
from structvit_jax.runtime.mesh import batch_sharding, put_whole, replicated, state_sharding
from structvit_jax.training import losses, mixing, token_labels
from structvit_jax.training.optim import Optimizer

Arrays = Mapping[str, jax.Array]


class TrainState(NamedTuple):
    """The state of training between two steps."""

    step: jax.Array  # int32, completed steps
    weights: Weights
    optimizer: optax.OptState | None  # None in a checkpoint of weights alone
    average: Weights | None = None  # moving average of the weights, if it is kept

    def scored(self, averaged: bool) -> Weights:
        """Return the weights to evaluate: the moving average if it exists and `averaged` is set."""
        return self.weights if self.average is None or not averaged else self.average


def init_state(weights: Weights, optimizer: Optimizer, mesh: Mesh, *, averaged: bool = False) -> TrainState:
    """Return the state before the first step, placed on the mesh; all processes pass the same weights."""
    init = functools.partial(fresh_state, optimizer, averaged)
    shardings = state_sharding(mesh, jax.eval_shape(init, weights))
    weights = put_whole(weights, shardings.weights)
    return jax.jit(init, in_shardings=(shardings.weights,), out_shardings=shardings)(weights)


def fresh_state(optimizer: Optimizer, averaged: bool, weights: Weights) -> TrainState:
    """Return the state before the first step, without placing it."""
    moments = optimizer.transform.init(optimizer.trained(weights.params))
    return TrainState(jnp.zeros((), jnp.int32), weights, moments, weights if averaged else None)


def make_train_step(
    model: Network,
    optimizer: Optimizer,
    schedule: optax.Schedule,
    config: ml_collections.ConfigDict,
    mesh: Mesh,
    state: TrainState,
) -> jax.stages.Wrapped:
    """Return one jitted optimizer step: (state, batch) -> (state, metrics). It donates the old state.

    Every random number derives from config.train.seed and the step, so a resumed run draws the same numbers
    as an uninterrupted one. A step with a non-finite loss or gradient only increments the step count, and
    its metrics mark it as skipped.

    Args:
      model, optimizer, schedule, config, mesh: see `structvit_jax.training.learner.Learner`.
      state: arrays or shapes, for the shardings.
    """
    gradients = _gradients(model, optimizer, config, mesh)
    shardings = state_sharding(mesh, state)

    def step_fn(state: TrainState, batch: Arrays) -> tuple[TrainState, dict[str, jax.Array]]:
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


Gradients = tuple[jax.Array, jax.Array, dict[str, jax.Array], dict[str, jax.Array]]  # see `_gradients`
Carry = tuple[dict[str, jax.Array], jax.Array, jax.Array, dict[str, jax.Array]]


def _gradients(
    model: Network, optimizer: Optimizer, config: ml_collections.ConfigDict, mesh: Mesh
) -> Callable[[Weights, Arrays, jax.Array], Gradients]:
    """Return a function: (weights, batch, step) -> loss, top1, new batch statistics and gradients.

    It processes the batch in config.train.grad_accum_steps parts.
    """
    structure = training_structure(model, optimizer.frozen)
    grid = model.grid(config.data.size) if config.data.label_maps else None
    examples = batch_sharding(mesh)

    def shard(name: str, x: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, examples)

    def loss_fn(
        trained: dict[str, jax.Array],
        frozen: dict[str, jax.Array],
        stats: dict[str, jax.Array],
        part: Arrays,
        key: jax.Array,
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        """Return the contribution of a part to the loss and accuracy of the whole batch."""
        network = cast(Network, structure.model(Weights(frozen | trained, stats)))
        with use_abstract_mesh(mesh.abstract_mesh):
            logits, loss = forward(network, part, key, shard, config)
        top1 = losses.masked_mean(losses.in_top(logits, part["labels"], 1), part["mask"])
        return loss * part["fraction"], (batch_stats(network), top1 * part["fraction"])

    def gradients(weights: Weights, batch: Arrays, step: jax.Array) -> Gradients:
        drop_key, augment_key = step_keys(config, step)
        with jax.named_scope("augment"):
            prepared = prepare_batch(augment_key, batch, weights.params["head.bias"].size, config, grid)
        whole = {**prepared, "labels": batch["labels"], "mask": batch["mask"]}
        value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
        trained = optimizer.trained(weights.params)
        frozen = {name: weights.params[name] for name in optimizer.frozen}
        if config.train.grad_accum_steps == 1:
            part = whole | {"fraction": jnp.float32(1)}
            (loss, (stats, top1)), grads = value_and_grad(
                trained, frozen, weights.batch_stats, part, drop_key
            )
            return loss, top1, stats, grads

        def add(carry: Carry, part_and_key: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Carry, None]:
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


def split_batch(batch: Arrays, parts: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Reshape [examples, ...] to [parts, examples / parts, ...] without moving examples between devices.

    Also return `fraction`, each part's fraction of the unmasked examples: float32 [parts].
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def cut(rows: jax.Array) -> jax.Array:
        rows = jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(rows, sharding)

    cuts = {key: cut(rows) for key, rows in batch.items()}
    counts = cuts["mask"].sum(axis=1)
    return cuts | {"fraction": counts / jnp.maximum(counts.sum(), 1)}


def make_eval_step(
    structure: ModelDef, config: ml_collections.ConfigDict, mesh: Mesh, weights: Weights
) -> jax.stages.Wrapped:
    """Return the jitted evaluation step: (weights, batch) -> arrays that are whole on every process.

    These are `scores`, float32 [rows, classes], the mean over views of logits or probabilities (see
    config.eval.average); `top1` and `top5`, bool [rows], whether the label is among the highest scores; and
    the `labels`, `mask` and `index` of the batch. Its inputs are uint8 [rows, views, ...].
    """

    def step_fn(weights: Weights, batch: Arrays) -> dict[str, jax.Array]:
        network = cast(Network, structure.model(weights))

        def scores(view: jax.Array) -> jax.Array:
            logits = network(normalize(view, config)).astype(jnp.float32)
            return jax.nn.softmax(logits) if config.eval.average == "softmax" else logits

        views = jnp.moveaxis(batch["inputs"], 1, 0)
        with use_abstract_mesh(mesh.abstract_mesh):
            mean = jnp.mean(jax.lax.map(scores, views), axis=0) if len(views) > 1 else scores(views[0])
        hits = {f"top{k}": losses.in_top(mean, batch["labels"], k) for k in (1, 5)}
        return {"scores": mean, **hits, **{key: batch[key] for key in ("labels", "mask", "index")}}

    shardings = state_sharding(mesh, weights)
    return jax.jit(step_fn, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))


def make_features_step(
    structure: ModelDef, config: ml_collections.ConfigDict, mesh: Mesh, weights: Weights
) -> jax.stages.Wrapped:
    """Return a step like `make_eval_step` for `features` before the head: float32 [rows, views, width]."""

    def step_fn(weights: Weights, batch: Arrays) -> dict[str, jax.Array]:
        network = cast(Network, structure.model(weights))

        def pooled(view: jax.Array) -> jax.Array:
            return network.pooled(normalize(view, config)).astype(jnp.float32)

        views = jnp.moveaxis(batch["inputs"], 1, 0)
        with use_abstract_mesh(mesh.abstract_mesh):
            features = jax.lax.map(pooled, views)
        return {"features": jnp.moveaxis(features, 0, 1)}

    shardings = state_sharding(mesh, weights)
    return jax.jit(step_fn, in_shardings=(shardings, batch_sharding(mesh)), out_shardings=replicated(mesh))


def step_keys(config: ml_collections.ConfigDict, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Return the random keys of a step, for stochastic depth and for augmentation."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    drop_key, augment_key = jax.random.split(key)
    return drop_key, augment_key


def forward(
    network: Network,
    part: Arrays,
    key: jax.Array,
    shard: ActivationHook,
    config: ml_collections.ConfigDict,
) -> tuple[jax.Array, jax.Array]:
    """Return the logits of a part of a training batch, and their loss."""
    if not network.variant.token_labels:
        logits = network(part["inputs"], key=key, hook=shard)
        return logits, losses.cross_entropy(logits, part["targets"], part["mask"])
    mix = token_labels.MixToken(jax.random.fold_in(key, 1), config.augment.mix_token)
    mixes = bool(config.augment.mix_token)

    def hook(name: str, x: jax.Array) -> jax.Array:
        return shard(name, mix(x) if mixes and name == "patch_embed1" else x)

    logits, dense_logits = network.scores(part["inputs"], key=key, hook=hook)
    assert dense_logits is not None
    whole, shape = part["targets"], dense_logits.shape
    positions = whole.reshape(len(whole), *[1] * (len(shape) - 2), -1)
    dense = part["dense"] if "dense" in part else jnp.broadcast_to(positions, shape)
    if mixes:
        whole, dense = mix.targets(whole, dense)
    weight = config.train.dense_weight
    return logits, token_labels.loss(logits, dense_logits, whole, dense, part["mask"], weight)


def prepare_batch(
    key: jax.Array,
    batch: Arrays,
    classes: int,
    config: ml_collections.ConfigDict,
    grid: tuple[int, ...] | None = None,
) -> dict[str, jax.Array]:
    """Return normalised and augmented `inputs`, and their `targets`, distributions over classes.

    Args:
      key: for augmentation.
      batch: uint8 inputs, labels and mask, and the arrays of label maps.
      classes: their number.
      config: its sections data, augment and train.
      grid: positions of the label maps along height and width. The result then also has `dense`, the targets
        of the positions, and `targets` is their mean.
    """
    batch = fill_masked_rows(batch)
    smoothing = config.train.label_smoothing
    inputs = normalize(batch["inputs"], config)
    targets = losses.smooth_targets(batch["labels"], classes, smoothing)
    prepared: dict[str, jax.Array] = {}
    if grid:
        dense = token_labels.dense_targets(batch, grid, classes)
        prepared["dense"] = optax.smooth_labels(dense, smoothing)
        targets = prepared["dense"].mean(axis=(1, 2))
    inputs, targets = mixing.augment(key, inputs, targets, config.augment)
    return {"inputs": inputs, "targets": targets, **prepared}


def fill_masked_rows(batch: Arrays) -> dict[str, jax.Array]:
    """Replace masked rows by the first unmasked row, so that batch statistics and mixing see real inputs.

    The mask is unchanged and keeps these rows out of the loss.
    """
    mask = batch["mask"]
    first = jnp.arange(mask.size) == jnp.argmax(mask)

    def fill(rows: jax.Array) -> jax.Array:
        first_, mask_ = (flags.reshape(-1, *[1] * (rows.ndim - 1)) for flags in (first, mask))
        # A sum, because indexing would gather the whole batch on every device.
        row = jnp.where(first_, rows, 0).sum(axis=0, dtype=rows.dtype)
        return jnp.where(mask_, rows, row)

    return {key: rows if key in ("mask", "index") else fill(rows) for key, rows in batch.items()}


def normalize(inputs: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
    """Scale uint8 pixels to 0..1 and normalise them with the channels' configured mean and std: float32."""
    mean, std = (jnp.array(config.data[key] or INPUTS[key], jnp.float32) for key in ("mean", "std"))
    return (inputs.astype(jnp.float32) / 255.0 - mean) / std
