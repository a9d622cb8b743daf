"""AdamW and Muon, UniFormer's weight decay, the learning rate, frozen weights and layer-wise rates."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import optax

from structvit_jax.config import Durations, matching
from structvit_jax.ops.kernels.target import current_device
from structvit_jax.utils.errors import UserError

T = TypeVar("T")

_MUON_MOMENTUM = 0.95
_MUON_RMS = 0.2  # root mean square of an update: about that of AdamW, so both take the same learning rates


class Optimizer(NamedTuple):
    """An optimizer of the parameters that are not frozen."""

    transform: optax.GradientTransformationExtraArgs
    frozen: frozenset[str] = frozenset()  # names of parameters

    def trained(self, params: Mapping[str, T]) -> dict[str, T]:
        """Return the parameters that are not frozen."""
        return {name: array for name, array in params.items() if name not in self.frozen}


def learning_rate(
    config: ml_collections.ConfigDict, durations: Durations
) -> Callable[[jax.Array | int], jax.Array]:
    """Return the learning rate as a function of the step.

    The rate rises linearly from `warmup_lr` to `lr`. Then it follows half a cosine, which reaches `end_lr`
    after the last step, or where the cool-down starts. With `lr_update_every` the rate is constant within
    intervals of this many steps; `lr_update_delay` delays each change by this many intervals.

    Args:
      config: the section `optimizer`.
      durations: all durations in steps.
    """
    warmup, interval = durations.warmup, durations.lr_update_every or 1
    origin = warmup if config.schedule_origin == "warmup" else 0
    length = max(durations.total - durations.cooldown - origin, 1)

    def schedule(step: jax.Array | int) -> jax.Array:
        position = jnp.maximum(step // interval - config.lr_update_delay, 0) * interval
        linear = config.warmup_lr + (config.lr - config.warmup_lr) * position / max(warmup, 1)
        wave = jnp.cos(jnp.pi * jnp.clip((position - origin) / length, 0, 1))
        cosine = config.end_lr + (config.lr - config.end_lr) * (1 + wave) / 2
        return jnp.where(position < warmup, linear, cosine)

    return schedule


def decays(name: str, array: jax.Array) -> bool:
    """Return whether weight decay applies to a parameter.

    It does not apply to vectors (biases, norms, layer scales) or to DeiT's position embedding. It applies to
    all depthwise kernels, including those of the position encoding, as in the released UniFormer. The paper
    does not say whether it applies to the structure kernels; here it does.
    """
    return array.ndim > 1 and name != "pos_embed"


def make_optimizer(
    config: ml_collections.ConfigDict, names: Collection[str] = (), depths: Sequence[int] = ()
) -> Optimizer:
    """Return AdamW or Muon without the learning rate.

    The train step multiplies the updates by the learning rate and subtracts them from the parameters. If
    `clip_norm` is set, gradients are clipped by their global norm first.

    Args:
      config: the section `optimizer`.
      names: names of all parameters, for frozen weights and layer-wise rates.
      depths: number of blocks per stage, for layer-wise rates.

    Raises:
      UserError: a pattern of `freeze` matches no weights, or the patterns leave nothing to train.
    """
    frozen = frozen_names(config.freeze, list(names))

    def decay_mask(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {name: decays(name, array) for name, array in params.items()}

    transforms = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    adam = _adam(config.b1, config.b2, config.eps)
    transforms += [_muon(adam) if config.name == "muon" else adam]
    transforms += [optax.add_decayed_weights(config.weight_decay, mask=decay_mask)]
    if config.layer_decay != 1:
        rates = layer_rates(names, depths, config.layer_decay)
        transforms += [optax.stateless(lambda updates, _: {n: rates[n] * u for n, u in updates.items()})]
    return Optimizer(optax.chain(*transforms), frozen)


def frozen_names(patterns: str, names: Sequence[str]) -> frozenset[str]:
    """Return the parameters that config.optimizer.freeze selects, see `structvit_jax.config.matching`."""
    some = ", ".join(sorted({re.sub(r"\.\d+\..*", ".*", name) for name in names}))
    frozen = matching(patterns, names, f"config.optimizer.freeze: {{}} matches no weights. Known: {some}")
    if frozen and len(frozen) == len(names):
        raise UserError(f"config.optimizer.freeze is {patterns!r}, which leaves nothing to train")
    return frozenset(frozen)


def layer_rates(names: Iterable[str], depths: Sequence[int], decay: float) -> dict[str, float]:
    """Return the factor on the learning rate of each parameter, for layer-wise decay.

    The final norm and the heads have the factor 1; each block further from the head multiplies it by `decay`.
    A patch embedding has the factor of the block after it, except the first one: it forms a layer of its own
    before all blocks, together with `pos_embed`.

    Args:
      names: names of the parameters.
      depths: number of blocks per stage.
      decay: factor per block.
    """
    first = [sum(depths[:stage]) + 1 for stage in range(len(depths))]  # index of each stage's first block

    def layer(name: str) -> int:
        if not (match := re.match(r"(patch_embed|pos_embed|blocks)(\d?)(?:\.(\d+))?", name)):
            return sum(depths) + 1
        stage = int(match[2] or 1) - 1
        if match[1] == "blocks":
            return first[stage] + int(match[3])
        return first[stage] if stage else 0

    return {name: decay ** (sum(depths) + 1 - layer(name)) for name in names}


def _adam(b1: float, b2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """Return optax's Adam with another argument of `update`: if `finite` is false, the moments do not change.

    On CPUs an optimization barrier separates the new moments from the updates. Without it, XLA would copy the
    old moments and compute the new ones twice.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(
        grads: optax.Updates,
        old: optax.OptState,
        params: optax.Params | None = None,
        *,
        finite: jax.typing.ArrayLike = True,
    ) -> tuple[optax.Updates, optax.OptState]:
        new = jax.tree.map(functools.partial(jnp.where, finite), adam.update(grads, old)[1], old)
        if current_device().platform == "cpu":  # on other devices one fused loop writes moments and weights
            new = jax.lax.optimization_barrier(new)
        mean = optax.tree.bias_correction(new.mu, b1, new.count)
        square = optax.tree.bias_correction(new.nu, b2, new.count)
        return jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square), new

    return optax.GradientTransformationExtraArgs(adam.init, update)


