"""Read an encoded image as 8-bit RGB, whatever its mode.

By mode:

    colour          converted to RGB; of 16 bits a channel the upper 8 are kept
    16-bit grey     the upper 8 bits are kept (the upper 8 of 12 in a 12-bit TIFF)
    32-bit, float   a float picture with all values within 0 and 1 is scaled by 255; others are stretched from
                    their own minimum and maximum to 0 and 255. NaN and -inf become 0, inf becomes 255
    transparency    composited onto white, also of palettes; torchvision and timm drop alpha instead
    EXIF            the orientation is applied
    animations      the first frame is read

Only the formats in `FORMATS` are opened, whatever the name of the file.
"""

from __future__ import annotations

import functools
import io
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from structvit_jax.data.limits import Limits, file_size
from structvit_jax.utils.errors import DecodeError, decoding

# Formats that are opened, by Pillow's name, with their file extensions.
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
_PLUGINS = ("AVIF", "HEIF")  # loaded for the first image of their format
_BUILT_IN = tuple(name for name in FORMATS if name not in _PLUGINS)

_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # tags of TIFF
_BYTES_PER_PIXEL = 16  # maximum of an encoded file; some decoders read all of it into memory


def read_image(file: str | bytes, limits: Limits) -> np.ndarray:
    """Decode an image, given as a path or as bytes, to uint8 [height, width, 3], RGB.

    Raises:
      DecodeError: it is damaged, of an unknown format, or exceeds the limits.
    """
    with decoding():
        size = file_size(file) if isinstance(file, str) else len(file)
        if not size:
            raise DecodeError("empty file")
        if size > _BYTES_PER_PIXEL * limits.pixels + 2**20:
            raise DecodeError(f"{size} bytes, more than a picture of --config.data.max_pixels needs")
        with io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb") as opened:
            image = _open(opened)
            limits.check_picture(*image.size)
            ImageOps.exif_transpose(image, in_place=True)
            return _rgb(image)


def _open(file: BinaryIO) -> Image.Image:
    plugin = _plugin_for(file.read(64))
    if plugin:
        _load(plugin)
    try:
        return Image.open(file, formats=(plugin,) if plugin else _BUILT_IN)
    except UnidentifiedImageError as error:
        known = f"not an image of a known format ({', '.join(FORMATS)})"
        raise DecodeError(f"a damaged {plugin} image" if plugin else known) from error


def _plugin_for(head: bytes) -> str | None:
    """Return which plugin reads an ISO media file, by its brands; None for any other file."""
    if head[4:8] != b"ftyp":
        return None
    return "AVIF" if b"avif" in head or b"avis" in head else "HEIF"


@functools.cache
def _load(plugin: str) -> None:
    """Register the plugin for a format with Pillow.

    Raises:
      DecodeError: it is not installed; the message names the package.
    """
    if plugin == "HEIF":
        try:
            import pillow_heif
        except ImportError as error:
            raise DecodeError("a HEIF image needs pillow-heif: pip install 'structvit_jax[heif]'") from error
        pillow_heif.register_heif_opener(decode_threads=1)  # workers are the parallelism
    elif not _has_avif():
        raise DecodeError("an AVIF image needs Pillow 11.3 or later: pip install --upgrade pillow")


def _has_avif() -> bool:
    try:
        from PIL import AvifImagePlugin
    except ImportError:
        return False
    return AvifImagePlugin.SUPPORTED


def _rgb(image: Image.Image) -> np.ndarray:
    """Return a loaded image of any mode as uint8 [height, width, 3]."""
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        return np.repeat(_grey(image)[..., None], 3, axis=-1)
    if image.mode == "LAB":
        return np.asarray(ImageCms.applyTransform(image, _lab_to_rgb()))
    if image.has_transparency_data:
        key = image.info.get("transparency")
        if isinstance(key, tuple) and max(key) > 255:  # the transparent colour of a 16-bit image
            image.info["transparency"] = tuple(value >> 8 for value in key)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _grey(image: Image.Image) -> np.ndarray:
    """Return an image of one channel and more than 8 bits as uint8 [height, width]."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        grey = (values >> (bits - 8)).astype(np.uint8)
    else:
        grey = _stretched(values)
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    clear = image.info.get("transparency")
    return grey if clear is None else np.where(values == clear, np.uint8(255), grey)


def _stretched(values: np.ndarray) -> np.ndarray:
    """Return int32 or float32 values as uint8, scaled as the module's docstring describes."""
    finite = values[np.isfinite(values)].astype(np.float64)
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    if values.dtype.kind == "f" and low >= 0 and high <= 1:
        low, high = 0.0, 1.0
    values = np.nan_to_num(values.astype(np.float64), nan=low, posinf=high, neginf=low)
    return np.rint((values - low) * (255 / ((high - low) or 1.0))).astype(np.uint8)


@functools.cache
def _lab_to_rgb() -> ImageCms.ImageCmsTransform:
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    return ImageCms.buildTransform(*profiles, "LAB", "RGB")
