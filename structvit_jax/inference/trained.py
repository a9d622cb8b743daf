"""A trained model from its checkpoint alone: no data set, no optimizer.

    trained = structvit_jax.load_trained("runs/moving_digits")
    for prediction in trained.predict(["clip.mp4", "folder"]):
        print(prediction.id, prediction.best(3))

It reads and scores as an evaluation does.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from structvit_jax import data
from structvit_jax.config import model_arguments
from structvit_jax.data.files import Files, find
from structvit_jax.data.limits import Limits
from structvit_jax.data.pipeline import test_batches
from structvit_jax.data.reader import Crop, Reader
from structvit_jax.data.types import AugmentOptions, DataOptions
from structvit_jax.models import Network, create_model
from structvit_jax.models.variants import counterpart
from structvit_jax.models.weights import Weights, split, update
from structvit_jax.runtime.mesh import fitting_batch, make_mesh, put_batch
from structvit_jax.training.card import from_card
from structvit_jax.training.evaluation import probabilities
from structvit_jax.training.restore import open_checkpoint, rereading
from structvit_jax.training.step import make_eval_step, normalize


class Prediction(NamedTuple):
    """What a model says of an example."""

    id: str  # its path; of a part of a file with the seconds, "clip.mp4#0-10"
    problem: str  # why it could not be read; "" if it could
    class_names: tuple[str, ...]
    scores: np.ndarray  # float32 [classes], as an evaluation saves them: the mean over views
    probabilities: np.ndarray  # float32 [classes]: of these, their softmax if they are logits
    features: np.ndarray | None  # float32 [views, width], before the head, where they were asked for
    notes: tuple[data.Problem, ...] = ()  # frames that were replaced or repeated

    def best(self, count: int = 5) -> list[tuple[str, float]]:
        """The most probable classes with their probabilities, the first the most probable."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.class_names[i], float(self.probabilities[i])) for i in order]


