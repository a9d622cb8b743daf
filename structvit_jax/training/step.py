"""The train step, and the steps that return scores or features: jitted, with explicit shardings."""

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
from structvit_jax.models.weights import ModelDef, Weights, batch_stats, training_structure
from structvit_jax.runtime.mesh import batch_sharding, put_whole, replicated, state_sharding
from structvit_jax.training import losses, mixing
from structvit_jax.training.optim import Optimizer

Arrays = Mapping[str, jax.Array]
Params = dict[str, jax.Array]
# (loss, (batch statistics, top1)), gradients
Gradients = tuple[tuple[jax.Array, tuple[Params, jax.Array]], Params]


class TrainState(NamedTuple):
    """The state of training between two steps."""

    step: jax.Array  # int32, completed steps
    weights: Weights
    optimizer: optax.OptState | None  # None in a checkpoint of weights alone
    average: Weights | None = None  # moving average of the weights, if it is kept

    def eval_weights(self, averaged: bool) -> Weights:
        """Return the weights to evaluate: the moving average if it exists and `averaged` is true."""
        return self.weights if self.average is None or not averaged else self.average


def init_state(weights: Weights, optimizer: Optimizer, mesh: Mesh, *, averaged: bool = False) -> TrainState:
    """Return the state before the first step, placed on the mesh.

    Args:
      weights: initial weights; all processes must pass the same values.
      optimizer: initialises the optimizer state.
      mesh: the devices.
      averaged: whether the state has a moving average of the weights.
    """
    init = functools.partial(fresh_state, optimizer, averaged)
    shardings = state_sharding(mesh, jax.eval_shape(init, weights))
    weights = put_whole(weights, shardings.weights)
    return jax.jit(init, in_shardings=(shardings.weights,), out_shardings=shardings)(weights)


