"""Make a part of the sandbox: python -m attacks.build PART FOLDER [ARGUMENT ...]."""

from __future__ import annotations

import os
import pickle
import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL import Image

from attacks import damage
from attacks.names import CLASS_NAMES, DAMAGES, IMAGE_FORMATS, VIDEO_FORMATS

_CODECS = {"webm": "libvpx", "avi": "mpeg4", "mpg": "mpeg1video", "wmv": "wmv2", "flv": "flv", "3gp": "mpeg4"}


def picture(number: int, side: int = 32) -> np.ndarray:
    """Return noise as uint8 [side, side, 3], seeded by the number."""
    return np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)


def video(path: Path, frames: int = 16, side: int = 32, **options: str) -> None:
    """Write a video of noise, in the format of the file's extension."""
    kind = path.suffix[1:]
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(_CODECS.get(kind, "libx264"), rate=16, options=options)
        stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
        stream.codec_context.thread_count = 1
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, side), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def images(folder: Path) -> None:
    """Write a data set of images: 3 classes with 4 training and 2 test images each."""
    for split, count in (("train", 4), ("val", 2)):
        for label in CLASS_NAMES:
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                path = folder / split / label / f"{number}.png"
                Image.fromarray(picture(number + 10 * len(label))).save(path)


def clips(folder: Path) -> None:
    """Write a data set of videos: 3 classes with 3 training and 1 test video each."""
    for split, count in (("train", 3), ("val", 1)):
        for label in CLASS_NAMES:
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                video(folder / split / label / f"{number}.mp4")


def bad_images(folder: Path, seed: str) -> None:
    """Write images of every format with every damage, and images with false headers or extensions."""
    folder.mkdir()
    for kind in IMAGE_FORMATS:
        whole = folder / f"whole.{kind}"
        Image.fromarray(picture(1)).save(whole)
        _damaged(whole, seed)
    _bombs(folder)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n/x (executed) def showpage\n%%EOF\n"
    (folder / "eps_named.jpg").write_bytes(eps)
    (folder / "svg_named.png").write_bytes(b'<svg xmlns="http://www.w3.org/2000/svg"/>')
    (folder / "mp4_named.jpg").write_bytes(b"\0\0\0\x18ftypisom\0\0\2\0isomiso2" + bytes(100))
    (folder / "page.png").write_bytes(b"<!DOCTYPE html><title>404</title>")
    Image.fromarray(picture(2)).save(folder / "png_named.jpg", "PNG")
    (folder / "folder.jpg").mkdir()
    os.symlink("nowhere", folder / "dangling.jpg")
    os.symlink("loop.jpg", folder / "loop.jpg")
    os.mkfifo(folder / "fifo.jpg")
    os.symlink("/dev/zero", folder / "zero.png")


def _bombs(folder: Path) -> None:
    """Write small files whose headers announce large pictures."""
    sizes = {"wide": (170_000_000, 1), "square": (30_000, 30_000), "largest": (2**31 - 1, 2**31 - 1)}
    for name, (width, height) in sizes.items():
        rows = 200 if name == "square" else 1
        (folder / f"bomb_{name}.png").write_bytes(_png(width, height, rows))
    gif = b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    (folder / "bomb.gif.png").write_bytes(
        gif + b"\x2c" + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0) + b"\2;"
    )
    jpeg = (folder / "whole.jpg").read_bytes()
    at = jpeg.index(b"\xff\xc0") + 5
    (folder / "bomb.jpg").write_bytes(jpeg[:at] + struct.pack(">HH", 65500, 65500) + jpeg[at + 4 :])
    (folder / "bomb.ppm").write_bytes(b"P6 100000 100000 255\n" + bytes(100))
    (folder / "digits.ppm").write_bytes(b"P6 " + b"9" * 5000 + b" 1 255\n")


