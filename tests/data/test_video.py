"""Frames of video files: common containers, chosen frames, damage, limits."""

import contextlib
import fractions
import gc
import io
import os
import socket
import struct
import threading

import av
import clips
import numpy as np
import pytest
from PIL import Image

from structvit_jax.data import container as containers
from structvit_jax.data.container import CONTAINERS
from structvit_jax.data.limits import Limits
from structvit_jax.data.media import frame_names, open_media
from structvit_jax.data.video import VideoFile
from structvit_jax.utils.failures import DecodeError

RNG = np.random.default_rng(0)
# Textured so that all frames differ, in a size that codecs have to pad.
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


def test_parts_in_seconds(folder):
    """At 16 frames per second the part from 1 s to 2.5 s is frames 16 to 39."""
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


def test_damaged_files_are_reported_with_a_reason(bad):
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


def test_the_remaining_frames_of_truncated_files_can_be_read(bad):
    """`count` includes the missing frames."""
    folder, _ = bad
    for name in ("cut_after_index.mp4", "cut.webm"):
        video = open_media(str(folder / name))
        assert abs(video.count - 64) <= 3 and 10 < video.missing < 60, name
        assert video.frames([0, 3]).shape == (2, 32, 32, 3)
        late = VideoFile(str(folder / name), start=0.5)  # 8 frames at 16 frames per second
        assert (late.count, late.missing) == (video.count - 8, video.missing), name
        present = video.count - video.missing
        part = VideoFile(str(folder / name), end=3.5)  # in the missing frames
        assert present < part.count < video.count and part.missing == part.count - present, name


def test_h264_in_avi_is_rejected(tmp_path):
    """The container does not keep the times of frames, so that they would be reordered silently."""
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
    with pytest.raises(DecodeError, match="has no times"):
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


def write(target, frames, codec="libx264", *, form=None, rate=16, first=0, movflags="", **options):
    """Encode frames with presentation times from frame `first` on; `options` go to the encoder."""
    with av.open(target, "w", format=form, options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number, picture in enumerate(frames, first):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.time_base, frame.pts = fractions.Fraction(1, rate), number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def joined(folder, parts):
    """Return a transport stream of parts whose frames differ in size."""
    both = b""
    for number, frames in enumerate(parts):
        write(str(folder / "part.ts"), frames, first=40 * number)
        both += (folder / "part.ts").read_bytes()
    return both


def test_a_change_of_size_is_damage(tmp_path):
    both = joined(tmp_path, [FRAMES[:20], FRAMES[:20, :40, :48]])
    (tmp_path / "both.ts").write_bytes(both)
    video = VideoFile(str(tmp_path / "both.ts"))
    with pytest.raises(DecodeError, match="its frames differ in size"):
        video.frames(range(video.count))


def test_files_are_closed_without_garbage_collection(folder, bad):
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


def test_a_long_last_picture_is_not_a_truncation(tmp_path):
    """As in slides, whose last time stamp is far before the end."""
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


def test_a_truncated_video_that_starts_late(tmp_path):
    """Its duration counts from its start."""
    path = tmp_path / "late.mp4"
    write(str(path), FRAMES, first=160, movflags="+faststart", g="10")
    assert (VideoFile(str(path)).count, VideoFile(str(path)).missing) == (60, 0)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * 0.6)])
    video = VideoFile(str(path))
    assert abs(video.count - 60) <= 3 and video.missing > 10


def cut_without_decoding(source, target, start, seconds):
    """Cut as `ffmpeg -ss START -t SECONDS -i SOURCE -c copy TARGET` does: from the key frame before, which an
    edit list hides."""
    with av.open(str(source)) as whole, av.open(str(target), "w") as part:
        stream = whole.streams.video[0]
        copy = part.add_stream_from_template(stream)
        first, end = (int(time / stream.time_base) for time in (start, start + seconds))
        whole.seek(first, stream=stream)
        for packet in whole.demux(stream):
            if packet.dts is not None and packet.dts < end:
                packet.pts -= first
                packet.dts -= first
                packet.stream = copy
                part.mux(packet)


@pytest.mark.parametrize("ending", ["mp4", "mov"])
def test_a_video_cut_without_decoding(tmp_path, ending):
    clips.write_video(tmp_path / "whole.mp4", FRAMES, g="20", bf="2")
    path = tmp_path / f"part.{ending}"
    cut_without_decoding(tmp_path / "whole.mp4", path, 1.75, 1.5)
    with av.open(str(path)) as container:
        assert next(container.demux(video=0)).is_discard
    with av.open(str(path)) as container:
        expected = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    part = VideoFile(str(path))
    assert (part.count, part.missing) == (len(expected), 0)
    assert (part.frames(range(part.count)) == expected).all()
    assert (part.frames([1]) == expected[1]).all()
    copied, before = VideoFile(str(path), 0.25, 1.0).cut()
    seconds = VideoFile(str(path), 0.25, 1.0)
    again = VideoFile(copied).frames(range(before, before + seconds.count))
    assert (again == seconds.frames(range(seconds.count))).all()