def fresh_state(optimizer: Optimizer, averaged: bool, weights: Weights) -> TrainState:
    """Return the state before the first step; see `init_state`, which also places it on the mesh."""
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
    """Return the jitted train step: (state, batch) -> (state, metrics). The old state is donated.

    All random numbers derive from config.train.seed and the step, so a resumed run draws the same numbers as
    an uninterrupted one. If the loss or a gradient is not finite, the step changes nothing but the step
    count, and its metrics mark it as skipped.

    Args:
      model, optimizer, schedule, config, mesh: see `structvit_jax.training.learner.Learner`.
      state: a state, or its shapes; the shardings are derived from the shapes.
    """
    model_def = training_structure(model, optimizer.frozen)
    grid = model.grid(config.data.size) if config.data.label_maps else None
    parts, mix_token = config.train.grad_accum_steps, config.augment.mix_token
    shardings, examples = state_sharding(mesh, state), batch_sharding(mesh)

    def loss_fn(
        trained: Params, params: Params, stats: Params, batch: Arrays, key: jax.Array
    ) -> tuple[jax.Array, tuple[Params, jax.Array]]:
        """Return the loss, and the new batch statistics and top1.

        If the batch is one of several parts, loss and top1 are multiplied by its fraction of the examples, so
        the sum over all parts is the mean over the whole batch.
        """
        network = cast(Network, model_def.model(Weights(params | trained, stats)))
        mix = mixing.MixToken(jax.random.fold_in(key, 1), mix_token) if mix_token else None

        def hook(name: str, x: jax.Array) -> jax.Array:
            x = mix(x) if mix and name == "patch_embed1" else x
            return jax.lax.with_sharding_constraint(x, examples)

        with use_abstract_mesh(mesh.abstract_mesh):
            logits, dense_logits = network.scores(batch["inputs"], key=key, hook=hook)
            targets, mask = batch["targets"], batch["mask"]
            if dense_logits is None:
                loss = losses.cross_entropy(logits, targets, mask)
            else:
                if (dense := batch.get("dense")) is None:
                    dense = mixing.repeat_targets(targets, dense_logits.shape)
                targets, dense = mix.targets(targets, dense) if mix else (targets, dense)
                loss = losses.token_labelling(
                    logits, dense_logits, targets, dense, mask, config.train.dense_weight
                )
        top1 = losses.masked_mean(losses.in_top(logits, batch["labels"], 1), mask)
        fraction = batch.get("fraction", 1.0)
        return loss * fraction, (batch_stats(network), top1 * fraction)

    loss_and_grads = jax.value_and_grad(loss_fn, has_aux=True)

    def accumulate(
        trained: Params, params: Params, stats: Params, batch: Arrays, key: jax.Array
    ) -> Gradients:
        """Compute `loss_and_grads` one part of the batch after another, and add up the results."""

        def add(carry: tuple, part_and_key: tuple[Arrays, jax.Array]) -> tuple[tuple, None]:
            stats, *sums = carry
            (loss, (stats, top1)), grads = loss_and_grads(trained, params, stats, *part_and_key)
            return (stats, *jax.tree.map(jnp.add, tuple(sums), (loss, top1, grads))), None

        split = split_batch(batch, parts, mesh)
        zeros = jax.tree.map(jnp.zeros_like, trained)
        start = (stats, jnp.float32(0), jnp.float32(0), zeros)
        keys = jax.random.split(key, parts)
        # structvit_jax.performance.traffic reads the number of iterations from the name of the scope.
        with jax.named_scope(f"times{parts}"):
            (stats, loss, top1, grads), _ = jax.lax.scan(add, start, (split, keys))
        return (loss, (stats, top1)), grads

    def train_step(state: TrainState, batch: Arrays) -> tuple[TrainState, dict[str, jax.Array]]:
        params, stats = state.weights
        drop_key, augment_key = step_keys(config, state.step)

        # Normalise, augment and mix the batch.
        with jax.named_scope("augment"):
            prepared = prepare_batch(augment_key, batch, params["head.bias"].size, config, grid)
        prepared |= {"labels": batch["labels"], "mask": batch["mask"]}

        # Compute the loss and its gradients.
        trained = optimizer.trained(params)
        gradients = loss_and_grads if parts == 1 else accumulate
        (loss, (stats, top1)), grads = gradients(trained, params, stats, prepared, drop_key)
        grads = jax.lax.with_sharding_constraint(grads, optimizer.trained(shardings.weights.params))
        lr, grad_norm = schedule(state.step), optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

        # Update the weights and their moving average, unless the loss or a gradient is not finite.
        with jax.named_scope("optimizer"), use_abstract_mesh(mesh.abstract_mesh):
            updates, moments = optimizer.transform.update(grads, state.optimizer, trained, finite=finite)
        updated = jax.tree.map(lambda param, update: param - lr * update, trained, updates)
        weights, average = Weights(params | updated, stats), state.average
        if average is not None:
            decay = config.optimizer.ema
            average = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, average, weights)
        changed = (weights, average), (state.weights, state.average)
        weights, average = jax.tree.map(functools.partial(jnp.where, finite), *changed)
        new_state = TrainState(state.step + 1, weights, moments, average)
        metrics = {"loss": loss, "top1": top1, "grad_norm": grad_norm, "lr": lr, "skipped": ~finite}
        return new_state, metrics | {"index": batch["index"]}

    return jax.jit(
        train_step,
        in_shardings=(shardings, examples),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )


