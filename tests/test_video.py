"""Frames of video files: every container that users have, chosen frames, damage."""

import fractions
import gc
import os

import av
import clips
import numpy as np
import pytest
from PIL import Image

from structvit_jax.data.media import open_media
from structvit_jax.data.video import VideoFile
from structvit_jax.errors import DecodeError

RNG = np.random.default_rng(0)
# Textured enough that every frame is another one, in a size that codecs have to pad.
_TEXTURE = np.kron(RNG.integers(0, 64, (25, 33), np.uint8), np.ones((2, 2), np.uint8))
FRAMES = np.stack([np.roll(_TEXTURE, 3 * i, axis=1) + np.uint8(3 * i) for i in range(60)])
FRAMES = np.repeat(FRAMES[..., None], 3, axis=-1)
# Name -> style and encoder options. Short groups of pictures make every clip seek.
FILES = {
    "h264.mp4": ("h264", {"g": "10"}),
    "one_key.mp4": ("h264", {}),
    "open_gop.mp4": ("h264", {"x264-params": "open-gop=1:keyint=8:bframes=3"}),
    "transport.ts": ("h264", {"g": "10"}),
    "flash.flv": ("h264", {"g": "10"}),
    "mpeg4.mp4": ("mpeg4", {"g": "10", "bf": "2"}),
    "mpeg4.avi": ("mpeg4", {"g": "10", "bf": "2"}),
    "vp9.webm": ("vp9", {"g": "10", "deadline": "realtime", "cpu-used": "8"}),
    "mjpeg.avi": ("mjpeg", {}),
    "vfr.mp4": ("vfr", {"g": "10"}),
    "audio.mp4": ("audio", {"g": "10"}),
    "rotated.mp4": ("rotated", {"g": "10"}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    for name, (style, options) in FILES.items():
        clips.write_video(folder / name, FRAMES, style, **options)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_chosen_frames_are_those_of_decoding_everything(folder, name):
    with av.open(str(folder / name)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    if name == "rotated.mp4":
        expected = np.rot90(expected, -1, axes=(1, 2))  # shown clockwise
    assert expected.shape == FRAMES.shape
    assert np.abs(expected.astype(int) - FRAMES).mean() < 6  # upright, and in the order they were written
    video = VideoFile(str(folder / name))
    assert (video.count, video.missing) == (60, 0)
    rng = np.random.default_rng(1)
    for _ in range(20):
        wanted = rng.integers(0, 60, rng.integers(1, 9)).tolist()
        assert (video.frames(wanted) == expected[wanted]).all(), wanted
    encoded = VideoFile((folder / name).read_bytes())
    assert (encoded.frames([59, 0, 31]) == expected[[59, 0, 31]]).all()


def test_a_part_in_seconds(folder):
    """At 16 frames a second the part from 1 s to 2.5 s is frames 16 to 39."""
    for name in ("h264.mp4", "vp9.webm", "mpeg4.avi", "audio.mp4", "transport.ts"):
        whole = VideoFile(str(folder / name))
        part = VideoFile(str(folder / name), 1.0, 2.5)
        assert part.count == 24, name
        assert (part.frames([0, 5, 23]) == whole.frames([16, 21, 39])).all(), name
    assert VideoFile(str(folder / "h264.mp4"), start=3.0).count == 12
    assert VideoFile(str(folder / "h264.mp4"), end=0.5).count == 8
    with pytest.raises(DecodeError, match=r"no video frames from 9\.0 s to 10\.0 s"):
        VideoFile(str(folder / "h264.mp4"), 9.0, 10.0)
    with pytest.raises(DecodeError, match="no video frames"):
        VideoFile(str(folder / "h264.mp4"), 2.0, 1.0)


def test_one_frame_and_odd_sizes(tmp_path):
    clips.write_video(tmp_path / "one.mp4", FRAMES[:1])
    video = VideoFile(str(tmp_path / "one.mp4"))
    assert (video.count, video.missing) == (1, 0)
    assert video.frames([0, 0]).shape == (2, 50, 66, 3)


def test_scaling_while_converting(folder):
    small = VideoFile(str(folder / "h264.mp4")).frames([0], short_side=25)
    assert small.shape == (1, 25, 33, 3)
    assert VideoFile(str(folder / "rotated.mp4")).frames([0], short_side=25).shape == (1, 25, 33, 3)
    assert VideoFile(str(folder / "h264.mp4")).frames([0], short_side=100).shape == (1, 50, 66, 3)  # never up


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    return folder, clips.write_bad(folder)


def test_damage_has_a_reason(bad):
    folder, reasons = bad
    for name, reason in reasons.items():
        with pytest.raises(DecodeError, match=reason):
            media = open_media(str(folder / name))
            media.frames([0, media.count // 2, media.count - 1])
    with pytest.raises(DecodeError, match="No such file"):
        open_media(str(folder / "nowhere.mp4"))
    with pytest.raises(DecodeError, match="Not a directory"):
        open_media(str(folder / "noise.mp4" / "clip.mp4"))
    (folder / "hollow.mp4").mkdir()
    with pytest.raises(DecodeError, match="folder without pictures"):
        open_media(str(folder / "hollow.mp4"))


def test_what_is_left_of_a_file_that_was_cut_off(bad):
    """Sampling counts the missing frames too; those that are there can be read."""
    folder, _ = bad
    for name in ("cut_after_index.mp4", "cut.webm"):
        video = open_media(str(folder / name))
        assert abs(video.count - 64) <= 3 and 10 < video.missing < 60, name
        assert video.frames([0, 3]).shape == (2, 32, 32, 3)


def test_h264_in_avi_is_refused(tmp_path):
    """Its frames' times are not those of their order: frames would be exchanged silently."""
    clips.write_video(tmp_path / "h264.avi", FRAMES, bf="3")
    with pytest.raises(DecodeError, match="convert it"):
        VideoFile(str(tmp_path / "h264.avi"))


def test_folders_of_frames(tmp_path):
    for number in (1, 2, 10):
        Image.fromarray(FRAMES[number]).save(tmp_path / f"{number}.png")
    frames = open_media(str(tmp_path))
    assert frames.count == 3
    assert (frames.frames([2, 0, 0]) == FRAMES[[10, 1, 1]]).all()
    assert frames.frames([1], short_side=25).shape == (1, 25, 33, 3)
    with pytest.raises(DecodeError, match="no seconds"):
        open_media(str(tmp_path), start=1.0)
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(DecodeError, match="empty file"):
        frames.frames([1])
    Image.fromarray(FRAMES[2][:40]).save(tmp_path / "2.png")
    with pytest.raises(DecodeError, match="differ in size"):
        frames.frames([0, 1])


def test_images(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(FRAMES[0][..., 0]).save(path)
    assert (open_media(str(path)).frames([0])[0] == FRAMES[0][..., :1]).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned clockwise
    Image.fromarray(FRAMES[0]).save(tmp_path / "turned.jpg", exif=exif, quality=100, subsampling=0)
    turned = open_media(str(tmp_path / "turned.jpg")).frames([0])[0].astype(int)
    assert np.abs(turned - np.rot90(FRAMES[0], -1)).mean() < 4
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DecodeError):
        open_media(str(path)).frames([0])


def test_a_size_that_changes_midway_is_damage(tmp_path):
    both = b""
    for number, frames in enumerate([FRAMES[:20], FRAMES[:20, :40, :48]]):
        with av.open(str(tmp_path / "part.ts"), "w") as container:
            stream = container.add_stream("libx264", rate=16)
            stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
            for place, picture in enumerate(frames):
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                frame.time_base, frame.pts = fractions.Fraction(1, 16), 40 * number + place
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        both += (tmp_path / "part.ts").read_bytes()
    (tmp_path / "both.ts").write_bytes(both)
    video = VideoFile(str(tmp_path / "both.ts"))
    with pytest.raises(DecodeError, match="its frames differ in size"):
        video.frames(range(video.count))


def test_files_are_closed_without_waiting_for_the_collector(folder, bad):
    gc.disable()
    try:
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(20):
            VideoFile(str(folder / "h264.mp4")).close()
            with pytest.raises(DecodeError):
                VideoFile(str(folder / "h264.mp4"), 9.0, 10.0)
            with pytest.raises(DecodeError):
                VideoFile(str(bad[0] / "sound.mp4"))
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    finally:
        gc.enable()


def test_a_last_picture_may_be_shown_for_long(tmp_path):
    """Slides: whole, though the last time stamp lies far before the end."""
    with av.open(str(tmp_path / "slides.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 50, 66, "yuv420p"
        packets = []
        for picture in FRAMES[:20]:
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
        packets += stream.encode()
        last = max(packets, key=lambda packet: packet.pts)
        last.duration *= 100
        container.mux(packets)
    video = VideoFile(str(tmp_path / "slides.mp4"))
    assert (video.count, video.missing) == (20, 0)


def test_a_film_that_starts_late_and_is_cut(tmp_path):
    """Its duration is counted from its start."""
    path = tmp_path / "late.mp4"
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=16, options={"g": "10"})
        stream.height, stream.width, stream.pix_fmt = 50, 66, "yuv420p"
        for number, picture in enumerate(FRAMES):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base, frame.pts = fractions.Fraction(1, 16), 160 + number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert (VideoFile(str(path)).count, VideoFile(str(path)).missing) == (60, 0)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    video = VideoFile(str(path))
    assert abs(video.count - 60) <= 3 and video.missing > 10