class Example(NamedTuple):
    """A file, or test:N, as a model sees it and as it was recorded."""

    views: np.ndarray  # uint8 [views, *shape of an input], as an evaluation sees them
    frames: np.ndarray  # uint8 [time, height, width, 3], RGB: those of the middle view, uncropped
    crop: Crop  # the part of the frames in the middle view
    true_class: str  # "" where it is not known


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A network with trained weights, and what their card says."""

    network: Network  # in evaluation mode
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    where: str  # the checkpoint's folder

    @property
    def reader(self) -> Reader:
        """Reads examples as the evaluation does."""
        return self._reader(self.find([]))

    def _reader(self, source: Files) -> Reader:
        options = DataOptions.from_config(self.config.data)
        augment = AugmentOptions.from_config(self.config.augment)
        return Reader(source, options, augment, self.config.train.seed)

    def find(self, paths: Sequence[str], *, every: float = 0) -> Files:
        """The examples that paths of files and folders stand for; see `structvit_jax.data.files.find`."""
        video = self.config.data.frames > 0
        limits = Limits.of(self.config.data)
        other = counterpart(self.config.model.name)
        entries = find(paths, video=video, other=other, every=every, limits=limits)
        return Files(
            entries, self.class_names, video=video, other=other, test=lambda: self._test, limits=limits
        )

    @functools.cached_property
    def _test(self) -> data.Source:
        return data.load(self.config.data, self.config.augment, self.config.train.seed).test.source

    def read(self, path: str) -> np.ndarray:
        """The views of a file, or of test:N, that an evaluation sees: uint8 [views, *shape of an input].

        Raises:
          DecodeError: it cannot be read.
        """
        return self._reader(self.find([path])).test(0)["inputs"]

    def example(self, path: str) -> Example:
        """Read a file, or test:N, together with the frames that its middle view was cut from.

        Raises:
          DecodeError: it cannot be read.
        """
        source = self.find([path])
        reader = self._reader(source)
        return Example(reader.test(0)["inputs"], *reader.uncropped(0), source.true_class(0))

    def normalized(self, pixels: np.ndarray | jax.Array) -> jax.Array:
        """uint8 pixels as the network takes them, float32."""
        return normalize(jnp.asarray(pixels), self.config)

    def scores(self, views: np.ndarray) -> np.ndarray:
        """Of one example with all its views, uint8 [views, ...]: float32 [classes], as an evaluation's."""
        mesh = make_mesh(1, 1, jax.devices()[:1])
        structure, weights = split(self.network)
        step = make_eval_step(structure, self.config, mesh, weights)
        batch = {"inputs": views[None], "labels": np.zeros(1, np.int32)}
        batch |= {"mask": np.ones(1, bool), "index": np.zeros(1, np.int32)}
        return np.asarray(step(weights, put_batch(mesh, batch))["scores"])[0]

    def prediction(self, name: str, scores: np.ndarray, features: np.ndarray | None = None) -> Prediction:
        """Scores with their probabilities and classes."""
        shares = probabilities(scores, self.config.eval.average)
        return Prediction(name, "", self.class_names, scores, shares, features)

    def predict(
        self, paths: Sequence[str], *, every: float = 0, features: bool = False
    ) -> Iterator[Prediction]:
        """What the model says of files, and of all that is in folders, one after the other, as they are read:
        config.eval.batch_size at a time, config.data.test_clips x test_crops views of each.

        Args:
          paths: of files and folders.
          every: seconds; longer videos are cut into parts of this length. 0 cuts none.
          features: whether to keep what the head sees.

        Raises:
          UserError: a folder with nothing in it that the model takes.
        """
        mesh = make_mesh(-1, 1)
        source = self.find(paths, every=every)
        structure, weights = split(self.network)
        step = make_eval_step(structure, self.config, mesh, weights)
        pooled = jax.jit(self._pooled) if features else None
        reader, size = self._reader(source), fitting_batch(mesh, self.config.eval.batch_size, len(source))
        with contextlib.closing(test_batches(reader, size)) as batches:
            for batch in batches:
                scores = np.asarray(step(weights, put_batch(mesh, batch))["scores"])
                kept = np.asarray(pooled(weights, batch["inputs"])) if pooled else [None] * len(scores)
                yield from self._told(batch, source, scores, kept)

    def _told(self, batch: Any, source: Files, scores: np.ndarray, features: Any) -> Iterator[Prediction]:
        problems = {problem.id: problem.reason for problem in batch["problems"] if problem.left_out}
        notes = [problem for problem in batch["problems"] if not problem.left_out]
        for row, index in enumerate(batch["index"]):
            if index < 0:
                continue
            name = source.id(int(index))
            if batch["mask"][row]:
                prediction = self.prediction(name, scores[row], features[row])
                yield prediction._replace(notes=tuple(note for note in notes if note.id == name))
            else:
                empty = np.full_like(scores[row], np.nan)
                yield Prediction(name, problems[name], self.class_names, empty, empty, None)

    def _pooled(self, weights: Weights, inputs: jax.Array) -> jax.Array:
        """uint8 [rows, views, ...] -> float32 [rows, views, width]."""
        network: Any = split(self.network)[0].model(weights)

        def of_view(pixels):
            return network.pooled(normalize(pixels, self.config)).astype(jnp.float32)

        return jnp.moveaxis(jax.lax.map(of_view, jnp.moveaxis(inputs, 1, 0)), 0, 1)


@rereading
def load_trained(checkpoint: str, config: ml_collections.ConfigDict | None = None) -> Trained:
    """The model of a checkpoint of ours, with the moving average of its weights where there is one and
    config.eval.ema is set.

    Args:
      checkpoint: RUN/checkpoints/STEP, or RUN for its latest.
      config: in place of the card's, with other views or another size, say.

    Raises:
      UserError: no checkpoint, a damaged one, or a configured model that is not the one that was saved.
    """
    with open_checkpoint(str(checkpoint)) as (checkpoints, step):
        card, where = checkpoints.card(step), str(checkpoints.path(step))
        config = from_card(card["config"], where) if config is None else config
        names = card["class_names"] or [f"class {i}" for i in range(checkpoints.classes(step))]
        network = create_model(**model_arguments(config), num_classes=len(names), seed=None)
        mesh = make_mesh(1, 1, jax.devices()[:1])
        advice = "leave config.model as it was saved"
        like = split(network)[1]
        update(network, checkpoints.weights(step, like, mesh, advice, averaged=config.eval.ema))
    return Trained(network, config, tuple(names), where)
