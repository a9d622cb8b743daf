"""`structvit bench input`: recipes and their stages, rates of loaders, frames equal to those of others."""

import contextlib
import itertools
import re
import shutil
import time

import av
import numpy as np
import pytest
from conftest import structvit
from PIL import Image, UnidentifiedImageError

from structvit_jax import data
from structvit_jax.config import recipes
from structvit_jax.data.media import open_media
from structvit_jax.data.stages import STAGES
from structvit_jax.performance import input_files, input_peer, input_speed
from structvit_jax.utils.errors import UserError

SMALL = ("--config=kinetics400", "--config.data.frames=4", "--config.data.size=32", "--rounds=2")


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("video") / "video.mp4")
    input_files.write_video(path, key_interval=30)
    return path


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture(autouse=True)
def _short_rounds(monkeypatch):
    monkeypatch.setattr(input_speed, "_SECONDS", 1e-3)


@pytest.fixture
def measured(monkeypatch):
    """The names and readers that a command measures, which is left out."""
    found = []
    monkeypatch.setattr(input_speed, "report", lambda name, reader, **options: found.append((name, reader)))
    return found


def reader_of(folder, *files, **changes):
    """Return the reader of the recipe for Kinetics with changes to its section `data`."""
    input_files.write_data_set(folder / "data", files)
    config = recipes.dense_video("structvit_s_4_1_video")
    config.data.update(changes, root=str(folder / "data"))
    return data.load(config.data, config.augment).train


def test_stages_add_up(video, capsys):
    """In the table of a recipe, with its two copies of an example and with one copy."""
    structvit("bench", "input", *SMALL, video)
    out = capsys.readouterr().out
    assert "kinetics400: clips of 4x32x32 from 300 frames of 340x256" in out
    rows = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := re.split(r"\s{2,}", line)) > 1}
    assert rows["stage"] == [
        *("ms per clip (2 copies)", "median", "fraction"),
        *("ms per clip (1 copy)", "median", "fraction"),
    ]
    stages = [*STAGES, "transport", "device"]
    values = np.array([rows[stage] for stage in stages], float).reshape(-1, 2, 3)
    total = np.array(rows["total"], float).reshape(2, 3)
    np.testing.assert_allclose(values[..., 0].sum(0), total[:, 0], atol=0.01)
    np.testing.assert_allclose(values[..., 2], values[..., 0] / total[:, 0], atol=0.01)
    np.testing.assert_allclose(values[..., 2].sum(0), 1, atol=0.01)
    assert (
        values[[stages.index(stage) for stage in ("open", "decode", "augment", "crop", "transport")]] > 0
    ).all()
    rate = float(rows["clips/s per core"][0])
    assert rate == pytest.approx(1000 / total[0, 0], rel=0.01)
    costly = stages[np.argmax(values[:, 0, 0])]
    assert re.search(rf"^{costly} costs most \(\d+%\); \d+ cores? can read at most \d+ clips/s$", out, re.M)


def test_recipes_read_generated_files(measured, video, monkeypatch):
    """Each configuration is that of its file; `folder` adapts to videos and to small images."""
    monkeypatch.setattr(input_files, "write_video", lambda path, key_interval: shutil.copy(video, path))
    structvit("bench", "input")
    assert [(name, reader.shape) for name, reader in measured] == [
        ("imagenet", (224, 224, 3)),
        ("kinetics400", (16, 224, 224, 3)),
        ("something_v2", (16, 224, 224, 3)),
        ("folder", (8, 64, 64, 3)),
        ("folder", (32, 32, 3)),
    ]
    options = [(reader.data.sampling, reader.augment.repeated_augmentation) for _, reader in measured]
    assert options[1:4] == [("dense", 2), ("segment", 2), ("segment", 1)]
    assert measured[0][1].augment.randaugment == recipes.RANDAUGMENT_IMAGES


