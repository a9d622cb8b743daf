"""Evaluation: score weights or a checkpoint on the test split, and write result.json and predictions.npz."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypedDict, cast

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.sharding import Mesh

from structvit_jax.data.types import Batch, Dataset, Problem
from structvit_jax.models.weights import Weights, sha256, split
from structvit_jax.runtime import processes
from structvit_jax.runtime.mesh import fitting_batch, put_batch, replicated
from structvit_jax.runtime.processes import log
from structvit_jax.runtime.storage import (
    PREDICTIONS,
    RESULT,
    io_errors_as_user_error,
    read_json,
    write,
    write_json,
)
from structvit_jax.training.card import as_json, differences
from structvit_jax.training.learner import Learner, oom_as_user_error
from structvit_jax.training.log import Unreadable
from structvit_jax.training.restore import adopt_classes, open_checkpoint, rereading, same_test_data
from structvit_jax.training.step import make_eval_step
from structvit_jax.utils.errors import UserError

_ARRAYS = ("index", "mask", "labels", "scores", "top1", "top5")  # results of an evaluation step
# Keys that change the scores of a model on given test data.
_SCORE_KEYS = {"data.mean", "data.std", "data.channels", "data.frames", "data.stride", "data.sampling"}
_SCORE_KEYS |= {"data.size", "data.short_side", "data.crop_fraction", "data.test_clips", "data.test_crops"}
_SCORE_KEYS |= {"data.max_replaced_frames", "eval.average"}


class StepRunner:
    """Run a jitted step over batches. The step is compiled once for every shape of a batch."""

    def __init__(self, step: jax.stages.Wrapped, mesh: Mesh):
        """Create a runner, without compiling the step yet.

        Args:
          step: a jitted function (weights, batch) -> arrays.
          mesh: the devices to place the batches on.
        """
        self.mesh, self._step = mesh, step
        self._compiled: dict[tuple[tuple[int, ...], ...], jax.stages.Compiled] = {}

    def __call__(
        self, weights: Weights, batches: Iterable[Batch]
    ) -> Iterator[tuple[Batch, dict[str, np.ndarray]]]:
        """Yield every batch with the results of the step. The next batch is already being computed by then.

        Args:
          weights: the weights, placed as the step expects them.
          batches: batches of the rows that this process reads.
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
            processes.barrier()  # some load it from the compilation cache, and others compile for minutes
        return self._compiled[shapes](weights, arrays)


def eval_runner(learner: Learner) -> StepRunner:
    """Return a runner of the evaluation step of a model. The step is compiled on its first call."""
    structure, weights = split(learner.model)
    return StepRunner(make_eval_step(structure, learner.config, learner.mesh, weights), learner.mesh)


class Scores(TypedDict):
    """Aggregate metrics over readable examples."""

    top1: float  # fraction of examples whose label has the highest score
    top5: float  # fraction of examples whose label has one of the five highest scores
    mean_class: float  # top1 of each class that has examples, averaged over these classes
    examples: int  # number of readable examples
    missing: int  # number of unreadable examples, which no metric counts


class Result(Scores):
    """The content of result.json."""

    step: int
    params_sha256: str  # see `structvit_jax.models.weights.sha256`


class Evaluation(NamedTuple):
    """The results of an evaluation for each example, in the order of the data set."""

    ids: tuple[str, ...]
    labels: np.ndarray  # int32 [examples], -1 for unreadable examples
    scores: np.ndarray  # float32 [examples, classes], the mean over views
    hits: dict[str, np.ndarray]  # bool [examples] for "top1" and "top5"
    problems: tuple[Problem, ...]  # unreadable examples and notes on readable ones, from all processes
    max_unreadable: int  # config.eval.max_unreadable

    def summary(self) -> Scores:
        """Aggregate the metrics.

        Raises:
          UserError: more examples are unreadable than the configuration tolerates, or all are.
        """
        seen = self.labels >= 0
        count, missing = int(seen.sum()), int((~seen).sum())
        if missing > self.max_unreadable or not count:
            unreadable = [problem for problem in self.problems if problem.left_out]
            first = "; ".join(f"{problem.id}: {problem.reason}" for problem in unreadable[:3])
            leave_out = f", or leave them out of the score with --config.eval.max_unreadable={missing}"
            raise UserError(
                f"no score: {missing} of {len(seen)} test examples cannot be read ({first}"
                f"{'; ...' if missing > 3 else ''}); fix or remove them{leave_out if count else ''}"
            )
        top1, labels = self.hits["top1"][seen], self.labels[seen]
        per_class = [top1[labels == label].mean() for label in np.unique(labels)]
        return Scores(
            top1=float(top1.mean()),
            top5=float(self.hits["top5"][seen].mean()),
            mean_class=float(np.mean(per_class)),
            examples=count,
            missing=missing,
        )