def is_matrix(name: str, array: jax.Array) -> bool:
    """Return whether Muon updates a parameter: kernels that mix channels, except those of the heads.

    These are linear layers and the convolutions of patch embeddings. Depthwise and structure kernels do not
    mix channels; Adam updates them and all other parameters.
    """
    return name.endswith(".kernel") and not re.match(r"(aux_)?head\.", name) and array.shape[-2] > 1


def _muon(adam: optax.GradientTransformationExtraArgs) -> optax.GradientTransformationExtraArgs:
    """Return Muon (Jordan et al., 2024): optax's, with `adam` for the parameters that are not matrices.

    The momentum of a matrix, [inputs, outputs] with the window of a convolution among its inputs, is replaced
    by a matrix with nearly the same singular vectors and singular values near one. It is scaled as by Liu et
    al. (2025, arXiv 2502.16982), so that its root mean square does not depend on its shape.
    """

    def dimensions(params: optax.Params) -> dict[str, optax.contrib.MuonDimensionNumbers]:
        return {
            name: optax.contrib.MuonDimensionNumbers(tuple(range(array.ndim - 1)), array.ndim - 1)
            for name, array in params.items()
        }

    muon = optax.contrib.scale_by_muon(beta=_MUON_MOMENTUM, weight_dimension_numbers=dimensions)

    def parts(tree: optax.Params) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Return the matrices and the other parameters."""
        matrices = {name: array for name, array in tree.items() if is_matrix(name, array)}
        return matrices, {name: array for name, array in tree.items() if name not in matrices}

    def init(params: optax.Params) -> optax.OptState:
        matrices, others = parts(params)
        return {"muon": muon.init(matrices), "adam": adam.init(others)}

    def update(
        grads: optax.Updates,
        old: optax.OptState,
        params: optax.Params | None = None,
        *,
        finite: jax.typing.ArrayLike = True,
    ) -> tuple[optax.Updates, optax.OptState]:
        matrices, others = parts(grads)
        orthogonal, new = muon.update(matrices, old["muon"])
        new = jax.tree.map(functools.partial(jnp.where, finite), new, old["muon"])
        scaled = {
            name: _MUON_RMS * max(array.size // array.shape[-1], array.shape[-1]) ** 0.5 * array
            for name, array in orthogonal.items()
        }
        updates, moments = adam.update(others, old["adam"], finite=finite)
        return scaled | updates, {"muon": new, "adam": moments}

    return optax.GradientTransformationExtraArgs(init, update)
