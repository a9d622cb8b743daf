"""The result of a run: its final scores in result.json, and its predictions."""

from __future__ import annotations

from typing import TypedDict, cast

import jax
from etils import epath
from jax.sharding import Mesh

from structvit_jax.data.types import Dataset
from structvit_jax.models.weights import Weights, sha256
from structvit_jax.runtime import processes
from structvit_jax.runtime.mesh import replicated
from structvit_jax.runtime.storage import PREDICTIONS, RESULT, read_json, write_json
from structvit_jax.training.evaluation import Evaluation, Scores


class Result(TypedDict):
    """The content of result.json."""

    top1: float
    top5: float
    mean_class: float
    examples: int
    missing: int
    step: int
    params_sha256: str


def make_result(mesh: Mesh, scores: Scores, step: int, weights: Weights) -> Result:
    """Return the content of result.json; all processes must call it."""
    whole = jax.jit(lambda x: x, out_shardings=replicated(mesh))(weights)
    return cast(Result, scores._asdict() | {"step": step, "params_sha256": sha256(whole)})


def write_result(
    workdir: epath.Path, result: Result, evaluation: Evaluation, data: Dataset, suffix: str = ""
) -> None:
    """Write result.json and predictions.npz in the primary process."""
    if processes.is_primary():
        evaluation.save(workdir / PREDICTIONS.replace(".", f"{suffix}."), data.class_names)
        write_json(workdir / RESULT.replace(".", f"{suffix}."), result)


def read_result(workdir: epath.Path, step: int) -> Result | None:
    """Return the result of a run if it is complete and of this step."""
    try:
        result = read_json(workdir / RESULT) or {}
    except OSError:
        return None
    numbers = [result.get(key) for key in ("top1", "top5", "mean_class", "examples", "missing", "step")]
    digest = result.get("params_sha256")
    if not all(isinstance(number, int | float) for number in numbers) or not isinstance(digest, str):
        return None
    return cast(Result, result) if result["step"] == step else None


def describe(result: Result) -> str:
    """Return a result in one line."""
    return (
        f"result: top1 {result['top1']:.4f}  top5 {result['top5']:.4f}  mean_class {result['mean_class']:.4f}"
        f"  on {result['examples']} examples"
        + (f", {result['missing']} missing" if result["missing"] else "")
        + f"  step {result['step']}  params_sha256 {result['params_sha256'][:12]}"
    )


def describe_test(data: Dataset) -> str:
    """Return the size of the test split for a log line."""
    views = f", {data.views} views each" if data.views > 1 else ""
    return f"{data.test_examples} {data.unit}{views}"
