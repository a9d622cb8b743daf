"""Convert a model to flat dicts of its weights, such as {"blocks1.0.attn.proj.kernel": array}, and back.

Checkpoints, digests, placement on devices and weight conversion all use these dotted paths as names.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

Arrays = dict[str, jax.Array]


class Weights(NamedTuple):
    """The arrays of a model."""

    params: Arrays  # updated by the optimizer
    batch_stats: Arrays  # running means and variances of BatchNorm


class ModelDef(NamedTuple):
    """The definition of a model, without its arrays. It is hashable."""

    graphdef: nnx.GraphDef

    def model(self, weights: Weights) -> nnx.Module:
        """Return the model with these arrays."""
        flat: dict[tuple, nnx.Variable] = {_path(name): nnx.Param(a) for name, a in weights.params.items()}
        flat |= {_path(name): nnx.BatchStat(a) for name, a in weights.batch_stats.items()}
        return nnx.merge(self.graphdef, nnx.from_flat_state(flat))


def split(model: nnx.Module) -> tuple[ModelDef, Weights]:
    """Split a model into its definition, in its current mode (training or evaluation), and its arrays."""
    graphdef, *states = nnx.split(model, nnx.Param, nnx.BatchStat)
    return ModelDef(graphdef), Weights(*map(_flat, states))


def training_structure(model: nnx.Module, frozen: frozenset[str] = frozenset()) -> ModelDef:
    """Return the definition of a model in training mode, except for frozen parts.

    Parts whose parameters are all in `frozen` stay in evaluation mode: they normalise with running statistics
    and have no stochastic depth.
    """
    model.train()
    names = list(split(model)[1].params)
    for path, part in nnx.iter_modules(model):
        own = [name for name in names if name.startswith(_name(path) + ".")]
        if own and frozen.issuperset(own):
            part.eval()
    structure, _ = split(model)
    model.eval()
    return structure


def batch_stats(model: nnx.Module) -> Arrays:
    """Return the model's running statistics."""
    return _flat(nnx.state(model, nnx.BatchStat))


def cast_like(weights: Weights, arrays: Mapping[str, Any]) -> Weights:
    """Return copies of `arrays`, with the names and dtypes of `weights`."""
    return Weights(
        *({name: jnp.array(arrays[name], own.dtype) for name, own in part.items()} for part in weights)
    )


def update(model: nnx.Module, weights: Weights) -> None:
    """Replace the weights of a model."""
    own = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    given = weights.params | weights.batch_stats
    nnx.update(model, nnx.from_flat_state([(path, leaf.replace(given[_name(path)])) for path, leaf in own]))


def sha256(weights: Weights) -> str:
    """Return a digest of parameters and batch statistics.

    It covers the path, dtype, shape and little-endian bytes of each array, sorted by path.
    """
    digest = hashlib.sha256()
    for name, array in sorted((weights.params | weights.batch_stats).items()):
        value = np.asarray(array)
        digest.update(f"{name} {value.dtype.name} {value.shape}\n".encode())
        digest.update(value.astype(value.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def mismatches(expected: Mapping[str, jax.Array], given: Mapping[str, jax.Array]) -> list[str]:
    """Return the differences in names and shapes of two sets of arrays, as one short text per name."""
    problems = [f"missing {name}" for name in expected if name not in given]
    problems += [f"extra {name}" for name in given if name not in expected]
    problems += [
        f"misshapen {name}: {tuple(given[name].shape)} for {tuple(expected[name].shape)}"
        for name in expected
        if name in given and given[name].shape != expected[name].shape
    ]
    return problems


def _path(name: str) -> tuple:
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def _flat(state: nnx.State) -> Arrays:
    return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(state)}


def _name(path: tuple) -> str:
    return ".".join(map(str, path))
