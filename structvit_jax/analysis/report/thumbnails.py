"""Small pictures of a run's test examples, as its model saw them."""

from __future__ import annotations

import io

import ml_collections
import numpy as np
from PIL import Image

from structvit_jax import data
from structvit_jax.analysis import batch_preview
from structvit_jax.analysis.report.markup import Markup, image
from structvit_jax.utils.errors import DecodeError, decoding

FRAMES = 4  # of a clip, beside each other
GAP = 2  # white pixels between them
_LARGEST = 112  # pixels, of a frame's side; larger ones are made smaller, and stored as JPEG


class Thumbnails:
    """Reads examples by id, through the data set that a configuration describes.

    Raises:
      DecodeError: it cannot be opened here; the message is the reason.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        config = config.copy_and_resolve_references()
        config.data.label_maps = ""  # of the training split
        with decoding():
            self._data = data.load(config.data, config.augment, config.train.seed)
        self._places = {name: place for place, name in enumerate(self._data.test_ids)}
        self._config = config.data

    def pixels(self, name: str) -> np.ndarray:
        """Pictures beside each other: uint8 [height, width, 3], red first.

        Raises:
          DecodeError: the example cannot be read, or is not there any more.
        """
        if name not in self._places:
            raise DecodeError("the data do not hold it any more")
        views = self._data.test.test(self._places[name])["inputs"]
        view = views[self._data.test.middle]
        view = view if self._config.frames else view[None]
        frames = list(view[batch_preview.evenly_spaced(len(view), FRAMES)])
        gap = np.full((view.shape[1], GAP, 3), 255, np.uint8)
        strip = np.concatenate([frames[0], *(part for frame in frames[1:] for part in (gap, frame))], axis=1)
        return strip[..., ::-1] if self._config.channels == "bgr" else strip

    def __call__(self, name: str) -> Markup:
        """The picture of an example for the page; raises as `pixels` does."""
        picture = Image.fromarray(np.ascontiguousarray(self.pixels(name)))
        kind = "PNG"
        if picture.height > _LARGEST:
            picture.thumbnail((picture.width, _LARGEST))
            kind = "JPEG"
        file = io.BytesIO()
        picture.save(file, kind, quality=85)
        shown = "frames of" if self._config.frames else "picture of"
        return image(file.getvalue(), f"image/{kind.lower()}", f"{shown} {name}", class_="thumbnail")
