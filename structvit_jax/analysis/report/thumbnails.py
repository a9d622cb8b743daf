"""Thumbnails of a run's test examples, as its model saw them."""

from __future__ import annotations

import io

import ml_collections
import numpy as np
from PIL import Image

from structvit_jax import data
from structvit_jax.analysis import batch_preview
from structvit_jax.analysis.html import EmbeddedImage, data_url
from structvit_jax.utils.errors import DecodeError, decoding

GAP = 2  # white pixels between frames
_FRAMES = 4  # frames of a clip beside each other
_MAX_SIDE = 112  # pixels; larger frames are downscaled and stored as JPEG


class Thumbnails:
    """Reads examples by id from the data set of a configuration.

    Raises:
      DecodeError: the data set cannot be opened here; the message is the reason.
    """

    def __init__(self, config: ml_collections.ConfigDict):
        config = config.copy_and_resolve_references()
        config.data.label_maps = ""  # used in training only
        with decoding():
            self._data = data.load(config.data, config.augment, config.train.seed)
        self._indices = {name: index for index, name in enumerate(self._data.test_ids)}
        self._config = config.data

    def pixels(self, name: str) -> np.ndarray:
        """Return an image, or frames of a clip beside each other: uint8 [height, width, 3], RGB.

        Raises:
          DecodeError: the example cannot be read, or the data set no longer has it.
        """
        if name not in self._indices:
            raise DecodeError("it is no longer in the data set")
        views = self._data.test.test(self._indices[name])["inputs"]
        view = views[self._data.test.middle]
        view = view if self._config.frames else view[None]
        frames = list(view[batch_preview.evenly_spaced(len(view), _FRAMES)])
        gap = np.full((view.shape[1], GAP, 3), 255, np.uint8)
        strip = np.concatenate([frames[0], *(part for frame in frames[1:] for part in (gap, frame))], axis=1)
        return strip[..., ::-1] if self._config.channels == "bgr" else strip

    def image(self, name: str) -> EmbeddedImage:
        """Return the thumbnail of an example; raise as `pixels` does."""
        thumbnail, kind = Image.fromarray(np.ascontiguousarray(self.pixels(name))), "PNG"
        if thumbnail.height > _MAX_SIDE:
            thumbnail.thumbnail((thumbnail.width, _MAX_SIDE))
            kind = "JPEG"
        file = io.BytesIO()
        thumbnail.save(file, kind, quality=85)
        alt = f"{'frames' if self._config.frames else 'image'} of {name}"
        return EmbeddedImage(data_url(file.getvalue(), f"image/{kind.lower()}"), alt)
