"""Evaluation: every example exactly once, on any number of devices."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from structvit_jax.models import Network
from structvit_jax.models.weights import Weights, split
from structvit_jax.training.mesh import put_batch
from structvit_jax.training.step import make_eval_step


class Scores(NamedTuple):
    top1: float  # fraction of examples whose label has the highest logit
    top5: float  # ... one of the five highest
    examples: int


class Evaluator:
    """Scores weights on the test split of a `structvit_jax.data.Dataset`; compiled once."""

    def __init__(self, model: Network, config: ml_collections.ConfigDict, mesh: Mesh, data: Any):
        structure, weights = split(model)
        self._step = make_eval_step(structure, config, mesh, weights)
        self._mesh, self._data, self._batch_size = mesh, data, config.eval.batch_size

    def __call__(self, weights: Weights) -> Scores:
        counts: list[dict[str, jax.Array]] = []
        with contextlib.closing(self._data.test_batches(self._batch_size)) as batches:
            for batch in batches:
                counts.append(self._step(weights, put_batch(self._mesh, batch)))
                jax.block_until_ready(counts[-2:][0])  # one batch in flight, not all of them
        top1, top5, seen = (
            sum(int(count[name]) for count in jax.device_get(counts)) for name in ("top1", "top5", "examples")
        )
        if seen != len(self._data.test):
            raise RuntimeError(f"evaluation saw {seen} examples of {len(self._data.test)}")
        return Scores(top1 / seen, top5 / seen, seen)
