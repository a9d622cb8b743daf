"""Images of every format and mode against arrays encoded here byte by byte; limits and rejected files."""

import io
import os
import struct
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from structvit_jax.data import image
from structvit_jax.data.image import FORMATS, IMAGES, read_image
from structvit_jax.data.limits import Limits
from structvit_jax.data.media import configure_decoding, open_media
from structvit_jax.utils.failures import DecodeError

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (10, 14, 3), np.uint8)
GREY16 = RNG.integers(0, 2**16, (10, 14), np.uint16)
GREY16[0, :2] = 0, 65535
ALPHA = RNG.integers(0, 256, (10, 14), np.uint8)


def read(content, limits=Limits()):  # noqa: B008
    return read_image(content, limits)


def rgb(grey):
    return np.repeat(grey[..., None], 3, axis=-1)


def on_white(colour, alpha):
    alpha = alpha[..., None] / 255
    return colour * alpha + 255 * (1 - alpha)


def saved(picture, form, **options):
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def png(array, bits, kind, **chunks):
    """A PNG of [height, width(, channels)]; `kind` is its colour type, `chunks` come before the data."""
    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in {"IHDR": header, **chunks, "IDAT": zlib.compress(rows), "IEND": b""}.items():
        content += struct.pack(">I", len(data)) + name.encode() + data
        content += struct.pack(">I", zlib.crc32(name.encode() + data))
    return content


def tiff(data, width, height, bits, order="<", photometric=1, kind=1, samples=1, palette=(), **tags):
    """An uncompressed TIFF; `kind` is 1 for unsigned, 2 for signed, 3 for float samples."""
    longs = {256: width, 257: height, 259: 1, 262: photometric, 273: 8, 277: samples, 278: height}
    longs |= {279: len(data), 339: kind} | {int(tag[1:]): value for tag, value in tags.items()}
    entries = [(tag, struct.pack(order + "HHII", tag, 4, 1, value)) for tag, value in longs.items()]
    for tag, shorts in {258: [bits] * samples, 320: palette}.items():
        packed = struct.pack(f"{order}{len(shorts)}H", *shorts)
        if len(packed) > 4:
            place, data = struct.pack(order + "I", 8 + len(data)), data + packed
        else:
            place = packed.ljust(4, b"\0")
        if len(shorts):
            entries.append((tag, struct.pack(order + "HHI", tag, 3, len(shorts)) + place))
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    body = b"".join(entry for _, entry in sorted(entries))
    return head + data + struct.pack(order + "H", len(entries)) + body + bytes(4)


def of_array(array, order="<", **options):
    kind = {"u": 1, "i": 2, "f": 3}[array.dtype.kind]
    data = array.astype(array.dtype.newbyteorder(order)).tobytes()
    return tiff(data, *array.shape[1::-1], 8 * array.itemsize, order, kind=kind, **options)


