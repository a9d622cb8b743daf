"""Draw images as a grid with captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FRAME_GAP = 2  # white pixels between the frames of a clip
_GAP, _CAPTION_HEIGHT, _FONT_SIZE = 6, 18, 11  # pixels


def evenly_spaced(count: int, max_count: int) -> np.ndarray:
    """Return at most `max_count` evenly spaced indices from 0 to `count` - 1."""
    return np.unique(np.linspace(0, count - 1, min(max_count, count)).astype(int))


def side_by_side(frames: np.ndarray) -> np.ndarray:
    """Return frames [time, height, width, 3] as one image, with white gaps between them."""
    padded = np.pad(frames, [(0, 0), (0, 0), (0, FRAME_GAP), (0, 0)], constant_values=255)
    return np.concatenate(list(padded), axis=1)[:, :-FRAME_GAP]


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], columns: int) -> Image.Image:
    """Draw images of the same size in rows; each caption is above its image.

    Args:
      images: uint8 [height, width, 3].
      captions: one line per image; text wider than the image is cut off.
      columns: images per row.
    """
    height, width = images[0].shape[:2]
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    cell_width, cell_height = width + _GAP, height + _CAPTION_HEIGHT + _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), "white")
    font = ImageFont.load_default(_FONT_SIZE)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        cell = Image.new("RGB", (width, _CAPTION_HEIGHT + height), "white")
        ImageDraw.Draw(cell).text((0, 0), caption, "black", font)
        cell.paste(Image.fromarray(image), (0, _CAPTION_HEIGHT))
        row, column = divmod(number, columns)
        sheet.paste(cell, (_GAP + column * cell_width, _GAP + row * cell_height))
    return sheet