def test_supported_containers(tmp_path):
    """From files and from bytes; names that look like addresses are files."""
    codecs = {"mov": "libx264", "3gp": "mpeg4", "mkv": "libx264"}
    codecs |= {"m4v": "libx264", "wmv": "wmv2", "asf": "msmpeg4"}
    assert {f".{ending}" for ending in codecs} < {e for endings in CONTAINERS.values() for e in endings}
    for ending, codec in codecs.items():
        path = tmp_path / f"http:clip%03d.{ending}"
        write(f"file:{path}", FRAMES[:9], codec, form={"m4v": "mp4"}.get(ending))
        for file in (str(path), path.read_bytes()):
            assert VideoFile(file).frames([0, 8]).shape == (2, 50, 66, 3), ending


SDP = "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video {port} RTP/AVP 96\n"


def test_playlists_and_addresses_are_not_followed(folder, tmp_path):
    """No file, connection or port that they refer to is opened."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        address = "{}:{}".format(*server.getsockname())
        entries = [str(folder / "transport.ts"), f"http://{address}/clip.ts", f"tcp://{address}"]
        playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n" + "".join(f"#EXTINF:9,\n{e}\n" for e in entries)
        lists = {"p.m3u8": playlist, "p.mp4": playlist, "s.sdp": SDP.format(port=5004)}
        lists["c.ffconcat"] = f"ffconcat version 1.0\nfile {entries[0]}\n"
        lists["d.mpd"] = "<?xml version='1.0'?><MPD profiles='urn:mpeg:dash:profile:isoff-live:2011'/>"
        for name, content in lists.items():
            (tmp_path / name).write_text(content)
            for file in (str(tmp_path / name), content.encode()):
                with pytest.raises(DecodeError, match=r"not a supported container|Invalid data"):
                    VideoFile(file)
        for path in (f"http://{address}/clip.mp4", f"tcp://{address}", f"concat:{entries[0]}|{entries[0]}"):
            with pytest.raises(DecodeError, match="No such file"):
                open_media(path)
        with pytest.raises(TimeoutError):
            server.accept()
    with pytest.raises(DecodeError, match="not a supported container"):
        VideoFile(clips_of("image2pipe", "mjpeg"))
    with pytest.raises(DecodeError, match="program stream does not keep the times"):
        VideoFile(clips_of("mpeg", "mpeg2video"))


def clips_of(container_format, codec):
    """Return a video in an unsupported container."""
    file = io.BytesIO()
    write(file, FRAMES[:9], codec, form=container_format, rate=25)
    return file.getvalue()


def test_an_announced_duration_allocates_no_memory(folder):
    """The headers announce 2**32 units; the times of the missing frames would need gigabytes."""
    content = bytearray((folder / "h264.mp4").read_bytes())
    for tag, place in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20), (b"elst", 12)):
        at = content.index(tag)
        content[at + place : at + place + 4] = struct.pack(">I", 2**32 - 2)
    at = content.index(b"stts")
    content[at + 12 : at + 16] = struct.pack(">I", 2**31 - 2)
    with pytest.raises(DecodeError, match=r"frames, more than --config\.data\.max_frames=1048576 allows"):
        VideoFile(bytes(content))


def test_max_frames_is_enforced(folder, tmp_path):
    path = str(folder / "h264.mp4")
    assert VideoFile(path, limits=Limits(frames=60)).count == 60
    with pytest.raises(DecodeError, match=r"60 frames, more than --config\.data\.max_frames=59"):
        VideoFile(path, limits=Limits(frames=59))
    for number in range(3):
        Image.fromarray(FRAMES[number]).save(tmp_path / f"{number}.png")
    with pytest.raises(DecodeError, match="3 frames, more than"):
        open_media(str(tmp_path), limits=Limits(frames=2))


def test_samples_without_bytes_are_limited(folder):
    """A table of samples of equal size or a fragment of default samples announces any number in 12 bytes."""
    content = (folder / "h264.mp4").read_bytes()
    at = content.index(b"stsz")
    bomb = content[: at + 8] + struct.pack(">II", 1, 2**31) + content[at + 16 :]
    for file in (bomb, content + struct.pack(">I4sI4sII", 24, b"moof", 16, b"trun", 0, 2**31)):
        with pytest.raises(DecodeError, match="2147483648 frames, more than"):
            VideoFile(file)
    containers._check_boxes(io.BytesIO(content), Limits(frames=1))  # as many bytes as entries
    with pytest.raises(DecodeError, match="compressed header"):
        VideoFile(content.replace(b"free", b"cmov"))


def test_max_pixels_is_enforced(folder):
    limits = Limits(pixels=50 * 66 - 1)
    for name in ("h264.mp4", "transport.ts", "flash.flv"):
        with pytest.raises(DecodeError, match=r"66 x 50 pixels, more than --config\.data\.max_pixels=3299"):
            VideoFile(str(folder / name), limits=limits)
    for name in ("vp9.webm", "mpeg4.mp4", "mjpeg.avi"):
        with pytest.raises(DecodeError, match=r"more pixels than --config\.data\.max_pixels=3299 allows"):
            VideoFile(str(folder / name), limits=limits).frames([0])


def test_max_pixels_is_enforced_when_the_size_changes(tmp_path):
    """The header of the container does not announce the change."""
    both = joined(tmp_path, [FRAMES[:20, :32, :32], np.tile(FRAMES[:20], (1, 3, 3, 1))])
    assert VideoFile(both).frames([30]).shape == (1, 150, 198, 3)
    with pytest.raises(DecodeError, match=r"more pixels than|Invalid data"):
        VideoFile(both, limits=Limits(pixels=50 * 66)).frames([30])


def damaged(path, number):
    """Return the content of a file with one packet overwritten."""
    with av.open(str(path)) as container:
        packets = sorted((p.pts, p.pos, p.size) for p in container.demux(video=0) if p.size)
    _, at, size = packets[number]
    content = path.read_bytes()
    return content[:at] + bytes(size) + content[at + size :]


@pytest.mark.parametrize("name", ["h264.mp4", "mpeg4.mp4", "mjpeg.avi"])
def test_damaged_frames_are_replaced_if_allowed(folder, name):
    """By the nearest frame of a full decoding, whatever other frames are requested."""
    content = damaged(folder / name, 31)
    with av.open(io.BytesIO(content)) as container:
        times = sorted(p.pts for p in container.demux(video=0) if p.size)
    decoded = {}
    with av.open(io.BytesIO(content)) as container:
        for packet in container.demux(video=0):
            with contextlib.suppress(av.FFmpegError):
                for frame in packet.decode():
                    decoded[times.index(frame.pts)] = frame.to_ndarray(format="rgb24")
    lost = set(range(60)) - decoded.keys()
    assert lost and len(lost) < 10
    video = VideoFile(content, limits=Limits(bad_frames=0.9))
    for wanted in ([*sorted(lost), 5], [min(lost)] if len(lost) > 1 else [31, 2], list(range(20, 45))):
        expected = [decoded[min(decoded, key=lambda other: (abs(other - n), other))] for n in wanted]
        if len(lost & set(wanted)) <= 0.9 * len(wanted):
            assert (video.frames(wanted) == np.stack(expected)).all()
            assert video.repaired == len(lost & set(wanted))
    video.frames([0])
    assert video.repaired == 0
    with pytest.raises(DecodeError):
        VideoFile(content).frames([5, max(lost)])
    with pytest.raises(DecodeError, match="of 60 frames cannot be decoded"):
        VideoFile(content, limits=Limits(bad_frames=0.2)).frames([5, max(lost)])


def test_digits_that_int_cannot_read_are_text(tmp_path):
    names = ["\u00b21.jpg", "10.jpg", "2.jpg", "\u0663.jpg", "\u00b2.jpg", "a\u00b9.png"]
    assert [name for name in frame_names(names) if name[0].isdecimal()] == ["2.jpg", "\u0663.jpg", "10.jpg"]
    assert sorted(frame_names(names)) == sorted(names)


def test_parts_at_extreme_times(folder):
    path = str(folder / "h264.mp4")
    for start in (1e300, np.inf, 2.0**63, 1e19):
        with pytest.raises(DecodeError):
            VideoFile(path, start)
    assert VideoFile(path, -1e300, 1e300).count == 60


def test_threads_open_files_concurrently(folder):
    seen = []
    work = [threading.Thread(target=lambda: seen.append(VideoFile(str(folder / "h264.mp4")))) for _ in "ab"]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert [media.count for media in seen] == [60, 60]


@pytest.mark.parametrize("wanted", [range(16), [5], [0, 3, 7, 12], [15, 4]])
def test_packed_b_frames(wanted, tmp_path):
    """Packets of several frames, as XviD and DivX write them, give frames wrong times."""
    frames = clips.pictures("left", 0)
    clips.write_packed_video(tmp_path / "packed.avi", frames)
    video = VideoFile(str(tmp_path / "packed.avi"))
    assert video.count == 16
    error = np.abs(video.frames(wanted)[:, None].astype(int) - frames).mean((2, 3, 4))
    assert error.argmin(1).tolist() == list(wanted)