def test_recipes_read_given_files(measured, video, image):
    structvit("bench", "input", image, video)
    assert len(measured) == 5
    measured.clear()
    structvit("bench", "input", image, "--config.data.size=96")
    assert [(name, reader.shape) for name, reader in measured] == [
        ("imagenet", (96, 96, 3)),
        ("folder", (96, 96, 3)),
    ]
    assert {reader.source.path(number) for _, reader in measured for number in (0, 99)} == {image}


def test_the_data_of_a_configuration(measured):
    structvit("bench", "input", "--config=bench", "--config.data.train_examples=48")
    ((name, reader),) = measured
    assert name == "bench" and len(reader.source) == 48


def test_mistakes(measured, tmp_path, image, video):
    for arguments, message in {
        (f"{tmp_path}/nothing.mp4",): r"nothing\.mp4 cannot be read: it is not a file or folder",
        ("--workers=1,x",): "--workers=1,x is not a list of numbers up to 1024, such as 0,1,2",
        (f"--config.data.root={tmp_path}",): "set the recipe that reads them: --config=folder",
        ("--config=bench", video): "reads data of its own, so no FILE can be given",
        ("--config=imagenet", video): "there are no files that --config=imagenet reads in .*mp4",
    }.items():
        with pytest.raises(UserError, match=message):
            structvit("bench", "input", *arguments)
    assert not measured


def test_unreadable_files(tmp_path, video, capsys):
    """One of two files is damaged: it is reported, and does not count as a row."""
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    structvit("bench", "input", *SMALL, video, broken)
    assert re.search(
        r"note: \d+ examples could not be read, such as \S+broken\.mp4: ", capsys.readouterr().out
    )
    with pytest.raises(UserError, match=r"broken\.mp4"):
        structvit("bench", "input", *SMALL, broken)


def test_small_images_are_also_read_from_the_cache(image, capsys, monkeypatch):
    monkeypatch.setattr(input_files, "_EXAMPLES", 64)
    structvit("bench", "input", "--config=folder", "--rounds=3", image)
    rows = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    table = {row[0]: row[1:] for row in rows if len(row) > 1}
    assert [title for title in table["stage"] if "(" in title][1] == "ms per image (from the cache)"
    decoding, cached = float(table["decode"][0]), float(table["decode"][3])
    assert 0 < cached < decoding / 2


def test_rates_with_workers(image, capsys, monkeypatch):
    monkeypatch.setattr(input_files, "_EXAMPLES", 64)
    structvit("bench", "input", "--config=folder", "--workers=0,1", "--rounds=1", image)
    title, row, *spreads = capsys.readouterr().out.strip().splitlines()[-4:]
    assert re.fullmatch(r"images/s, end to end +0 workers +1 worker", title)
    rates = map(float, re.fullmatch(r"structvit +([\d.]+) +([\d.]+)", row).groups())
    for name, rate, spread in zip(("0 workers", "1 worker"), rates, spreads, strict=True):
        assert rate > 0 and spread == f"{name}: {rate} to {rate} images/s"  # of one round


def test_loaders_are_timed_alternately(monkeypatch):
    """By a clock that only batches advance. The batches that are queued at first cost nothing."""
    now, order = [0.0], []
    monkeypatch.setattr(input_speed, "_SECONDS", 7.0)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: order.append(seconds))

    def batches(name, seconds):
        for number in itertools.count():
            order.append(name)
            now[0] += seconds if number >= input_speed._QUEUED * 2 else 0
            yield number

    loaders = {"fast": batches("fast", 1.0), "slow": batches("slow", 3.0)}
    rates = input_speed.time_alternately(loaders, rows=6, workers=2, rounds=2)
    assert rates == {"fast": [6.0, 6.0], "slow": [2.0, 2.0]}
    one_round = ["fast"] * (6 + 8) + [6.0] + ["slow"] * (6 + 4) + [18.0]
    assert order == one_round * 2


