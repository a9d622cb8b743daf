"""Evaluation: every example exactly once, all its views averaged, on any number of devices."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from structvit_jax.models import Network
from structvit_jax.models.weights import Weights, split
from structvit_jax.runtime import processes
from structvit_jax.runtime.mesh import fitting_batch, put_batch
from structvit_jax.runtime.storage import write
from structvit_jax.training.step import make_eval_step
from structvit_jax.utils.errors import UserError


class Scores(NamedTuple):
    """What an evaluation comes to, over the examples that could be read."""

    top1: float  # fraction of examples whose label has the highest score
    top5: float  # ... one of the five highest
    mean_class: float  # top1 of each class that has examples, averaged over these classes
    examples: int  # that were scored
    missing: int  # that could not be read, and count nowhere


class Evaluation(NamedTuple):
    """What an evaluation found, example by example in the order of the data set."""

    ids: tuple[str, ...]
    labels: np.ndarray  # int32 [examples], -1 where the example could not be read
    scores: np.ndarray  # float32 [examples, classes], the mean over views
    hits: dict[str, np.ndarray]  # bool [examples] for "top1" and "top5"
    problems: tuple[Any, ...]  # of data.Problem, notes included
    tolerated: int  # how many may be missing

    def summary(self) -> Scores:
        """Raises UserError if more examples are missing than the configuration tolerates."""
        seen = self.labels >= 0
        count, missing = int(seen.sum()), int((~seen).sum())
        if missing > self.tolerated or not count:
            unreadable = [problem for problem in self.problems if problem.left_out]
            first = "; ".join(f"{problem.id}: {problem.reason}" for problem in unreadable[:3])
            raise UserError(
                f"no score: {missing} of {len(seen)} test examples cannot be read ({first}"
                f"{'; ...' if missing > 3 else ''}); fix or remove them, or accept that they are left out"
                f" with --config.eval.max_unreadable={missing}"
            )
        top1, labels = self.hits["top1"][seen], self.labels[seen]
        per_class = [top1[labels == label].mean() for label in np.unique(labels)]
        top5 = self.hits["top5"][seen].mean()
        return Scores(float(top1.mean()), float(top5), float(np.mean(per_class)), count, missing)

    def save(self, path: epath.Path, class_names: Sequence[str]) -> None:
        """Writes ids, labels, scores and class names as a NumPy .npz file."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            ids=np.array(self.ids),
            labels=self.labels,
            scores=self.scores,
            class_names=np.array(class_names),
        )
        write(path, buffer.getvalue())


def probabilities(scores: np.ndarray, average: str) -> np.ndarray:
    """Of scores [..., classes], which are means over views of what config.eval.average says: the softmax of
    logits; those of "softmax" are probabilities already."""
    if average == "softmax":
        return scores
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


class Evaluator:
    """Scores weights on the test split of a `structvit_jax.data.Dataset`; compiled once."""

    def __init__(self, model: Network, config: ml_collections.ConfigDict, mesh: Mesh, data: Any):
        structure, weights = split(model)
        self._step = make_eval_step(structure, config, mesh, weights)
        self._compiled: Any = None
        self._mesh, self._data, self._config = mesh, data, config.eval

    def _scores(self, weights: Weights, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if not self._compiled:
            self._compiled = self._step.lower(weights, batch).compile()
            processes.barrier()
        return self._compiled(weights, batch)

    def __call__(self, weights: Weights, before: Callable[[int], None] | None = None) -> Evaluation:
        """`before` is called with the number of every batch; it may end the evaluation by raising."""
        results: list[dict[str, Any]] = []
        problems: list[Any] = []
        size = fitting_batch(self._mesh, self._config.batch_size, self._data.test_examples)
        stream = self._data.test_batches(size, shard=processes.process_shard())
        with contextlib.closing(stream) as batches:
            for number, batch in enumerate(batches):
                if before:
                    before(number)
                results.append(self._scores(weights, put_batch(self._mesh, batch)))
                problems.extend(batch["problems"])
                if len(results) > 1:  # one batch in flight, not all of them
                    results[-2] = jax.device_get(results[-2])
        names = ("index", "mask", "labels", "scores", "top1", "top5")
        whole = {name: np.concatenate([np.asarray(r[name]) for r in results]) for name in names}
        order = np.argsort(whole["index"], kind="stable")[np.sum(whole["index"] < 0) :]  # without padding
        whole = {name: values[order] for name, values in whole.items()}
        if not np.array_equal(whole["index"], np.arange(self._data.test_examples)):
            seen, examples = len(whole["index"]), self._data.test_examples
            raise RuntimeError(f"evaluation saw {seen} examples of {examples}, or some twice")
        hits = {name: whole[name] for name in ("top1", "top5")}
        return Evaluation(
            self._data.test_ids,
            np.where(whole["mask"], whole["labels"], -1),
            whole["scores"],
            hits,
            tuple(problem for mine in processes.allgather_object(problems) for problem in mine),
            self._config.max_unreadable,
        )