def evaluate(
    runner: StepRunner,
    weights: Weights,
    data: Dataset,
    section: ml_collections.ConfigDict,
    before: Callable[[int], None] = lambda batch: None,
) -> Evaluation:
    """Score weights on the test split of a data set. All processes must call this together.

    Args:
      runner: runs an evaluation step, see `structvit_jax.training.step.make_eval_step`.
      weights: weights to score, placed on the mesh of the runner.
      data: the data set.
      section: config.eval.
      before: called before each batch with its number; it may raise an exception to end the evaluation.
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
    # Padding has the index -1, so it comes first and is dropped.
    order = np.argsort(whole["index"], kind="stable")[np.sum(whole["index"] < 0) :]
    whole = {name: values[order] for name, values in whole.items()}
    if not np.array_equal(whole["index"], np.arange(data.test_examples)):
        seen, examples = len(whole["index"]), data.test_examples
        raise RuntimeError(f"evaluation saw {seen} examples of {examples}, or saw some twice")
    return Evaluation(
        data.test_ids,
        np.where(whole["mask"], whole["labels"], -1),
        whole["scores"],
        {name: whole[name] for name in ("top1", "top5")},
        tuple(problem for own in processes.allgather_object(problems) for problem in own),
        section.max_unreadable,
    )


def probabilities(scores: np.ndarray, average: str) -> np.ndarray:
    """Convert the scores of an evaluation to probabilities, float32 [..., classes].

    Args:
      scores: [..., classes], means over views.
      average: config.eval.average. With "logits" the softmax of the scores is returned; with "softmax" the
        scores are probabilities already.
    """
    if average == "softmax":
        return scores
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def make_result(mesh: Mesh, scores: Scores, step: int, weights: Weights) -> Result:
    """Return the content of result.json; all processes must call it."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(weights)
    return Result(**scores, step=step, params_sha256=sha256(whole))


def write_result(
    workdir: epath.Path, result: Result, evaluation: Evaluation, data: Dataset, suffix: str = ""
) -> None:
    """Write result.json and predictions.npz in the primary process; `suffix` is added to both names.

    predictions.npz holds the ids, labels and scores of all examples, and the class names.
    """
    if processes.is_primary():
        buffer, ids, names = io.BytesIO(), np.array(evaluation.ids), np.array(data.class_names)
        labels, scores = evaluation.labels, evaluation.scores
        np.savez_compressed(buffer, ids=ids, labels=labels, scores=scores, class_names=names)
        write(workdir / PREDICTIONS.replace(".", f"{suffix}."), buffer.getvalue())
        write_json(workdir / RESULT.replace(".", f"{suffix}."), result)


def read_result(workdir: epath.Path, step: int) -> Result | None:
    """Return the result in a workdir; None if it is missing, damaged, or belongs to another step."""
    try:
        result = read_json(workdir / RESULT)
    except OSError:
        return None
    if not result or not result.keys() >= Result.__required_keys__ or result["step"] != step:
        return None
    return cast(Result, result)


def describe_result(result: Result) -> str:
    """Return a result in one line."""
    missing = f", {result['missing']} missing" if result["missing"] else ""
    return (
        f"result: top1 {result['top1']:.4f}  top5 {result['top5']:.4f}  mean_class {result['mean_class']:.4f}"
        f"  on {result['examples']} examples{missing}  step {result['step']}"
        f"  params_sha256 {result['params_sha256'][:12]}"
    )


def describe_test(data: Dataset) -> str:
    """Return the size of the test split for a log line."""
    views = f", {data.views} views each" if data.views > 1 else ""
    return f"{data.test_examples} {data.unit}{views}"


def evaluate_checkpoint(
    config: ml_collections.ConfigDict, path: epath.Path, out: epath.Path | None, data: Dataset
) -> None:
    """Evaluate a checkpoint, log the result and write its files.

    Args:
      config: configuration of the model, the data and the evaluation.
      path: RUN/checkpoints/STEP, or RUN for its latest step.
      out: folder for the files; None writes none. If it is RUN, and its test data or the way to read or score
        them have changed, the files of the run are kept. The new ones are then result_other.json and
        predictions_other.npz.
      data: see `structvit_jax.data.load`.

    Raises:
      UserError: there is no checkpoint, or it holds another model.
    """
    with io_errors_as_user_error(out or path), oom_as_user_error(config):
        learner = Learner.create(config, data)
        checkpoint, card, weights = _restore(learner, data, path)
        run, step = checkpoint.parent.parent, int(checkpoint.name)
        log(f"evaluating step {step} of {run} on {describe_test(data)}")
        for difference in differences(card["config"], as_json(config)):
            log(f"note: {difference.describe()}")
        evaluation = evaluate(eval_runner(learner), weights, data, config.eval)
        result = make_result(learner.mesh, evaluation.summary(), step, weights)
        log(describe_result(result))
        if out:
            out.mkdir(parents=True, exist_ok=True)
            unreadable = Unreadable(out, data.train_examples, config.data.max_unreadable_fraction)
            unreadable.note("test", evaluation.problems)
            unreadable.exchange()
            other = out == run and not _is_comparable(card, config, data)
            if other:
                changed = "the test data, or how they are read or scored, are not those of the run"
                log(f"{changed}: {out / RESULT} is kept; see result_other.json")
            write_result(out, result, evaluation, data, "_other" * other)


@rereading
def _restore(learner: Learner, data: Dataset, path: epath.Path) -> tuple[epath.Path, dict[str, Any], Weights]:
    """Return the folder, the card and the weights of a checkpoint; number the labels like its classes."""
    with open_checkpoint(str(path)) as (checkpoints, step):
        card = checkpoints.card(step)
        adopt_classes(data, card)
        like, averaged = split(learner.model)[1], learner.config.eval.ema
        advice = "configure the model that was saved"
        weights = checkpoints.weights(step, like, learner.mesh, advice, averaged=averaged)
        return checkpoints.path(step), card, weights


def _is_comparable(card: Mapping[str, Any], config: ml_collections.ConfigDict, data: Dataset) -> bool:
    """Return whether the scores of this configuration and data are comparable with those of the run."""
    keys = {difference.key for difference in differences(card["config"], as_json(config))}
    return keys.isdisjoint(_SCORE_KEYS) and same_test_data(data, card)
