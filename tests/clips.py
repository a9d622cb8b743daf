"""Video files for tests: moving digits, written with PyAV in many containers, codecs and states of damage."""

import fractions
import functools
import struct

import av
import numpy as np

from structvit_jax import data
from structvit_jax.config import default_config
from structvit_jax.data.digits import MovingDigits

# Class -> direction. Single frames look alike in all three.
CLASSES = {"left": 4, "right": 0, "up": 2}
ENDINGS = {
    "h264": "mp4",
    "mpeg4": "mp4",
    "vp9": "webm",
    "mjpeg": "avi",
    "rotated": "mp4",
    "vfr": "mp4",
    "audio": "mp4",
}
_CODECS = {"mpeg4": "mpeg4", "vp9": "libvpx-vp9", "mjpeg": "mjpeg"}


class _Digits(MovingDigits):
    _frames = 16

    def __init__(self, split, examples, seed):
        super().__init__(split, examples, seed)
        self._side = 32


def load(seed=0, **changes):
    """Return the data set of the default configuration with changes, as `root=...`, `augment__flip=...`."""
    config = default_config()
    config.data.workers = 0  # threads start at once
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        config[section or "data"][name] = value
    return data.load(config.data, config.augment, seed)


def take(stream, count):
    """Return copies of the first `count` batches of a stream, and close it."""
    batches = []
    for _, batch in zip(range(count), stream, strict=False):
        del batch["seconds"]
        batches.append({key: np.array(v) if key != "problems" else v for key, v in batch.items()})
    stream.close()
    return batches


def same(a, b):
    """Return whether two batches are equal bit for bit."""
    assert a.keys() == b.keys()
    return all((a[key] == b[key]).all() if key != "problems" else a[key] == b[key] for key in a)


def pictures(label, number, split="train"):
    """Return clip `number` of a class: uint8 [16, 32, 32, 3]."""
    source = _digits("train" if split == "train" else "test")
    return source.open(8 * number + CLASSES[label])[0].frames(range(16))


@functools.cache
def _digits(split):
    return _Digits(split, 10**6, seed=0)


def decoded():
    """Return a clip in memory."""
    return _Digits("train", 8, seed=0).open(0)[0]


def write_video(path, frames, style="h264", rate=16, index_first=False, **options):
    """Encode uint8 [time, height, width, 3]; `options` go to the encoder."""
    codec = _CODECS.get(style, "libx264")
    if style == "vp9":
        options = {"deadline": "realtime", "cpu-used": "8", **options}
    if style == "rotated":
        frames = np.rot90(frames, axes=(1, 2))  # counter-clockwise; the header turns it back
    with av.open(str(path), "w", options={"movflags": "+faststart"} if index_first else {}) as container:
        stream = container.add_stream(codec, rate=rate, options={"crf": "18", **options})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        if codec in ("mjpeg", "mpeg4"):
            stream.bit_rate = 2_000_000
        if style == "vfr":
            stream.codec_context.time_base = fractions.Fraction(1, 1000)
        audio = container.add_stream("aac", rate=16000) if style == "audio" else None
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if style == "vfr":
                frame.time_base, frame.pts = fractions.Fraction(1, 1000), 70 * number + number % 3 * 25
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            write_silence(container, audio, seconds=2)
    if style == "rotated":
        _turn_clockwise(path)


def write_silence(container, stream, seconds):
    silence = np.zeros((1, 16000 * seconds), np.float32)
    frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
    frame.sample_rate = 16000
    container.mux(stream.encode(frame))
    container.mux(stream.encode())


def _turn_clockwise(path):
    """Set the matrix of the track header, as phones do for portrait videos."""
    data = path.read_bytes()
    upright = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + turned + data[at + len(turned) :])


def write_folder(root, per_class):
    """Write ROOT/SPLIT/CLASS/NUMBER.* in all styles in turn; `per_class` is {split: files}."""
    for split, count in per_class.items():
        for label in CLASSES:
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                style = list(ENDINGS)[number % len(ENDINGS)]
                path = root / split / label / f"{number:03}.{ENDINGS[style]}"
                write_video(path, pictures(label, number, split), style)


def write_bad(folder):
    """Write one file of each common kind of damage; return {name: pattern of the reason}."""
    frames = np.concatenate([pictures("up", number) for number in range(4)])  # 64 of them
    whole, indexed, webm = folder / "whole.mp4", folder / "indexed.mp4", folder / "whole.webm"
    write_video(whole, frames)
    write_video(indexed, frames, index_first=True)
    write_video(webm, frames, "vp9")
    middle = indexed.read_bytes().index(b"mdat") + 8
    noise = np.random.default_rng(0).bytes
    contents = {
        "empty.mp4": b"",
        "noise.mp4": noise(4000),
        "page.mp4": b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 20,
        "cut_before_index.mp4": whole.read_bytes()[:-2000],
        "cut_after_index.mp4": indexed.read_bytes()[: int(indexed.stat().st_size * 0.7)],
        "overwritten.mp4": indexed.read_bytes()[:middle]
        + noise(1500)
        + indexed.read_bytes()[middle + 1500 :],
        "cut.webm": webm.read_bytes()[: webm.stat().st_size // 2],
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    for path in (whole, indexed, webm):
        path.unlink()
    with av.open(str(folder / "sound.mp4"), "w") as container:
        write_silence(container, container.add_stream("aac", rate=16000), seconds=2)
    return {
        "empty.mp4": "empty file",
        "noise.mp4": "Invalid data",
        "page.mp4": "Invalid data",
        "cut_before_index.mp4": "Invalid data",
        "cut_after_index.mp4": "cut off",
        "overwritten.mp4": "cannot be decoded|no key frame|Invalid data",
        "cut.webm": "cut off",
        "sound.mp4": "no video stream",
    }


def write_packed_video(path, frames):
    """Encode frames as XviD may: the first B-frame after a frame is stored in the packet of that frame.

    After the last B-frame, an empty picture keeps the number of packets.
    """
    with av.open(str(path), "w", format="avi") as container:
        options = {"bf": "2", "b_strategy": "0", "g": "12", "qmin": "2", "qmax": "2"}
        stream = container.add_stream("mpeg4", rate=16, options=options)
        stream.height, stream.width = frames.shape[1:3]
        pictures = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames]
        coded = [packet for picture in (*pictures, None) for packet in stream.encode(picture)]
        groups = []  # a frame and the B-frames that follow it
        for packet in coded:
            if groups and packet.pts < groups[-1][0].pts:
                groups[-1].append(packet)
            else:
                groups.append([packet])
        chunks = []
        for first, *following in groups:
            joined = bytes(first) + b"".join(map(bytes, following[:1]))
            empty = [b"\0\0\1\xb6\x52\0\0"] * bool(following)
            chunks += [(first.is_keyframe, joined), *((False, bytes(one)) for one in following[1:])]
            chunks += [(False, one) for one in empty]
        start, mark = b"\0\0\1\xb6", b"\0\0\1\xb2DivX503b1393p"
        for number, (is_key, content) in enumerate(chunks):
            packet = av.Packet(content.replace(start, mark + start, 1) if number == 0 else content)
            packet.pts = packet.dts = number
            packet.time_base, packet.is_keyframe, packet.stream = fractions.Fraction(1, 16), is_key, stream
            container.mux(packet)