def test_rates_are_compared_round_by_round():
    rates = {"structvit": [10.0, 30.0, 40.0], "a": [5.0, 5.0, 5.0], "b": [2.0, 10.0, 10.0]}
    lines = input_speed.rate_table({1: rates}, "clip")
    assert [re.split(r"\s{2,}", line) for line in lines[:-1]] == [
        ["clips/s, end to end", "1 worker"],
        ["structvit", "30.0"],
        ["a", "5.0 (6.00)"],
        ["b", "10.0 (4.00)"],
    ]
    assert lines[-1] == (
        "1 worker: 10.0 to 40.0 clips/s, 4.00 times (3.00 to 5.00) the rate of the fastest peer, b"
    )


@pytest.mark.parametrize("decoder", input_peer._CLIP_DECODERS)
@pytest.mark.parametrize("sampling", ["dense", "segment"])
def test_pytorch_reads_the_same_frames(decoder, sampling, video, tmp_path):
    if not input_peer._is_installed(decoder):
        pytest.skip(f"{decoder} is not installed")
    reader = reader_of(tmp_path, video, sampling=sampling)
    files = input_peer.TorchFiles((video,), reader.data, reader.augment, decoder, "torchvision")
    for seed in range(3):
        with contextlib.closing(open_media(video)) as media:
            own = media.frames(reader.frames(media.count, np.random.default_rng(seed)))
        theirs = files.decode(0, np.random.default_rng(seed)).permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(own, theirs)


def test_pytorch_scales_frames_of_long_sides(video):
    theirs = input_peer._decode_with_pyav(video, lambda count: [count - 2, count - 1, count - 1], 128)
    with contextlib.closing(open_media(video)) as media:
        own = media.frames([298, 299, 299], short_side=128)
    np.testing.assert_array_equal(own, theirs.permute(0, 2, 3, 1).numpy())


def test_pytorch_batches(video, tmp_path, image, capsys):
    """Every combination makes batches of the same shape, and its rate is printed."""
    if not input_peer._is_installed("torchvision"):
        pytest.skip("torchvision is not installed")
    structvit("bench", "input", *SMALL, video, "--peer=torch")
    structvit("bench", "input", "--config=imagenet", "--config.data.size=32", image, "--peer=torch")
    out = capsys.readouterr().out
    for name in ("PyAV + torchvision", "Pillow + torchvision", "torchvision + torchvision"):
        assert re.search(rf"^torch: {re.escape(name)} +[\d.]+ \([\d.]+\)$", out, re.M)
    last = r"^1 worker: .* (clip|image)s/s, [\d.]+ times .* the rate of the fastest peer, torch: "
    assert re.findall(last, out, re.M) == ["clip", "image"]


def test_pytorch_replaces_files_that_it_cannot_read(tmp_path, image):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"not an image")
    reader = reader_of(tmp_path, image, frames=0)
    options = (reader.data, reader.augment, "Pillow", "torchvision")
    read = input_peer.TorchFiles((str(broken), image), *options).decode_any(0)
    assert read.size == (50, 40)
    with pytest.raises(UnidentifiedImageError):
        input_peer.TorchFiles((str(broken),), *options).decode_any(0)


def test_pytorch_is_missing(monkeypatch, video, tmp_path):
    monkeypatch.setattr(input_peer, "_is_installed", lambda name: name != "torchvision")
    with (
        pytest.raises(UserError, match="pip install torch torchvision"),
        input_peer.open_loaders(reader_of(tmp_path, video), 2, 0),
    ):
        pass


def test_frames_agree_with_the_plain_loop(video, monkeypatch):
    """It decodes and converts all frames. Processor time does not depend on other processes."""
    monkeypatch.setattr(time, "perf_counter", time.process_time)
    own_seconds, plain_seconds = [], []
    for start in range(0, 250, 50):
        wanted = range(start, start + 50, 4)
        begin = time.perf_counter()
        with contextlib.closing(open_media(video)) as media:
            own = media.frames(wanted)
        middle = time.perf_counter()
        with av.open(video) as container:
            pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        own_seconds.append(middle - begin)
        plain_seconds.append(time.perf_counter() - middle)
        np.testing.assert_array_equal(own, np.stack([pictures[number] for number in wanted]))
    assert 3 * np.median(own_seconds) < np.median(plain_seconds)
