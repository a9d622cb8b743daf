"""Evaluation: every example exactly once, on any number of devices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from structvit_jax.models.weights import Weights
from structvit_jax.training.mesh import put_batch


class Scores(NamedTuple):
    top1: float  # fraction of examples whose label has the highest logit
    top5: float  # ... one of the five highest
    examples: int


def evaluate(
    eval_step: Callable, weights: Weights, batches: Iterable[dict[str, np.ndarray]], mesh: Mesh, examples: int
) -> Scores:
    """Scores `weights` on `batches`, which hold `examples` examples and masked padding."""
    counts = [eval_step(weights, put_batch(mesh, batch)) for batch in batches]
    counts = jax.device_get(counts)
    top1, top5, seen = (sum(int(count[name]) for count in counts) for name in ("top1", "top5", "examples"))
    if seen != examples:
        raise RuntimeError(f"evaluation saw {seen} examples of {examples}")
    return Scores(top1 / examples, top5 / examples, examples)