def _png(width: int, height: int, rows: int) -> bytes:
    """Return a PNG of one bit per pixel that holds only some of its rows."""
    squeezed, row = zlib.compressobj(9), bytes(min(width // 8 + 2, 2**25))
    data = b"".join(squeezed.compress(row) for _ in range(rows)) + squeezed.flush()

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_videos(folder: Path, seed: str) -> None:
    """Write videos of every format with every damage, and videos with false headers or extensions."""
    folder.mkdir()
    for kind in VIDEO_FORMATS:
        whole = folder / f"whole.{kind}"
        video(whole)
        _damaged(whole, seed)
    _announce(folder / "whole.mkv", folder / "announced.mkv", seconds=1e9)
    _announce(folder / "whole.mkv", folder / "nan.mkv", seconds=float("nan"))
    _cut_with_edit_list(folder / "cut.mp4")
    (folder / "page.mp4").write_bytes(b"<!DOCTYPE html><title>404</title>")
    Image.fromarray(picture(2)).save(folder / "png_named.mp4", "PNG")
    (folder / "folder.mp4").mkdir()
    (folder / "frames").mkdir()
    for name in ("1", "10", "\u00b21", "\u0663", "9" * 200):  # digits to Python, numbers or not
        Image.fromarray(picture(3)).save(folder / "frames" / f"{name}.png")
    os.mkfifo(folder / "fifo.mp4")
    os.symlink("/dev/zero", folder / "zero.mp4")


def _announce(source: Path, target: Path, seconds: float) -> None:
    """Change the duration in the header of a Matroska file."""
    data = source.read_bytes()
    at = data.index(b"\x44\x89\x88") + 3  # the element Duration, of eight bytes, in milliseconds
    target.write_bytes(data[:at] + struct.pack(">d", seconds * 1000) + data[at + 8 :])


def _cut_with_edit_list(path: Path) -> None:
    """Cut a video as `ffmpeg -ss 1 -i whole.mp4 -c copy cut.mp4` does: its key frame is not shown."""
    whole = path.with_name("long.mp4")
    video(whole, frames=32, g="64", bf="0", sc_threshold="0")
    with av.open(str(whole)) as source, av.open(str(path), "w", options={"use_editlist": "1"}) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        shift = int(1 / source.streams.video[0].time_base)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                target.mux(packet)
    whole.unlink()


def huge_videos(folder: Path) -> None:
    """Write a small file of large frames."""
    folder.mkdir()
    side = 16000
    with av.open(str(folder / f"{side}.mp4"), "w") as container:
        options = {"preset": "ultrafast", "tune": "zerolatency"}
        stream: Any = container.add_stream("libx264", rate=1, options=options)
        stream.width = stream.height = side
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1
        container.mux(stream.encode(av.VideoFrame(side, side, "yuv420p")))
        container.mux(stream.encode())


def playlists(folder: Path, clips: str, contact: str) -> None:
    """Write files that refer to others: on this machine, at an address, and to themselves."""
    folder.mkdir()
    clip = next(Path(clips).rglob("*.mp4"))
    url = f"http://{contact}"
    m3u8 = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
    dash = (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period>'
        '<AdaptationSet><Representation id="0" mimeType="video/mp4"><BaseURL>{}</BaseURL>'
        "</Representation></AdaptationSet></Period></MPD>"
    )
    sdp = (
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 45678 RTP/AVP 96\n"
        "a=rtpmap:96 H264/90000\n"
    )
    texts = {
        "local": m3u8.format(clip),
        "file": m3u8.format(f"file://{clip}"),
        "address": m3u8.format(f"{url}/x.ts"),
        "itself": m3u8.format("{name}"),
        "live": "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n" + f"{clip}\n",
        "key": m3u8.replace("#EXTINF", f'#EXT-X-KEY:METHOD=AES-128,URI="{url}/key"\n#EXTINF').format(clip),
        "concat": f"ffconcat version 1.0\nfile {clip}\n",
        "concat_itself": "ffconcat version 1.0\nfile {name}\n",
        "concat_address": f"ffconcat version 1.0\nfile {url}/x.mp4\n",
        "concat_device": "ffconcat version 1.0\nfile /dev/zero\n",
        "sdp": sdp,
        "dash": dash.format(clip),
        "dash_address": dash.format(f"{url}/x.mp4"),
        "rtsp": f"[reference]\nRef1={url}/x\n",
        "asx": f'<ASX version="3.0"><Entry><Ref href="{url}/x"/></Entry></ASX>',
        "xspf": f'<playlist xmlns="http://xspf.org/ns/0/"><trackList><track><location>{url}/x</location>'
        "</track></trackList></playlist>",
        "lavfi": "testsrc=size=16384x16384:rate=1000",
    }
    endings = {"sdp": "sdp", "dash": "mpd", "asx": "asx", "xspf": "xspf"}
    for name, text in texts.items():
        own = endings.get(name.split("_")[0], "ffconcat" if name.startswith("concat") else "m3u8")
        for ending in ("mp4", own):
            path = folder / f"{name}.{ending}"
            path.write_text(text.replace("{name}", path.name))


def weights(folder: Path) -> None:
    """Write a .safetensors file of a tiny UniFormer with PyTorch's keys."""
    from safetensors.numpy import save_file

    from structvit_jax import create_model
    from structvit_jax.convert import to_torch
    from structvit_jax.models.weights import split

    folder.mkdir()
    widths = {"widths": (8, 8, 16, 16), "head_width": 8, "depths": (1, 1, 1, 1)}
    arrays = split(create_model("uniformer_tiny", num_classes=3, **widths))[1]
    plain = {name: np.asarray(array) for name, array in (arrays.params | arrays.batch_stats).items()}
    torch_names = {name: np.ascontiguousarray(array) for name, array in to_torch(plain).items()}
    save_file(torch_names, folder / "whole.safetensors")


class _Code:
    """An object whose pickle runs a command when it is loaded."""

    def __init__(self, marker: str):
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self._marker}",)


def pickles(folder: Path, weights: str, marker: str) -> None:
    """Write .pth files that do not hold dense tensors of floats."""
    import torch
    from safetensors.numpy import load_file

    whole = load_file(f"{weights}/whole.safetensors")
    tensors = {name: torch.from_numpy(array) for name, array in whole.items()}
    first = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    some = torch.eye(2)
    folder.mkdir()
    with_first: Callable[[Any], dict] = lambda value: {**tensors, first: value}  # noqa: E731
    contents = {
        "whole": {"model": tensors},
        "code": {"model": tensors, "run": _Code(marker)},
        "sparse": with_first(some.to_sparse()),
        "quantised": with_first(torch.quantize_per_tensor(some, 0.1, 0, torch.qint8)),
        "meta": with_first(torch.empty(2, device="meta")),
        "complex": with_first(torch.complex(some, some)),
        "strings": {"model": dict.fromkeys(tensors, "text")},
        "integer_keys": {"model": dict(enumerate(tensors.values()))},
        "tuple_keys": {("a", 1): some},
        "tensor": some,
        "list": [some],
        "none": None,
        "empty": {},
        "nested": {"model": {"model": {"model": {}}}},
        "nan": with_first(torch.full_like(tensors[first], float("nan"))),
        "bool": with_first(torch.ones(2, dtype=torch.bool)),
        "float8": with_first(some.to(torch.float8_e4m3fn)),
        "scalar": with_first(torch.tensor(1.0)),
        "overlapping": {name: torch.zeros(1).expand(tensor.shape) for name, tensor in tensors.items()},
        "large": with_first(torch.zeros(1).expand(10**6, 10**6)),
    }
    for name, content in contents.items():
        torch.save(content, folder / f"{name}.pth")
    (folder / "plain_code.pth").write_bytes(pickle.dumps(_Code(marker)))
    (folder / "noise.pth").write_bytes(random.Random(0).randbytes(1000))
    (folder / "nothing.pth").write_bytes(b"")
    (folder / "half.pth").write_bytes((folder / "whole.pth").read_bytes()[:2000])


def native(folder: Path) -> None:
    """Compile the native operations into a cache folder."""
    from structvit_jax.ops.kernels import native

    os.environ["XDG_CACHE_HOME"] = str(folder)
    folder.mkdir()
    native.available()


def _damaged(whole: Path, seed: str) -> None:
    for kind in DAMAGES:
        chance = random.Random(f"{seed}:{whole.name}:{kind}")
        content = damage.damaged(whole.read_bytes(), kind, chance)
        whole.with_name(f"{kind}{whole.suffix}").write_bytes(content)


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
