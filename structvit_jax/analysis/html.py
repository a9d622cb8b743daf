"""Render the HTML pages of `templates/`. All text is escaped, and each page is self-contained."""

from __future__ import annotations

import base64
import functools
import io
from typing import NamedTuple

import jinja2
import numpy as np
from PIL import Image


class EmbeddedImage(NamedTuple):
    """An image inside a page."""

    url: str
    alt: str


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("structvit_jax.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: str, **values: object) -> str:
    """Return a page: a file of `templates/`, rendered with these values."""
    return _environment().get_template(template).render(values)


def data_url(content: bytes, media_type: str) -> str:
    """Return a URL that contains the bytes of a file, such as data:image/png;base64,..."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def image_url(pixels: np.ndarray, *, lossless: bool) -> str:
    """Return a URL that contains an image, uint8 [height, width, 3]: PNG if lossless, else JPEG."""
    file, kind = io.BytesIO(), "png" if lossless else "jpeg"
    Image.fromarray(pixels).save(file, kind, quality=85)
    return data_url(file.getvalue(), f"image/{kind}")
