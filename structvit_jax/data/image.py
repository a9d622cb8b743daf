"""Read an encoded image of any mode as 8-bit RGB.

    colour          converted to RGB; of 16 bits per channel the upper 8 are kept
    16-bit grey     the upper 8 bits are kept; the upper 8 of 12 in a 12-bit TIFF
    32-bit integer  the range from the minimum to the maximum is scaled to 0 to 255
    float           scaled by 255 if all values are from 0 to 1, otherwise like 32-bit integers. NaN and -inf
                    become 0, inf becomes 255
    transparency    composited onto white, unlike in torchvision and timm, which drop alpha
    EXIF            the orientation is applied
    animations      the first frame is read

Only the formats in `FORMATS` are opened. They are recognised by content, not by file name.
"""

from __future__ import annotations

import functools
import io
from typing import BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from structvit_jax.data.limits import Limits, file_size
from structvit_jax.utils.failures import DecodeError, decoding

# Pillow's names of the formats that are opened, with their file extensions.
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif"),
}
IMAGES = tuple(extension for extensions in FORMATS.values() for extension in extensions)

_BUILT_IN = tuple(name for name in FORMATS if name != "HEIF")  # formats that Pillow itself reads
# Keys of `Image.info` that may hold an orientation; TIFF files have tags instead.
_ORIENTED = frozenset(("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp"))
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # TIFF tags
_BYTES_PER_PIXEL = 16  # limit on the size of encoded files, because some decoders read them into memory


def read_image(file: str | bytes, limits: Limits, short_side: int = 0) -> np.ndarray:
    """Decode an image, given as a path or as bytes, to uint8 [height, width, 3], RGB.

    Args:
      file: the image.
      limits: limits on its size.
      short_side: scale an image with a longer short side down to this; 0 never scales. JPEG files are decoded
        at a half, a quarter or an eighth of their size if that is still large enough.

    Raises:
      DecodeError: the image is damaged, of an unknown format, or exceeds the limits.
    """
    with decoding():
        size = file_size(file) if isinstance(file, str) else len(file)
        if not size:
            raise DecodeError("empty file")
        if size > _BYTES_PER_PIXEL * limits.pixels + 2**20:
            limit = f"--config.data.max_pixels={limits.pixels}"
            raise DecodeError(f"{size} bytes, more than a picture within {limit} can need")
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
            image = _open(opened)
            limits.check_picture(*image.size)
            if short_side:
                width, height = (-(-side * short_side // min(image.size)) for side in image.size)
                image.draft(None, (width, height))
            image.load()  # in PNG files, the orientation may follow the pixels
            if hasattr(image, "tag_v2") or not _ORIENTED.isdisjoint(image.info):
                ImageOps.exif_transpose(image, in_place=True)
            return _shrunk(_rgb(image), short_side)


def _shrunk(picture: np.ndarray, short_side: int) -> np.ndarray:
    """Scale a picture down if its short side is longer than `short_side`; 0 never scales."""
    scale = short_side / min(picture.shape[:2]) if short_side else 1
    if scale >= 1:
        return picture
    height, width = (round(side * scale) for side in picture.shape[:2])
    return cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)


def _open(file: BinaryIO) -> Image.Image:
    head = file.read(64)
    # Pillow itself reads AVIF; other images in ISO media files ("ftyp") need the HEIF plugin.
    is_heif = head[4:8] == b"ftyp" and b"avif" not in head and b"avis" not in head
    if is_heif:
        _register_heif()
    try:
        return Image.open(file, formats=("HEIF",) if is_heif else _BUILT_IN)
    except UnidentifiedImageError as error:
        raise DecodeError(f"damaged, or not an image of a known format ({', '.join(FORMATS)})") from error


@functools.cache
def _register_heif() -> None:
    try:
        import pillow_heif
    except ImportError as error:
        raise DecodeError("a HEIF image needs pillow-heif: pip install 'structvit_jax[heif]'") from error
    pillow_heif.register_heif_opener(decode_threads=1)  # data workers run in parallel


def _rgb(image: Image.Image) -> np.ndarray:
    """Convert an image of any mode to uint8 [height, width, 3]."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return np.repeat(_grey(image)[..., None], 3, axis=-1)
    if image.has_transparency_data:
        colour = image.info.get("transparency")
        if isinstance(colour, tuple) and max(colour) > 255:  # the transparent colour of a 16-bit image
            image.info["transparency"] = tuple(value >> 8 for value in colour)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode == "L":  # faster than `convert`
        return cv2.cvtColor(np.asarray(image), cv2.COLOR_GRAY2RGB)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _grey(image: Image.Image) -> np.ndarray:
    """Convert an image with one channel of more than 8 bits to uint8 [height, width]."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # TIFF only
    # 16 bits; Pillow opens 16-bit PGM files in mode "I".
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        grey = (values >> (bits - 8)).astype(np.uint8)
    else:
        grey = _stretched(values)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    transparent = image.info.get("transparency")  # the grey value that is transparent
    return grey if transparent is None else np.where(values == transparent, np.uint8(255), grey)


def _stretched(values: np.ndarray) -> np.ndarray:
    """Scale int32 or float32 values to uint8 as the module docstring describes."""
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255 / ((high - low) or 1.0))).astype(np.uint8)
