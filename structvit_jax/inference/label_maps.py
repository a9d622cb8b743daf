"""Write label maps for token labelling: a teacher's scores for each part of every training image."""

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
from structvit_jax.runtime.mesh import check_batch, put_batch
from structvit_jax.runtime.sharding import batch_sharding
from structvit_jax.training.restore import open_checkpoint, rereading
from structvit_jax.training.run import Run
from structvit_jax.training.step import normalize
from structvit_jax.utils.errors import UserError


def write(config: ml_collections.ConfigDict, teacher: str, folder: str, top: int) -> str:
    """Write the maps of the training split, and return a line that describes them.

    Args:
      config: of the teacher, see `structvit_jax.cli.options.open_checkpoint_config`.
      teacher: RUN/checkpoints/STEP, or RUN for its latest.
      folder: where the maps go; an unfinished one is resumed.
      top: how many classes are kept at each position.

    Raises:
      UserError: a teacher of clips, or a folder of other maps.
    """
    config.data.label_maps = ""
    dataset = data.load(config.data, config.augment, config.train.seed)
    if config.data.frames:
        raise UserError("label maps are of images; the teacher's data are clips")
    check_destination(folder)
    run = Run.prepare(config, dataset)
    check_batch(run.mesh, "eval.batch_size", config.eval.batch_size)
    structure, like = split(run.model)
    weights = _restore(teacher, like, run)
    height, width = run.model.grid(config.data.size)
    top = min(top, len(dataset.class_names))
    images = dataset.train_examples
    card = {
        "teacher": str(teacher),
        "params_sha256": sha256(weights),
        "size": config.data.size,
        "normalization": [list(config.data.mean), list(config.data.std), config.data.channels],
        "class_names": list(dataset.class_names),
        "images": images,
        "ids": digest([dataset.train_id(i) for i in range(images)]),
    }
    writer = LabelMapWriter(folder, card, (images, height, width, top))
    size = config.eval.batch_size
    start = writer.done // size

    @jax.jit
    def look(weights, inputs):
        network: Any = structure.model(weights)
        inputs = jax.lax.with_sharding_constraint(inputs, batch_sharding(run.mesh))
        with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh):
            scores = network.dense_scores(normalize(inputs, config))
        return jax.lax.top_k(jax.nn.softmax(scores), top)

    stream: Any = dataset.whole_batches(size, start=start)
    progress = tqdm(total=images, initial=start * size, unit="images")
    with contextlib.closing(stream) as batches, progress:
        for number, batch in enumerate(batches, start):
            scores, classes = look(weights, put_batch(run.mesh, batch)["inputs"])
            rows = batch["index"] >= 0
            scores = np.where(batch["mask"][:, None, None, None], np.asarray(scores), np.nan)[rows]
            writer.write(number * size, np.asarray(classes)[rows], scores)
            progress.update(int(rows.sum()))
    writer.finish()
    return f"{folder}: maps of {images} images, {height}x{width}, {top} classes at each place"


@rereading
def _restore(teacher: str, like: Weights, run: Run) -> Weights:
    with open_checkpoint(teacher) as (checkpoints, step):
        return checkpoints.weights(step, like, run.mesh, "configure the teacher's model", averaged=True)
