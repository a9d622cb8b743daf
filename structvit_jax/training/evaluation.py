"""Evaluate weights: run a jitted step over batches and score every example once, on any devices."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from structvit_jax.data.types import Batch, Dataset, Problem
from structvit_jax.models.weights import Weights
from structvit_jax.runtime import processes
from structvit_jax.runtime.mesh import fitting_batch, put_batch
from structvit_jax.runtime.storage import write
from structvit_jax.utils.errors import UserError

_ARRAYS = ("index", "mask", "labels", "scores", "top1", "top5")  # of an evaluation step


class StepRunner:
    """Runs a jitted step over batches. It compiles the step once for every shape of a batch."""

    def __init__(self, step: jax.stages.Wrapped, mesh: Mesh):
        """Args: `step`, a function (weights, batch) -> arrays; `mesh`, on which the batches are placed."""
        self.mesh, self._step = mesh, step
        self._compiled: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}

    def __call__(
        self, weights: Weights, batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Yield every batch with the results of the step. One batch is computed ahead.

        Args:
          weights: placed as the step expects them.
          batches: the rows that this process reads.
        """
        running: tuple[Batch, dict[str, jax.Array]] | None = None
        for batch in batches:
            started = batch, self._start(weights, batch)
            if running:
                yield running[0], jax.device_get(running[1])
            running = started
        if running:
            yield running[0], jax.device_get(running[1])

    def run(self, weights: Weights, batch: Mapping[str, object]) -> dict[str, np.ndarray]:
        """Return the results of the step for one batch."""
        return jax.device_get(self._start(weights, batch))

    def _start(self, weights: Weights, batch: Mapping[str, object]) -> dict[str, jax.Array]:
        arrays = put_batch(self.mesh, batch)
        shapes = tuple(arrays[key].shape for key in sorted(arrays))
        if shapes not in self._compiled:
            self._compiled[shapes] = self._step.lower(weights, arrays).compile()
            processes.barrier()  # some processes may have found it in the compilation cache
        return self._compiled[shapes](weights, arrays)


class Scores(NamedTuple):
    """Aggregate metrics over readable examples."""

    top1: float  # fraction of examples whose label has the highest score
    top5: float  # ... one of the five highest
    mean_class: float  # top1 of each class that has examples, averaged over these classes
    examples: int  # number of readable examples
    missing: int  # number of unreadable examples, which count nowhere


class Evaluation(NamedTuple):
    """Results of an evaluation by example, in the order of the data set."""

    ids: tuple[str, ...]
    labels: np.ndarray  # int32 [examples], -1 for unreadable examples
    scores: np.ndarray  # float32 [examples, classes], the mean over views
    hits: dict[str, np.ndarray]  # bool [examples] for "top1" and "top5"
    problems: tuple[Problem, ...]  # of all processes, with notes on readable examples
    max_unreadable: int  # see config.eval.max_unreadable

    def summary(self) -> Scores:
        """Aggregate the metrics.

        Raises:
          UserError: more examples are unreadable than the configuration tolerates.
        """
        seen = self.labels >= 0
        count, missing = int(seen.sum()), int((~seen).sum())
        if missing > self.max_unreadable or not count:
            unreadable = [problem for problem in self.problems if problem.left_out]
            first = "; ".join(f"{problem.id}: {problem.reason}" for problem in unreadable[:3])
            raise UserError(
                f"no score: {missing} of {len(seen)} test examples cannot be read ({first}"
                f"{'; ...' if missing > 3 else ''}); fix or remove them, or leave them out of the score with"
                f" --config.eval.max_unreadable={missing}"
            )
        top1, labels = self.hits["top1"][seen], self.labels[seen]
        per_class = [top1[labels == label].mean() for label in np.unique(labels)]
        top5 = self.hits["top5"][seen].mean()
        return Scores(float(top1.mean()), float(top5), float(np.mean(per_class)), count, missing)

    def save(self, path: epath.Path, class_names: Sequence[str]) -> None:
        """Write ids, labels, scores and class names as a NumPy .npz file."""
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            ids=np.array(self.ids),
            labels=self.labels,
            scores=self.scores,
            class_names=np.array(class_names),
        )
        write(path, buffer.getvalue())


def evaluate(
    runner: StepRunner,
    weights: Weights,
    data: Dataset,
    section: ml_collections.ConfigDict,
    before: Callable[[int], None] = lambda batch: None,
) -> Evaluation:
    """Score weights on the test split of a data set. All processes must call this together.

    Args:
      runner: of an evaluation step, see `structvit_jax.training.step.make_eval_step`.
      weights: placed on the mesh of the runner.
      data: the data set.
      section: config.eval.
      before: called with the number of every batch; may end the evaluation with an exception.
    """
    problems: list[Problem] = []
    results: list[dict[str, np.ndarray]] = []

    def watched(batches: Iterable[Batch]) -> Iterator[Batch]:
        for number, batch in enumerate(batches):
            before(number)
            yield batch

    size = fitting_batch(runner.mesh, section.batch_size, data.test_examples)
    with contextlib.closing(data.test_batches(size, shard=processes.process_shard())) as batches:
        for batch, arrays in runner(weights, watched(batches)):
            problems.extend(batch["problems"])
            results.append(arrays)
    whole = {name: np.concatenate([arrays[name] for arrays in results]) for name in _ARRAYS}
    order = np.argsort(whole["index"], kind="stable")[np.sum(whole["index"] < 0) :]  # without padding
    whole = {name: values[order] for name, values in whole.items()}
    if not np.array_equal(whole["index"], np.arange(data.test_examples)):
        seen, examples = len(whole["index"]), data.test_examples
        raise RuntimeError(f"evaluation saw {seen} examples of {examples}, or some twice")
    return Evaluation(
        data.test_ids,
        np.where(whole["mask"], whole["labels"], -1),
        whole["scores"],
        {name: whole[name] for name in ("top1", "top5")},
        tuple(problem for own in processes.allgather_object(problems) for problem in own),
        section.max_unreadable,
    )


def probabilities(scores: np.ndarray, average: str) -> np.ndarray:
    """Return the probabilities for scores of an evaluation, float32 [..., classes].

    Args:
      scores: [..., classes], means over views.
      average: config.eval.average: "logits" need a softmax, "softmax" are probabilities already.
    """
    if average == "softmax":
        return scores
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
