"""What the picture and the animation of a query share: its maps as rows, its window, and its grid cell."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from structvit_jax.analysis.explain import overlay
from structvit_jax.analysis.explain.maps import Layer, Query
from structvit_jax.data.reader import Crop


class Row(NamedTuple):
    """A map over the times of a layer, and the kernels beside it."""

    label: str
    short_label: str
    values: np.ndarray  # [time, height, width]
    kernels: tuple[tuple[str, np.ndarray], ...] = ()  # titles and signed kernels [time, height, width]


class Drawing(NamedTuple):
    """The maps of one query, to be drawn over the input."""

    frames: np.ndarray  # uint8 [time, height, width, 3], RGB, as recorded; an image has one time
    crop: Crop  # the part of the frames that the model saw
    layer: Layer
    query: Query
    smooth: bool = True  # interpolate maps between positions and times

    @property
    def grid(self) -> tuple[int, int, int]:
        """The layer's positions along (time, height, width); an image has one time."""
        time, rows, columns = (1, *self.layer.grid)[-3:]
        return time, rows, columns

    @property
    def position(self) -> tuple[int, int, int]:
        """The query's position on the grid."""
        time, row, column = (0, *self.query.position)[-3:]
        return time, row, column

    @property
    def seen(self) -> np.ndarray:
        """The pixels that the model saw, before they were resized: uint8 [time, height, width, 3]."""
        top, left, bottom, right = overlay.box(self.crop, *self.frames.shape[1:3])
        return self.frames[:, top:bottom, left:right]

    @property
    def cell(self) -> Crop:
        """The query's cell of the grid, as a box in the frame."""
        (_, rows, columns), (_, row, column) = self.grid, self.position
        height, width = self.crop.height / rows, self.crop.width / columns
        return Crop(self.crop.top + row * height, self.crop.left + column * width, height, width)

    def rows(self) -> list[Row]:
        """Return the correlations, the attention of each structure kernel, and the final map.

        Beside the correlations is the dynamic kernel at the query, beside the attention are the structure
        kernels. Kernels and maps with channels are averaged over them.
        """
        axes, structure_dim = len(self.layer.grid), self.layer.structure_dim
        correlation, final = (
            with_time(array, axes) for array in (self.query.correlation, self.query.final.mean(axis=-1))
        )
        kappa = with_time(self.query.kappa[self._key].mean(axis=-1), axes)
        plain = self.layer.kind == "self-attention"
        rows = [
            Row(
                "correlation with every position",
                "correlation",
                correlation,
                () if plain else (("dynamic kernel", kappa),),
            )
        ]
        key_kernels, value_kernels = (
            kernels[..., min(self.query.head, kernels.shape[-3] - 1), :, :].mean(axis=-2)
            for kernels in self.layer.kernels()
        )
        for d, attention in enumerate(self.query.attention):
            kernels = (
                ("key kernel", with_time(key_kernels[..., d], axes)),
                ("value kernel", with_time(value_kernels[..., d], axes)),
            )
            short = f"kernel {d + 1}: {attention.sum():.0%}" if structure_dim > 1 else "attention"
            label = f"attention of structure {short}" if structure_dim > 1 else short
            rows.append(Row(label, short, with_time(attention, axes), () if plain else kernels))
        return [*rows, Row("final map: weight of each value", "final map", final)]

    @property
    def _key(self) -> tuple[int, ...]:
        """The key position whose window is centred on the query; with a stride, the nearest before it."""
        *time, row, column = self.query.position
        stride = self.layer.attention.stride
        return (*time, row // stride, column // stride)

    def window_pixels(self) -> np.ndarray:
        """Return the pixels under the window around the query, black outside the input.

        Each time of the window shows the frame in its middle. If the grid does not divide the input, cells
        are rounded to whole pixels.

        Returns:
          uint8 [time of the window, height, width, 3].
        """
        axes, stride = len(self.layer.grid), self.layer.attention.stride
        time, row, column = (0, *self._key)[-3:]
        window = (1, *self.query.kappa.shape[axes:-1])[-3:]
        pixels = self.seen
        for axis, (cells, centre, size) in enumerate(
            zip(self.grid, (time, row * stride, column * stride), window, strict=True)
        ):
            side, start = self.seen.shape[axis], centre - size // 2
            if axis == 0:
                indices = np.floor((np.arange(start, start + size) + 0.5) * side / cells).astype(int)
            else:
                indices = np.arange(round(start * side / cells), round((start + size) * side / cells))
            inside = (indices >= 0) & (indices < side)
            pixels = np.take(pixels, indices, axis, mode="clip") * inside.reshape(-1, *[1] * (3 - axis))
        return pixels


def with_time(array: np.ndarray, axes: int) -> np.ndarray:
    """Return [time, height, width, ...]; add a time of one if the grid has 2 axes."""
    return array if axes == 3 else array[None]