def test_extensions_match_those_of_pillow():
    assert {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"} <= set(IMAGES)
    assert {".avif", ".heic", ".heif"} <= set(IMAGES)
    assert len(set(IMAGES)) == len(IMAGES)
    Image.init()
    known = Image.registered_extensions()
    for name, extensions in FORMATS.items():
        if name != "HEIF":
            assert {known[extension] for extension in extensions} == {name}


@pytest.mark.parametrize("name", FORMATS)
def test_colour_of_every_format(name):
    smooth = np.asarray(Image.fromarray(COLOUR).resize((56, 40), Image.Resampling.BICUBIC))
    image._register_heif()
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    options |= {"AVIF": {"quality": 100, "subsampling": "4:4:4"}, "HEIF": {"quality": 100, "chroma": 444}}
    content = saved(Image.fromarray(smooth), name, **options.get(name, {}))
    close = {"JPEG": 6, "AVIF": 6, "HEIF": 10, "GIF": 80}.get(name, 0)
    assert np.abs(read(content).astype(int) - smooth).max() <= close


def test_16_bit_grey_is_scaled_like_16_bit_colour():
    expected = rgb(np.uint8(GREY16 // 256))
    assert (read(png(GREY16, 16, 0)) == expected).all()
    assert (read(png(rgb(GREY16), 16, 2)) == expected).all()
    for order in "<>":
        assert (read(of_array(GREY16, order)) == expected).all()
        assert (read(of_array(rgb(GREY16), order, photometric=2, samples=3)) == expected).all()
    assert (read(of_array(GREY16, photometric=0)) == 255 - expected).all()
    assert (read(saved(Image.fromarray(GREY16), "TIFF", compression="tiff_lzw")) == expected).all()
    pgm = b"P5 14 10 65535\n" + GREY16.astype(">u2").tobytes()
    assert np.abs(read(pgm).astype(int) - expected).max() == 0
    small = b"P5 14 10 1023\n" + (GREY16 >> 6).astype(">u2").tobytes()
    assert np.abs(read(small).astype(int) - expected).max() <= 1


def test_12_bit_grey():
    values = (GREY16 >> 4).reshape(10, 7, 2).astype(int)
    first, second = values[..., 0], values[..., 1]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1).astype(np.uint8)
    assert (read(tiff(packed.tobytes(), 14, 10, 12)) == rgb(np.uint8(GREY16 >> 8))).all()


def test_32_bit_integers_and_floats():
    fractions = RNG.random((10, 14), np.float32)
    for order in "<>":
        expected = rgb(np.uint8(np.rint(fractions.astype(float) * 255)))
        assert (read(of_array(fractions, order)) == expected).all()
        for values in (
            fractions * 900 - 300,
            (GREY16.astype(np.int32) - 2**15) * 40000,
            GREY16.view(np.int16),
        ):
            own = values.astype(float)
            own = rgb(np.uint8(np.rint((own - own.min()) / (own.max() - own.min()) * 255)))
            assert np.abs(read(of_array(values, order)).astype(int) - own).max() <= 1
    odd = np.float32([[np.nan, -np.inf, np.inf, -2, 0, 2]])
    assert (read(of_array(odd))[0, :, 0] == [0, 0, 255, 0, 128, 255]).all()
    assert (read(of_array(np.full((2, 2), np.nan, np.float32))) == 0).all()
    assert (read(of_array(np.full((2, 2), 7, np.int32))) == 0).all()
    assert (read(of_array(np.full((2, 2), 0.2, np.float32))) == 51).all()
    pfm = b"Pf\n14 10\n-1.0\n" + fractions[::-1].astype("<f4").tobytes()
    assert (read(pfm) == rgb(np.uint8(np.rint(fractions.astype(float) * 255)))).all()


def test_alpha_is_composited_onto_white():
    rgba = np.dstack([COLOUR, ALPHA])
    grey = np.dstack([COLOUR[..., 0], ALPHA])
    for content in (png(rgba, 8, 6), saved(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)):
        assert np.abs(read(content) - on_white(COLOUR, ALPHA)).max() <= 1
    assert np.abs(read(saved(Image.fromarray(rgba), "TIFF")) - on_white(COLOUR, ALPHA)).max() <= 1
    assert np.abs(read(png(grey, 8, 4)) - on_white(rgb(grey[..., 0]), ALPHA)).max() <= 1
    deep = np.dstack([rgb(GREY16), GREY16[::-1]])
    expected = on_white(rgb(GREY16 >> 8), GREY16[::-1] >> 8)
    assert np.abs(read(png(deep, 16, 6)) - expected).max() <= 1
    assert np.abs(read(png(deep[..., [0, 3]], 16, 4)) - expected).max() <= 1


def test_a_transparent_colour_is_white():
    red = np.zeros((1, 3), np.uint8)
    palette = bytes([10, 20, 30, 40, 50, 60, 70, 80, 90])
    red[0] = 0, 1, 2
    content = png(red, 8, 3, PLTE=palette, tRNS=bytes([255, 0, 128]))
    assert np.abs(read(content)[0] - np.array([[10, 20, 30], [255] * 3, [162, 167, 172]])).max() <= 1
    grey = np.uint8([[5, 7]])
    assert (read(png(grey, 8, 0, tRNS=struct.pack(">H", 7)))[0, :, 0] == [5, 255]).all()
    deep = np.uint16([[500, 700]])
    assert (read(png(deep, 16, 0, tRNS=struct.pack(">H", 700)))[0, :, 0] == [1, 255]).all()
    colours = np.uint8([[[1, 2, 3], [4, 5, 6]]])
    assert (read(png(colours, 8, 2, tRNS=struct.pack(">HHH", 4, 5, 6)))[0] == [[1, 2, 3], [255] * 3]).all()
    deep = np.uint16([[[256, 512, 768], [1024, 1280, 1536]]])
    content = png(deep, 16, 2, tRNS=struct.pack(">HHH", 1024, 1280, 1536))
    assert (read(content)[0] == [[1, 2, 3], [255] * 3]).all()


def test_palettes_1_bit_images_and_first_frames():
    palette = Image.fromarray(COLOUR).quantize(200)
    expected = np.array(palette.getpalette()).reshape(-1, 3)[np.asarray(palette)]
    for form in ("PNG", "BMP", "TIFF", "GIF"):
        assert (read(saved(palette, form)) == expected).all(), form
    frames = [Image.fromarray(np.full((4, 4), value, np.uint8)) for value in (50, 250)]
    for form in ("GIF", "WEBP", "TIFF", "PNG"):
        options = {"lossless": True} if form == "WEBP" else {}
        content = saved(frames[0], form, save_all=True, append_images=frames[1:], **options)
        assert (read(content) == 50).all(), form
    bits = np.array([[0, 1, 1, 0, 1, 0, 0, 1, 1]], bool)
    for form in ("PNG", "TIFF", "BMP", "PPM"):
        assert (read(saved(Image.fromarray(bits), form))[0, :, 0] == 255 * bits[0]).all(), form
    assert (read(b"P1 3 1 1 0 1")[0, :, 0] == [0, 255, 0]).all()


def test_palettes_with_alpha():
    greys = np.tile(np.arange(256) * 257, 3)
    content = tiff(bytes([3, 255, 9, 0]), 2, 1, 8, photometric=3, samples=2, palette=greys, t338=2)
    with Image.open(io.BytesIO(content)) as opened:
        assert opened.mode == "PA"
    assert (read(content)[0] == [[3] * 3, [255] * 3]).all()


def test_cmyk_and_ycbcr():
    ink = np.dstack([COLOUR, ALPHA // 2])
    naive = (255 - ink[..., :3].astype(int)) * (255 - ink[..., 3:].astype(int)) / 255
    content = saved(Image.fromarray(ink, "CMYK"), "TIFF")
    assert np.abs(read(content) - naive).max() <= 1
    smooth = np.full((16, 16, 4), (10, 90, 200, 40), np.uint8)
    naive = (255 - smooth[..., :3].astype(int)) * (255 - smooth[..., 3:].astype(int)) / 255
    assert np.abs(read(saved(Image.fromarray(smooth, "CMYK"), "JPEG", quality=100)) - naive).max() <= 4
    flat = np.full((16, 16, 3), (200, 90, 40), np.uint8)
    assert (
        np.abs(read(saved(Image.fromarray(flat), "TIFF", compression="jpeg")).astype(int) - flat).max() <= 4
    )


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_the_orientation_is_applied_once(form):
    image._register_heif()
    picture = np.zeros((64, 96, 3), np.uint8)
    picture[:32, :48] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    seen = read(saved(Image.fromarray(picture), form, exif=exif.tobytes()))
    assert seen.shape == (96, 64, 3)
    assert np.abs(seen.astype(int) - np.rot90(picture, -1)).mean() < 4


def test_the_orientation_of_16_bit_grey_is_applied(tmp_path):
    for order in "<>":
        turned = read(of_array(GREY16, order, t274=6))
        assert (turned == np.rot90(rgb(np.uint8(GREY16 >> 8)), -1)).all()
    (tmp_path / "deep.png").write_bytes(png(GREY16, 16, 0))
    assert (open_media(str(tmp_path / "deep.png")).frames([0])[0] == rgb(np.uint8(GREY16 >> 8))).all()


def test_missing_plugins_are_named(monkeypatch):
    image._register_heif()
    content = saved(Image.fromarray(COLOUR), "HEIF")
    image._register_heif.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(DecodeError, match=r"needs pillow-heif: pip install 'structvit_jax\[heif\]'"):
        read(content)


def test_damaged_avif_images_are_rejected():
    content = saved(Image.fromarray(COLOUR), "AVIF")
    for damaged in (content[:40] + b"0" * 99, content[:-20]):
        with pytest.raises(DecodeError, match=r"^damaged, or not an image|^Failed to decode"):
            read(damaged)


def test_other_formats_are_not_opened(tmp_path):
    """Opening PostScript would start Ghostscript."""
    for content in (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"plain text" * 20, b"8BPS" * 20):
        path = tmp_path / "picture.jpg"
        path.write_bytes(content)
        for file in (content, str(path)):
            with pytest.raises(DecodeError, match="not an image of a known format"):
                read(file)
    with pytest.raises(DecodeError, match="empty file"):
        read(b"")


def test_too_many_pixels_are_rejected_before_decoding():
    wide = png(np.zeros((1, 1), np.uint8), 8, 0)
    wide = wide.replace(struct.pack(">II", 1, 1), struct.pack(">II", 170_000_000, 1))
    head = wide[12:29]
    wide = wide[:29] + struct.pack(">I", zlib.crc32(head)) + wide[33:]
    with pytest.raises(DecodeError, match=r"170000000 x 1 pixels, more than --config\.data\.max_pixels="):
        read(wide)
    content = png(COLOUR, 8, 2)
    assert read(content, Limits(pixels=140)).shape == COLOUR.shape
    with pytest.raises(DecodeError, match="14 x 10 pixels"):
        read(content, Limits(pixels=139))
    with pytest.raises(DecodeError, match="bytes, more than a picture"):
        read(content + bytes(2**21), Limits(pixels=140))


def test_max_pixels_replaces_the_limit_of_pillow(monkeypatch):
    """Pillow warns above its limit, and raises above twice its limit."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    content = png(COLOUR, 8, 2), png(np.tile(COLOUR, (2, 1, 1)), 8, 2)  # 140 and 280 pixels
    with pytest.warns(Image.DecompressionBombWarning):
        read(content[0])
    with pytest.raises(DecodeError, match="decompression bomb"):
        read(content[1])
    threads = cv2.getNumThreads()
    configure_decoding.__wrapped__()  # the function is cached
    cv2.setNumThreads(threads)
    with warnings.catch_warnings(action="error"):
        assert [len(read(one)) for one in content] == [10, 20]


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.mp4").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "zero.mp4"):
        with pytest.raises(DecodeError, match="not a regular file"):
            open_media(str(tmp_path / name)).frames([0])


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_photo_is_decoded_small(orientation, monkeypatch):
    """A JPEG file of 1280x854 for a short side of 200: decoded at a quarter of its size, then shrunk."""
    picture = load_sample_images().images[1]
    large = Image.fromarray(picture).resize((1280, 854), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(large, "JPEG", quality=95, exif=exif)
    whole = read_image(content, Limits())
    small = read_image(content, Limits(), short_side=200)
    expected = cv2.resize(whole, small.shape[1::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert small.shape == ((200, 299, 3) if orientation == 1 else (299, 200, 3))
    assert np.abs(small - expected).mean() < 2
    assert read_image(content, Limits(), short_side=900).shape == whole.shape  # never up
    sizes = []
    monkeypatch.setattr(image, "_rgb", lambda opened: sizes.append(opened.size) or np.asarray(opened))
    read_image(content, Limits(), short_side=200)
    assert max(sizes[0]) == 320