def step_keys(config: ml_collections.ConfigDict, step: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """Return the random keys of a step, for stochastic depth and for augmentation."""
    key = jax.random.fold_in(jax.random.key(config.train.seed), step)
    drop_key, augment_key = jax.random.split(key)
    return drop_key, augment_key


def prepare_batch(
    key: jax.Array,
    batch: Arrays,
    classes: int,
    config: ml_collections.ConfigDict,
    grid: tuple[int, ...] | None = None,
) -> dict[str, jax.Array]:
    """Normalise, augment and mix a batch; return its `inputs` and `targets`.

    The targets are distributions over classes. With a grid, the result also has `dense`, the targets of all
    positions, and `targets` is the mean of these.

    Args:
      key: random key for augmentation.
      batch: `inputs` (uint8), `labels` and `mask`; with a grid, also the arrays of label maps.
      classes: number of classes.
      config: the configuration, of which the sections data, augment and train are used.
      grid: height and width of the model's last feature map if label maps are used, else None.
    """
    batch = fill_masked_rows(batch)
    smoothing = config.train.label_smoothing
    inputs = normalize(batch["inputs"], config)
    targets = losses.smooth_targets(batch["labels"], classes, smoothing)
    prepared: dict[str, jax.Array] = {}
    if grid:
        dense = optax.smooth_labels(mixing.dense_targets(batch, grid, classes), smoothing)
        prepared, targets = {"dense": dense}, dense.mean(axis=(1, 2))
    inputs, targets = mixing.augment(key, inputs, targets, config.augment)
    return {"inputs": inputs, "targets": targets, **prepared}


def fill_masked_rows(batch: Arrays) -> dict[str, jax.Array]:
    """Replace masked rows with the first unmasked row, so that batch statistics and mixing see real inputs.

    The mask is unchanged and keeps these rows out of the loss.
    """
    mask = batch["mask"]
    first = jnp.arange(mask.size) == jnp.argmax(mask)

    def fill(rows: jax.Array) -> jax.Array:
        first_, mask_ = (flags.reshape(-1, *[1] * (rows.ndim - 1)) for flags in (first, mask))
        # Select the row by a sum: indexing would gather the whole batch on every device.
        row = jnp.where(first_, rows, 0).sum(axis=0, dtype=rows.dtype)
        return jnp.where(mask_, rows, row)

    return {key: rows if key in ("mask", "index") else fill(rows) for key, rows in batch.items()}


def split_batch(batch: Arrays, parts: int, mesh: Mesh) -> dict[str, jax.Array]:
    """Reshape [examples, ...] to [parts, examples / parts, ...] without moving examples between devices.

    The result also has `fraction`, float32 [parts]: each part's fraction of the unmasked examples.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, *batch_sharding(mesh).spec))

    def split(rows: jax.Array) -> jax.Array:
        rows = jnp.swapaxes(rows.reshape(-1, parts, *rows.shape[1:]), 0, 1)
        return jax.lax.with_sharding_constraint(rows, sharding)

    split_rows = {key: split(rows) for key, rows in batch.items()}
    counts = split_rows["mask"].sum(axis=1)
    return split_rows | {"fraction": counts / jnp.maximum(counts.sum(), 1)}


def normalize(inputs: jax.Array, config: ml_collections.ConfigDict) -> jax.Array:
    """Scale uint8 pixels to 0..1, and normalise each channel with the configured mean and std, in float32."""
    mean, std = (jnp.array(config.data[key] or INPUTS[key], jnp.float32) for key in ("mean", "std"))
    return (inputs.astype(jnp.float32) / 255.0 - mean) / std


def make_eval_step(
    structure: ModelDef, config: ml_collections.ConfigDict, mesh: Mesh, weights: Weights
) -> jax.stages.Wrapped:
    """Return the jitted evaluation step: (weights, batch) -> arrays, replicated on all devices.

    The inputs of the batch are uint8 [rows, views, ...]. The step returns:

    - `scores`, float32 [rows, classes]: the mean over views of logits or probabilities (config.eval.average)
    - `top1` and `top5`, bool [rows]: whether the label has the highest, or one of the five highest scores
    - `labels`, `mask` and `index` of the batch
    """

    def eval_step(weights: Weights, batch: Arrays) -> dict[str, jax.Array]:
        network = cast(Network, structure.model(weights))

        def scores(view: jax.Array) -> jax.Array:
            logits = network(normalize(view, config)).astype(jnp.float32)
            return jax.nn.softmax(logits) if config.eval.average == "softmax" else logits

        views = jnp.moveaxis(batch["inputs"], 1, 0)
        with use_abstract_mesh(mesh.abstract_mesh):
            mean = jnp.mean(jax.lax.map(scores, views), axis=0) if len(views) > 1 else scores(views[0])
        hits = {f"top{k}": losses.in_top(mean, batch["labels"], k) for k in (1, 5)}
        return {"scores": mean, **hits, **{key: batch[key] for key in ("labels", "mask", "index")}}

    return _jit(eval_step, mesh, weights)


def make_features_step(
    structure: ModelDef, config: ml_collections.ConfigDict, mesh: Mesh, weights: Weights
) -> jax.stages.Wrapped:
    """Return a jitted step like that of `make_eval_step`, which computes the input of the head instead.

    It returns `features`, float32 [rows, views, width].
    """

    def features_step(weights: Weights, batch: Arrays) -> dict[str, jax.Array]:
        network = cast(Network, structure.model(weights))

        def pooled(view: jax.Array) -> jax.Array:
            return network.pooled(normalize(view, config)).astype(jnp.float32)

        with use_abstract_mesh(mesh.abstract_mesh):
            features = jax.lax.map(pooled, jnp.moveaxis(batch["inputs"], 1, 0))
        return {"features": jnp.moveaxis(features, 0, 1)}

    return _jit(features_step, mesh, weights)


def _jit(
    step: Callable[[Weights, Arrays], dict[str, jax.Array]], mesh: Mesh, weights: Weights
) -> jax.stages.Wrapped:
    shardings = state_sharding(mesh, weights), batch_sharding(mesh)
    return jax.jit(step, in_shardings=shardings, out_shardings=replicated(mesh))
