"""Run a trained model on files and folders. This needs the checkpoint, but no data set.

    trained = structvit_jax.load_trained("runs/moving_digits")
    for prediction in trained.predict(["clip.mp4", "folder"]):
        print(prediction.id, prediction.best(3))

Files are read and scored exactly as in an evaluation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from structvit_jax import data
from structvit_jax.config import model_arguments
from structvit_jax.data.limits import Limits
from structvit_jax.data.media_files import Files, find
from structvit_jax.data.pipeline import test_batches
from structvit_jax.data.reader import Crop, Reader
from structvit_jax.data.types import AugmentOptions, Batch, DataOptions
from structvit_jax.models import Network, create_model
from structvit_jax.models.variants import counterpart
from structvit_jax.models.weights import Weights, split, update
from structvit_jax.runtime.mesh import fitting_batch, make_mesh, single_device_mesh, state_sharding
from structvit_jax.training.card import from_card
from structvit_jax.training.evaluation import StepRunner, probabilities
from structvit_jax.training.restore import open_checkpoint, rereading
from structvit_jax.training.step import make_eval_step, make_features_step, normalize


class Prediction(NamedTuple):
    """The outputs of a model for one example."""

    id: str  # path of the file; for a part of a video also its seconds, for example "clip.mp4#0-10"
    problem: str  # why the example could not be read; "" if it was read
    class_names: tuple[str, ...]
    scores: np.ndarray  # float32 [classes], logits or probabilities, averaged over views
    probabilities: np.ndarray  # float32 [classes], the softmax of the scores if these are logits
    features: np.ndarray | None  # float32 [views, width], the inputs of the head, if requested
    notes: tuple[data.Problem, ...] = ()  # frames that were replaced or repeated

    def best(self, count: int = 5) -> list[tuple[str, float]]:
        """Return the most probable classes with their probabilities, in descending order."""
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.class_names[i], float(self.probabilities[i])) for i in order]


class Example(NamedTuple):
    """A file or test example: the inputs of the model, and the frames from which they were cropped."""

    views: np.ndarray  # uint8 [views, *input shape], as in an evaluation
    frames: np.ndarray  # uint8 [time, height, width, 3], RGB; uncropped frames of the middle view
    crop: Crop  # the region of the frames that the middle view shows
    true_class: str  # "" if unknown


class _TestSplit:
    """Opens the test split of a configuration when it is first needed. It can be sent to data workers."""

    def __init__(self, config: ml_collections.ConfigDict):
        self._config = config

    def __call__(self) -> data.Source:
        return self._source

    @functools.cached_property
    def _source(self) -> data.Source:
        config = self._config
        return data.load(config.data, config.augment, config.train.seed).test.source


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A network with trained weights, its configuration and its class names."""

    network: Network  # in evaluation mode
    config: ml_collections.ConfigDict
    class_names: tuple[str, ...]
    where: str  # folder of the checkpoint
    _runners: dict[tuple[str, Mesh], StepRunner] = dataclasses.field(
        init=False, repr=False, default_factory=dict
    )

    @property
    def reader(self) -> Reader:
        """A reader that processes examples as an evaluation does."""
        return self._reader(self.find([]))

    def _reader(self, source: Files) -> Reader:
        options = DataOptions.from_config(self.config.data)
        augment = AugmentOptions.from_config(self.config.augment)
        return Reader(source, options, augment, self.config.train.seed)

    def find(self, paths: Sequence[str], *, every: float = 0) -> Files:
        """Find the examples in files and folders; see `structvit_jax.data.media_files.find`."""
        video = self.config.data.frames > 0
        limits = Limits.of(self.config.data)
        other = counterpart(self.config.model.name)
        entries = find(paths, video=video, other=other, every=every, limits=limits)
        return Files(
            entries, self.class_names, video=video, other=other, test=self._test_split, limits=limits
        )

    @functools.cached_property
    def _test_split(self) -> _TestSplit:
        return _TestSplit(self.config)

    def read(self, path: str) -> np.ndarray:
        """Return the views of one example, as in an evaluation: uint8 [views, *input shape].

        Args:
          path: a file, or "test:N" for example N of the test data in the configuration.

        Raises:
          DecodeError: the example cannot be read.
        """
        return self._reader(self.find([path])).test(0)["inputs"]

    def example(self, path: str) -> Example:
        """Read one example, together with the uncropped frames of its middle view.

        Args:
          path: a file, or "test:N" for example N of the test data in the configuration.

        Raises:
          DecodeError: the example cannot be read.
        """
        source = self.find([path])
        reader = self._reader(source)
        return Example(reader.test(0)["inputs"], *reader.uncropped(0), source.true_class(0))

    def normalized(self, pixels: np.ndarray | jax.Array) -> jax.Array:
        """Normalise uint8 pixels; return the float32 inputs of the network."""
        return normalize(jnp.asarray(pixels), self.config)

    def scores(self, views: np.ndarray) -> np.ndarray:
        """Return the scores of one example, float32 [classes], as in an evaluation.

        Args:
          views: uint8 [views, *input shape].
        """
        batch = {"inputs": views[None], "labels": np.zeros(1, np.int32)}
        batch |= {"mask": np.ones(1, bool), "index": np.zeros(1, np.int32)}
        mesh = single_device_mesh()
        return self._runner("scores", mesh).run(self._weights(mesh), batch)["scores"][0]

    def prediction(self, name: str, scores: np.ndarray, features: np.ndarray | None = None) -> Prediction:
        """Return the prediction for an example, given its name and scores."""
        return Prediction(
            name, "", self.class_names, scores, probabilities(scores, self.config.eval.average), features
        )

    def predict(
        self, paths: Sequence[str], *, every: float = 0, features: bool = False
    ) -> Iterator[Prediction]:
        """Yield predictions for files, and for all files in folders, in the order in which they are found.

        A batch has config.eval.batch_size examples with config.data.test_clips x test_crops views each.

        Args:
          paths: files and folders.
          every: length in seconds of the parts into which longer videos are cut. Each part gets a prediction.
            0 does not cut videos.
          features: whether to return the inputs of the head, too.

        Raises:
          UserError: a folder has no files that the model can read.
        """
        mesh, source = make_mesh(-1, 1), self.find(paths, every=every)
        weights, runner = self._weights(mesh), self._runner("scores", mesh)
        reader, size = self._reader(source), fitting_batch(mesh, self.config.eval.batch_size, len(source))
        with contextlib.closing(test_batches(reader, size)) as batches:
            for batch, arrays in runner(weights, batches):
                if features:
                    arrays |= self._runner("features", mesh).run(weights, batch)
                yield from self._predictions(source, batch, arrays)

    def _predictions(
        self, source: Files, batch: Batch, arrays: dict[str, np.ndarray]
    ) -> Iterator[Prediction]:
        problems = {problem.id: problem.reason for problem in batch["problems"] if problem.left_out}
        notes = [problem for problem in batch["problems"] if not problem.left_out]
        features = arrays.get("features", [None] * len(arrays["scores"]))
        for row, index in enumerate(batch["index"]):
            if index < 0:
                continue
            name, scores = source.id(int(index)), arrays["scores"][row]
            if batch["mask"][row]:
                prediction = self.prediction(name, scores, features[row])
                yield prediction._replace(notes=tuple(note for note in notes if note.id == name))
            else:
                empty = np.full_like(scores, np.nan)
                yield Prediction(name, problems[name], self.class_names, empty, empty, None)

    def _weights(self, mesh: Mesh) -> Weights:
        """Return the weights of the network, placed on a mesh."""
        weights = split(self.network)[1]
        return jax.device_put(weights, state_sharding(mesh, weights))

    def _runner(self, kind: str, mesh: Mesh) -> StepRunner:
        """Return the runner for "scores" or "features". It is created once, to keep its compiled programs."""
        if (kind, mesh) not in self._runners:
            make = {"scores": make_eval_step, "features": make_features_step}[kind]
            structure, weights = split(self.network)
            self._runners[kind, mesh] = StepRunner(make(structure, self.config, mesh, weights), mesh)
        return self._runners[kind, mesh]


@rereading
def load_trained(checkpoint: str, config: ml_collections.ConfigDict | None = None) -> TrainedModel:
    """Load the model of a checkpoint.

    If the checkpoint has a moving average of the weights and config.eval.ema is set, the average is loaded.

    Args:
      checkpoint: RUN/checkpoints/STEP, or RUN for its latest checkpoint.
      config: replaces the configuration of the checkpoint, for example to change the views or the input size.

    Raises:
      UserError: there is no checkpoint, it is damaged, or the model in `config` differs from the saved one.
    """
    with open_checkpoint(str(checkpoint)) as (checkpoints, step):
        card, where = checkpoints.card(step), str(checkpoints.path(step))
        config = from_card(card["config"], where) if config is None else config
        names = card["class_names"] or [f"class {i}" for i in range(checkpoints.classes(step))]
        network = create_model(**model_arguments(config), num_classes=len(names), seed=None)
        advice, like = "leave config.model as it was saved", split(network)[1]
        weights = checkpoints.weights(step, like, single_device_mesh(), advice, averaged=config.eval.ema)
        update(network, weights)
    return TrainedModel(network, config, tuple(names), where)
