"""Parameters and multiply-accumulates of a model, counted from what its layers declare."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from structvit_jax.models.ledger import ledger
from structvit_jax.models.networks import create_model


@dataclasses.dataclass(frozen=True)
class Part:
    """One part of a model."""

    params: int  # trainable parameters
    macs: int  # multiply-accumulates for one example


@dataclasses.dataclass(frozen=True)
class Cost(Part):
    """The whole model, with the same by part."""

    parts: dict[str, Part]  # by top-level module, in the order of the forward pass
    kinds: dict[str, int]  # multiply-accumulates by kind: conv, depthwise, linear, structure, attention


def cost(name: str, input_shape: Sequence[int], num_classes: int, **overrides) -> Cost:
    """Counts a model by tracing its forward pass.

    Multiply-accumulates are those of matrix products, convolutions and attention for one example;
    norms, softmax, GELU and biases are not counted (they add less than 0.5 %).

    Args:
      name, num_classes, **overrides: as for `create_model`.
      input_shape: [height, width, 3] or [time, height, width, 3], without batch.
    """
    overrides |= {"remat": "none"}
    model = create_model(name, num_classes=num_classes, seed=None, **overrides)
    graphdef, state = nnx.split(model)
    params: dict[str, int] = collections.Counter()
    for path, leaf in nnx.to_flat_state(nnx.filter_state(state, nnx.Param)):
        params[str(path[0])] += math.prod(leaf.shape)
    macs: dict[str, int] = collections.Counter()
    kinds: dict[str, int] = collections.Counter()

    def forward(state, x):
        model = nnx.merge(graphdef, state)
        part_of = {id(module): path[0] for path, module in nnx.iter_modules(model) if path}
        with ledger() as entries:
            model(x)
        for entry in entries:
            macs[str(part_of[id(entry.module)])] += entry.macs
            kinds[entry.kind] += entry.macs

    jax.eval_shape(forward, state, jax.ShapeDtypeStruct((1, *input_shape), jnp.float32))
    order = [*macs, *(part for part in params if part not in macs)]
    parts = {part: Part(params[part], macs[part]) for part in order}
    return Cost(sum(params.values()), sum(macs.values()), parts, dict(kinds))
