"""Write label maps for token labelling: a teacher's class scores at each position of every training image."""

from __future__ import annotations

import contextlib
from typing import Any

import jax
import ml_collections
import numpy as np
from tqdm import tqdm

from structvit_jax import data
from structvit_jax.data.label_maps import LabelMapWriter, check_destination, digest
from structvit_jax.models.weights import Weights, sha256, split
from structvit_jax.runtime.mesh import batch_sharding, check_batch
from structvit_jax.training.evaluation import StepRunner
from structvit_jax.training.learner import Learner
from structvit_jax.training.restore import open_checkpoint, rereading
from structvit_jax.training.step import normalize
from structvit_jax.utils.errors import UserError


def write(config: ml_collections.ConfigDict, teacher: str, folder: str, top: int) -> str:
    """Write the maps of the training images, and return a line that describes them.

    Args:
      config: the configuration of the teacher; see `structvit_jax.cli.options.open_checkpoint_config`.
      teacher: the checkpoint, RUN/checkpoints/STEP, or RUN for its latest one.
      folder: folder for the maps. If it holds a part of these maps, writing resumes there.
      top: number of classes to keep at each position.

    Raises:
      UserError: the teacher is a video model, or the folder holds other maps.
    """
    config.data.label_maps = ""
    dataset = data.load(config.data, config.augment, config.train.seed)
    if config.data.frames:
        raise UserError("label maps are for images, but the teacher takes clips")
    check_destination(folder)
    learner = Learner.create(config, dataset)
    mesh, size = learner.mesh, config.eval.batch_size
    check_batch(mesh, "eval.batch_size", size)
    weights = _restore(teacher, learner)
    height, width = learner.model.grid(config.data.size)
    top = min(top, len(dataset.class_names))
    count = dataset.train_examples
    card = {
        "teacher": str(teacher),
        "params_sha256": sha256(weights),
        "size": config.data.size,
        "normalization": [list(config.data.mean), list(config.data.std), config.data.channels],
        "class_names": list(dataset.class_names),
        "images": count,
        "ids": digest([dataset.train_id(i) for i in range(count)]),
    }
    writer = LabelMapWriter(folder, card, (count, height, width, top))
    start = writer.done // size
    runner = StepRunner(_make_dense_step(learner, top), mesh)
    stream = dataset.uncropped_batches(size, start=start)
    progress = tqdm(total=count, initial=start * size, unit="images")
    with contextlib.closing(stream) as batches, progress:
        for number, (batch, arrays) in enumerate(runner(weights, batches), start):
            rows = batch["index"] >= 0
            scores = np.where(batch["mask"][:, None, None, None], arrays["scores"], np.nan)[rows]
            writer.write(number * size, arrays["classes"][rows], scores)
            progress.update(int(rows.sum()))
    writer.finish()
    return f"{folder}: maps of {count} images, {height}x{width} positions, {top} classes at each position"


def _make_dense_step(learner: Learner, top: int) -> jax.stages.Wrapped:
    """Return a jitted step that maps (weights, batch) to the highest probabilities at every position.

    The results are `scores` (float32) and `classes` (int32), both [rows, height, width, top].
    """
    structure, _ = split(learner.model)
    mesh, config = learner.mesh, learner.config

    def step_fn(weights: Weights, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        network: Any = structure.model(weights)
        inputs = jax.lax.with_sharding_constraint(batch["inputs"], batch_sharding(mesh))
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            logits = network.dense_scores(normalize(inputs, config))
        scores, classes = jax.lax.top_k(jax.nn.softmax(logits), top)
        return {"scores": scores, "classes": classes}

    return jax.jit(step_fn)


@rereading
def _restore(teacher: str, learner: Learner) -> Weights:
    like, advice = split(learner.model)[1], "configure the teacher's model"
    with open_checkpoint(teacher) as (checkpoints, step):
        return checkpoints.weights(step, like, learner.mesh, advice, averaged=True)
