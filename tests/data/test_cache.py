"""The cache of decoded frames: equal batches with and without it, its limit, kills, and when it is used."""

import os
import pickle
import shutil
import signal
import subprocess
import sys

import clips
import numpy as np
import pytest
from clips import load, same, take
from conftest import ROOT
from PIL import Image
from test_folder import AUGMENT, is_worker

from structvit_jax.data import cached_source
from structvit_jax.data.frame_cache import FrameCache, entry_bytes, index_bytes
from structvit_jax.data.limits import Limits
from structvit_jax.data.media import configure_decoding, open_media
from structvit_jax.data.types import Media
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

VIDEO = {"name": "folder", "size": 24, "frames": 6, "sampling": "segment", "max_replaced_frames": 0.2}
MIB = 2**20


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Videos: 21 intact ones and 9 damaged ones for training, 3 for testing."""
    root = tmp_path_factory.mktemp("clips")
    clips.write_folder(root, {"train": 7, "val": 1})
    clips.write_bad(root / "train" / "up")
    frames = np.concatenate([clips.pictures("up", number) for number in range(4)])
    path = root / "train" / "up" / "repaired.mp4"
    clips.write_video(path, frames, index_first=True, g="8")
    data = bytearray(path.read_bytes())
    middle = data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2
    data[middle : middle + 40] = bytes(40)
    path.write_bytes(data)
    return root


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of several sizes, one of them damaged: 41 for training, 4 for testing."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 2)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (28, 28 + number % 3, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    (root / "train" / "a" / "bad.png").write_bytes(b"\x89PNG")
    return root


def cached(**changes):
    """Return a data set that uses the cache."""
    dataset = load(**{"cache": "on", **changes})
    assert dataset.start_cache().startswith("cache: decoded frames are kept in memory")
    return dataset


def shared_memory(dataset):
    """Return the cache of a data set, and the memory that it has taken from the system."""
    cache = dataset.train.cached.cache
    return cache, 512 * os.fstat(cache.descriptor).st_blocks


@pytest.mark.parametrize("workers", [0, 3])
def test_the_same_videos_with_and_without_cache(root, workers):
    """Over six epochs of 30 clips, and when training resumes in the middle of one."""
    setting = {"root": str(root), **VIDEO, **AUGMENT}
    plain = load(**setting, cache="off")
    trained, tested = take(plain.train_batches(12, start_step=0), 15), take(plain.test_batches(2), 9)
    masked = {problem.kind for batch in trained for problem in batch["problems"]}
    assert masked == {"unreadable", "repaired"}
    dataset = cached(**setting, workers=workers)
    assert all(map(same, take(dataset.train_batches(12, start_step=0), 9), trained))
    assert all(map(same, take(dataset.train_batches(12, start_step=4), 11), trained[4:]))
    for _ in range(0 if workers else 2):
        assert all(map(same, take(dataset.test_batches(2), 9), tested))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_same_images_with_and_without_cache(images, workers):
    setting = {"root": str(images), "name": "folder", "frames": 0, "size": 20, "short_side": 24, **AUGMENT}
    plain = take(load(**setting, cache="off").train_batches(10, start_step=0), 9)
    assert any(batch["problems"] for batch in plain)
    dataset = cached(**setting, workers=workers)
    assert all(map(same, take(dataset.train_batches(10, start_step=0), 9), plain))
    assert dataset.train.cached.cache.used >= 40 * entry_bytes(1, 24, 24)


def test_cached_files_are_not_opened(tmp_path):
    """A video that is read in part is stored as a whole after a few visits."""
    frames = np.concatenate([clips.pictures("up", number) for number in range(4)])
    for split in ("train", "val"):
        for label in "ab":
            (tmp_path / split / label).mkdir(parents=True)
            clips.write_video(tmp_path / split / label / "a.mp4", frames)
    setting = {"root": str(tmp_path), "name": "folder", "size": 24, "frames": 8, "sampling": "dense"}
    plain = take(load(**setting, cache="off").train_batches(2, start_step=0), 30)
    dataset = cached(**setting)
    assert all(map(same, take(dataset.train_batches(2, start_step=0), 10), plain))
    shutil.rmtree(tmp_path / "train")
    assert all(map(same, take(dataset.train_batches(2, start_step=10), 20), plain[10:]))


def test_other_sizes_are_not_cached(images):
    dataset = cached(root=str(images), name="folder", frames=0, size=20, short_side=24)
    plain = load(root=str(images), name="folder", frames=0, size=20, short_side=24).test
    for _ in range(2):
        dataset.test.test(1)
        assert (dataset.test.uncropped(1)[0] == plain.uncropped(1)[0]).all()
        assert dataset.test.uncropped(1)[0].shape[1:3] == (28, 29)


def test_the_limit_is_never_exceeded(images):
    """With a limit of half of the data, half of the examples are cached."""
    setting = {"root": str(images), "name": "folder", "frames": 0, "size": 20}
    plain = take(load(**setting, cache="off").train_batches(10, start_step=0), 9)
    limit = 64 * 1024
    dataset = cached(**setting, cache_gib=limit / 2**30)
    assert all(map(same, take(dataset.train_batches(10, start_step=0), 9), plain))
    cache, taken = shared_memory(dataset)
    stored = sum(cache.entry(number) is not None for number in range(41))
    assert 15 < stored < 35 and cache.used <= limit and taken <= limit
    assert sum(map(cache.is_excluded, range(41))) == 40 - stored


def test_memory_does_not_grow_without_cache_and_keeps_to_the_limit_with_it(images):
    """That of this process, after 100 and after 600 images."""

    def private():
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

    setting = {"root": str(images), "name": "folder", "frames": 0, "size": 160}
    for cache in ("off", "on"):
        dataset = load(**setting, cache=cache, cache_gib=0.25)
        dataset.start_cache()
        stream = dataset.train_batches(20, start_step=0)
        for _ in range(5):
            next(stream)
        before = private()
        for _ in range(25):
            next(stream)
        stream.close()
        assert private() - before < 12 * MIB  # 500 images have 36 MiB
    assert shared_memory(dataset)[1] < MIB


def test_a_video_is_stored_in_parts_if_frames_of_it_are_damaged(root):
    """Its intact frames are served from the cache, although it cannot be stored as a whole."""
    dataset = cached(root=str(root), **VIDEO, **AUGMENT)
    names = [dataset.train_id(number) for number in range(dataset.train_examples)]
    number = names.index("train/up/repaired.mp4")
    sources = dataset.train.source, dataset.train.cached
    problems = []
    for first in [*range(0, 59, 3), *range(59)]:
        expected, found = (outcome(source, number, range(first, first + 6)) for source in sources)
        assert np.array_equal(expected[0], found[0]) and expected[1:] == found[1:]
        problems += [expected[1:]]
    assert len(set(problems)) > 2


def outcome(source, number, wanted):
    """Return the frames of a clip, the number of repaired ones, and the reason if it cannot be read."""
    media = source.open(number)[0]
    try:
        return media.frames(wanted), media.repaired, ""
    except DecodeError as error:
        return np.zeros(0), 0, str(error)
    finally:
        media.close()


class Smeared(Media):
    """Frame 5 is damaged: its pixels are those of frame 3 if that is decoded, too, and zero otherwise."""

    count = 8

    def frames(self, wanted, short_side=0):
        self.damaged, self.repaired = 5 in wanted, wanted.count(5)
        values = np.array(wanted)
        values[values == 5] = 3 if 3 in wanted else 0
        return np.tile(values.astype(np.uint8)[:, None, None, None], (1, 4, 4, 3))


class SmearedSource:
    def __len__(self):
        return 1

    def open(self, index):
        return Smeared(), 0


@pytest.mark.parametrize("chunk", [48, 480])  # bytes: one frame, or all of them
def test_damaged_frames_are_not_cached(chunk, monkeypatch):
    monkeypatch.setattr(cached_source, "_CHUNK", chunk)
    direct = SmearedSource()
    for visits in np.random.default_rng(0).integers(0, 8, (50, 8, 3)).tolist():
        source = cached_source.CachedSource(direct, FrameCache(1, MIB), 0, 0)
        for wanted in visits:
            found, expected = (outcome(one, 0, wanted) for one in (source, direct))
            assert np.array_equal(found[0], expected[0]) and found[1:] == expected[1:]
        entry = source.cache.entry(0)
        assert entry is None or not entry.ready[5]


def test_concealed_damage_is_noticed(root):
    configure_decoding()
    media = open_media(str(root / "train" / "up" / "000.mp4"))
    media.frames(range(media.count))
    assert not media.damaged
    tolerant = Limits(bad_frames=1.0)
    media = open_media(str(root / "train" / "up" / "repaired.mp4"), limits=tolerant)
    media.frames(range(media.count))
    assert media.damaged


KILLED = """
import os, pickle, signal, sys
cache = pickle.load(sys.stdin.buffer)
entry = cache.add(1, 0, 2, 0, (8, 8))
entry.store([0], [entry.pixels[0] + 1])
os.pwrite(cache.descriptor, bytes([7] * 100), entry._start + 192)
with cache._locked():
    print(cache.used, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_is_killed_while_it_writes_leaves_no_half_frame_and_no_lock():
    cache = FrameCache(3, MIB)
    process = subprocess.run(
        [sys.executable, "-c", KILLED], input=pickle.dumps(cache), capture_output=True, cwd=ROOT,
        pass_fds=[cache.descriptor], timeout=30,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL and int(process.stdout) == cache.used
    entry = cache.entry(1)
    assert (entry.frames([0]) == 1).all() and entry.pixels[1, 0, 0, 0] == 7
    assert entry.frames([1]) is None and entry.frames([0, 1]) is None
    assert cache.add(2, 0, 2, 0, (8, 8)) is not None


def test_workers_may_be_killed_while_they_fill_the_cache(root):
    setting = {"root": str(root), **VIDEO, **AUGMENT}
    plain = take(load(**setting, cache="off").train_batches(6, start_step=0), 20)
    dataset, step = cached(**setting, workers=1), 0
    for last in (3, 8):
        stream = dataset.train_batches(6, start_step=step)
        with pytest.raises(UserError, match="died with exit code -9"):
            for batch in stream:
                assert (batch["inputs"] == plain[step]["inputs"]).all()
                step += 1
                if step == last:
                    os.kill(next(filter(is_worker, map(int, filter(str.isdecimal, os.listdir("/proc"))))), 9)
    assert all(map(same, take(dataset.train_batches(6, start_step=step), 20 - step), plain[step:]))


def test_a_process_without_the_descriptor_does_not_use_the_cache():
    cache = FrameCache(3, MIB)
    script = "import pickle, sys; pickle.load(sys.stdin.buffer)"
    process = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(cache), capture_output=True, cwd=ROOT
    )
    assert b"UserError: the cache of decoded frames cannot be shared with a data worker" in process.stderr
    other = FrameCache(3, 2 * MIB)  # another file with that descriptor
    with pytest.raises(UserError, match=r"another file .*; turn it off with --config.data.cache=off"):
        FrameCache.__new__(FrameCache).__setstate__((other.descriptor, *cache.__getstate__()[1:]))


def test_it_is_on_by_default_if_the_frames_of_files_fit(images):
    setting = {"root": str(images), "name": "folder", "frames": 0, "size": 20}
    assert index_bytes(45) + 45 * entry_bytes(1, 29, 28) == 113 * 1024 - 128
    for cache, kib, line in [
        ("auto", 3000, "cache: decoded frames are kept in memory, about 113 KiB of at most 2.9 MiB"),
        ("auto", 64, "cache: off, decoded frames need about 113 KiB, and the limit is 64.0 KiB"),
        ("on", 64, "cache: decoded frames are kept in memory, 64.0 KiB of about 113 KiB"),
        ("on", 1, "cache: off, no shared memory of 1.0 KiB (the index of 45 examples takes 384 bytes)"),
        ("off", 3000, ""),
    ]:
        dataset = load(**setting, cache=cache, cache_gib=kib / 2**20)
        assert dataset.start_cache() == line
        assert (dataset.train.cached is not None) == ("kept" in line)
    generated = load(train_examples=8, test_examples=8)
    assert generated.start_cache() == "" and generated.train.cached is None


def test_available_memory_respects_control_groups(monkeypatch, tmp_path):
    """Those of both versions, above this process and in a container, which sees its own as the top."""
    monkeypatch.setattr(cached_source, "_CGROUPS", tmp_path)

    def write(folder, names, most, used, stat):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for name, value in zip((*names, "memory.stat"), (most, used, stat), strict=True):
            (tmp_path / folder / name).write_text(f"{value}\n")

    new, old = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    write("job/step", new, "max", 5, "anon 5")
    write("job", new, 1000, 700, "anon 400\ninactive_file 200\nactive_file 50")
    write("memory/container", old, 800, 500, "total_inactive_file 60\ninactive_file 1")
    write("memory", old, 900, 100, "cache 1")
    free = lambda text: list(cached_source._free_in_cgroups(text))  # noqa: E731
    assert free("0::/job/step\n") == [550]
    assert free("4:memory:/container\n1:cpu:/\n0::/\n") == [360, 800]
    assert free("4:memory:/of/the/host\n") == [800]
    assert 0 < cached_source.available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
