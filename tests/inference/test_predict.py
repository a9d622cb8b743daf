"""Predictions for files, and exported programs; both agree with the evaluation."""

import csv
import io
import json
import math
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import av
import clips
import jax
import numpy as np
import pytest
from etils import epath
from packaging.requirements import Requirement
from PIL import Image

import structvit_jax
from structvit_jax import data
from structvit_jax.cli import predict
from structvit_jax.config import default_config
from structvit_jax.data.limits import Limits
from structvit_jax.data.media_files import Files, find
from structvit_jax.models import weights
from structvit_jax.models.variants import counterpart
from structvit_jax.training import loop
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

PREDICT, EXPORT = {"program": "predict"}, {"program": "export"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Write 12 files for training and 9 for testing, in three classes."""
    root = tmp_path_factory.mktemp("clips")
    clips.write_folder(root, {"train": 4, "val": 3})
    return root


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Train on them for three steps and evaluate on three views of each clip."""
    workdir = tmp_path_factory.mktemp("run")
    config = default_config()
    config.model.name, config.model.widths = "deit_tiny_struct_2_video", (16,)
    config.data.name, config.data.root, config.data.sampling = "folder", str(root), "segment"
    config.data.batch_size, config.data.test_clips, config.eval.batch_size = 8, 3, 8
    config.data.workers = 0
    config.train.duration, config.checkpoint.every = "3 steps", "3 steps"
    loop.train(config, epath.Path(workdir), data.load(config.data, config.augment, 0))
    return workdir


def test_predictions_equal_those_of_the_evaluation(root, run):
    """Whether files or folders are given."""
    trained = structvit_jax.load_trained(str(run))
    with np.load(run / "predictions.npz") as saved:
        names, scores = saved["ids"].tolist(), saved["scores"]
    for paths in ([str(root / "val")], [str(root / name) for name in names]):
        found = {prediction.id: prediction for prediction in trained.predict(paths)}
        assert sorted(found) == sorted(str(root / name) for name in names)
        for name, row in zip(names, scores, strict=True):
            prediction = found[str(root / name)]
            np.testing.assert_allclose(prediction.scores, row, rtol=1e-4, atol=1e-5)
            shares = np.exp(row) / np.exp(row).sum()
            np.testing.assert_allclose(prediction.probabilities, shares, rtol=1e-4)
            best = prediction.best(2)
            assert [trained.class_names[i] for i in np.argsort(-row)[:2]] == [name for name, _ in best]


def test_examples_of_the_test_split(run):
    trained = structvit_jax.load_trained(str(run))
    with np.load(run / "predictions.npz") as saved:
        scores = saved["scores"]
    good, bad = trained.predict(["test:4", "test:9"])
    np.testing.assert_allclose(good.scores, scores[4], rtol=1e-4, atol=1e-5)
    assert (good.id, bad.problem) == ("test:4", "the test examples are test:0 to test:8")


def test_nothing_compiles_twice_for_the_same_shapes(root, run):
    """Over calls of `predict` and `scores`, with and without features."""
    compiled = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details)

    trained = structvit_jax.load_trained(str(run))
    views = trained.read("test:0")
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        first = list(trained.predict([str(root / "val")], features=True)), trained.scores(views)
        assert compiled  # the listener works
        compiled.clear()
        again = list(trained.predict([str(root / "val")], features=True)), trained.scores(views)
        list(trained.predict([str(root / "val")]))
        assert not compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    np.testing.assert_array_equal(first[1], again[1])
    for one, other in zip(first[0], again[0], strict=True):
        np.testing.assert_array_equal(one.features, other.features)


def test_a_library_user_sees_no_warnings_of_other_packages(run, caplog):
    trained = structvit_jax.load_trained(str(run))
    list(trained.predict(["test:0"]))
    assert not caplog.records


def test_features_are_what_the_head_sees(root, run):
    trained = structvit_jax.load_trained(str(run))
    for prediction in trained.predict([str(root / "val")], features=True):
        assert prediction.features.shape == (3, 16)
        head = trained.network.head
        logits = prediction.features @ head.kernel[...] + head.bias[...]
        np.testing.assert_allclose(logits.mean(axis=0), prediction.scores, rtol=1e-4, atol=1e-5)


def test_the_command_reports_good_and_bad_files(command, root, run, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(root / "val", folder)
    good = sorted(str(path) for path in folder.rglob("*.*"))
    (folder / "page.mp4").write_text("<html>")
    (folder / "empty.webm").touch()
    (frames := folder / "frames").mkdir()
    for number in range(9):
        Image.fromarray(np.full((40, 30, 3), 25 * number, np.uint8)).save(frames / f"{number}.png")
    bad = [folder / "page.mp4", folder / "empty.webm", tmp_path / "missing.mp4", frames / "0.png"]
    features = tmp_path / "features"
    words = run, folder, *bad[2:], "--top", 2, "--format=jsonl", f"--features={features}"
    done = command(*words, **PREDICT)
    lines = {line["path"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(lines) == {*good, str(frames), *map(str, bad)}
    problems = {path.rpartition("/")[2]: line["problem"] for path, line in lines.items() if "problem" in line}
    assert problems.keys() == {"page.mp4", "empty.webm", "missing.mp4", "0.png"}
    assert problems["empty.webm"] == "empty file" and problems["missing.mp4"] == "no such file"
    assert "takes videos" in problems["0.png"]
    for path in (*good, str(frames)):
        assert len(lines[path]["classes"]) == 2
        assert lines[path]["probabilities"][0] >= lines[path]["probabilities"][1] > 0
        assert np.load(f"{features}{path}.npy").shape == (3, 16)
    assert done.returncode == 2
    (*_, last) = done.stderr.strip().splitlines()
    assert last == "error: 4 of 14 could not be read; their lines give the reasons"


def test_formats(root, run):
    """One prediction and one problem, as CSV and as text."""
    trained = structvit_jax.load_trained(str(run))
    path = str(sorted((root / "val").rglob("*.mp4"))[0])
    predictions = list(trained.predict([path, "no, such.mp4"]))
    best = predictions[0].best(2)
    lines = [predict._CSV_HEADER, *(predict._csv(prediction, 2) for prediction in predictions)]
    *rows, problem = csv.DictReader(io.StringIO("\n".join(lines)))
    assert [(row["path"], row["class"], float(row["probability"])) for row in rows] == [
        (path, *pair) for pair in best
    ]
    assert (problem["path"], problem["problem"]) == ("no, such.mp4", "no such file")
    (first, probability), (second, lower) = best
    assert [predict._text(prediction, 2) for prediction in predictions] == [
        f"{path}: {first} {probability:.3f}  {second} {lower:.3f}",
        "no, such.mp4: no such file",
    ]


def test_long_videos_in_parts(run, tmp_path):
    """The prediction for a part equals that for a file with its frames alone."""
    halves = [clips.pictures(label, 0) for label in ("left", "up")]
    clips.write_video(tmp_path / "long.mp4", np.concatenate(halves), crf="0")
    trained = structvit_jax.load_trained(str(run))
    parts = list(trained.predict([str(tmp_path / "long.mp4")], every=1.0))
    assert [part.id.rpartition("/")[2] for part in parts] == ["long.mp4#0-1", "long.mp4#1-"]
    for part, frames in zip(parts, halves, strict=True):
        clips.write_video(tmp_path / "alone.mp4", frames, crf="0")
        (alone,) = trained.predict([str(tmp_path / "alone.mp4")])
        np.testing.assert_allclose(part.scores, alone.scores, atol=2e-3)
    assert not np.allclose(parts[0].scores, parts[1].scores, atol=4e-3)
    assert len(find([str(tmp_path / "long.mp4")], video=True, other="", every=10, limits=Limits())) == 1


def test_parts_are_not_shorter_than_a_frame(tmp_path):
    clips.write_video(tmp_path / "long.mp4", clips.pictures("left", 0))  # 16 frames a second
    path = str(tmp_path / "long.mp4")

    def parts(every):
        return len(find([path], video=True, other="", every=every, limits=Limits()))

    assert parts(1 / 16) == 16
    for every in (0.06, 1e-9, 1e-320):
        with pytest.raises(UserError, match=r"16 frames in 1 s, so parts need at least 0\.0625 s"):
            parts(every)
    for every in (math.nan, math.inf, -1.0):
        with pytest.raises(UserError, match="is not a number of seconds"):
            parts(every)


def test_notes_on_files_that_are_read_with_a_defect(run, tmp_path, capsys):
    """Clips with repeated frames are counted; replaced frames are reported by file."""
    clips.write_video(tmp_path / "short.mp4", clips.pictures("left", 0)[:5])
    clips.write_video(tmp_path / "bad.avi", clips.pictures("up", 0), "mjpeg")
    content = (tmp_path / "bad.avi").read_bytes()
    with av.open(str(tmp_path / "bad.avi")) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][1]
    (tmp_path / "bad.avi").write_bytes(
        content[: packet.pos + 8] + bytes(packet.size) + content[packet.pos + 8 + packet.size :]
    )
    trained = structvit_jax.load_trained(str(run))
    (prediction,) = trained.predict([str(tmp_path / "bad.avi")])
    assert prediction.problem and not prediction.notes
    trained.config.data.max_replaced_frames = 0.2
    assert predict._print(trained.predict([str(tmp_path)]), predict._text, 1, None) == (2, 0)
    assert capsys.readouterr().err.splitlines() == [
        f"note: {tmp_path}/bad.avi: 1 frame could not be decoded, replaced by the nearest",
        "note: 1 clip has fewer than the 8 frames of a clip; frames are repeated",
    ]


def test_files_of_the_other_kind_name_a_model_that_takes_them(run, tmp_path):
    trained = structvit_jax.load_trained(str(run))
    (tmp_path / "a.jpg").touch()
    (prediction,) = trained.predict([str(tmp_path / "a.jpg")])
    assert "frames (a model such as deit_tiny_struct_2 takes images)" in prediction.problem
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=r"no images in .*such as uniformer_s_video takes videos"):
        find([str(tmp_path / "folder")], video=False, other=counterpart("uniformer_s"), limits=Limits())
    images = Files(
        find([str(tmp_path / "b.mp4"), "test:" + "9" * 5000], video=False, other="m", limits=Limits()),
        ("a",),
        video=False,
        other="deit_s_video",
        test=trained._test_split,
        limits=Limits(),
    )
    (tmp_path / "b.mp4").touch()
    with pytest.raises(DecodeError, match=r"takes images \(a model such as deit_s_video takes videos"):
        images.open(0)
    with pytest.raises(DecodeError, match="the test examples are test:0 to test:8"):
        images.open(1)


def test_a_long_video_takes_no_more_memory_than_its_first_minute(run, tmp_path):
    """Ten minutes in parts of two seconds, each decoded separately."""
    pictures = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 3), np.uint8)
    clips.write_video(tmp_path / "long.mp4", np.tile(pictures, (40, 1, 1, 1)), rate=4, g="8")
    trained, resident = structvit_jax.load_trained(str(run)), []
    for prediction in trained.predict([str(tmp_path / "long.mp4")], every=2.0):
        assert not prediction.problem
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert len(resident) == 300 and max(resident[30:]) < 1.05 * resident[30]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "Missing argument 'CHECKPOINT'. See structvit predict --help"),
        (["{run}"], "Missing argument 'FILE...'. See structvit predict --help"),
        (["nowhere", "a.mp4"], "no checkpoint at nowhere: it should be RUN"),
        (["{run}", "{empty}"], "{empty}: there are no videos in this folder"),
        (["{run}", "--config.model.depths=(1,)", "a.mp4"], "leave config.model as it was saved"),
        (["{run}", "--config.data.sise=3", "a.mp4"], "Did you mean config.data.size or"),
        (["{run}", "--topp=3", "a.mp4"], "Did you mean '--top'? See structvit predict --help"),
    ],
)
def test_user_errors_are_one_line(command, run, tmp_path, words, complaint):
    names = {"run": run, "empty": tmp_path}
    done = command(*(word.format(**names) for word in words), **PREDICT)
    assert done.returncode == 2 and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith("error: ") and complaint.format(**names) in line


ELSEWHERE = """
import sys
absent = set(sys.argv.pop(1).split(","))

class Absent:
    def find_spec(name, *_):
        if name.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent)
import jax, numpy as np
program = jax.export.deserialize(open(sys.argv[1], "rb").read())
for given, result in zip(sys.argv[2::2], sys.argv[3::2], strict=True):
    np.save(result, program.call(np.load(given)))
assert not any(name.startswith("structvit_jax") for name in sys.modules)
"""


def not_installed_by(*names):
    """Return the modules of this environment that are missing where only these packages are installed."""
    found, wanted = set(), list(names)
    while wanted:
        if (name := wanted.pop()) not in found:
            found.add(name)
            needed = map(Requirement, metadata.requires(name) or [])
            wanted += [one.name for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
    modules = metadata.packages_distributions()
    return ",".join(name for name, packages in modules.items() if found.isdisjoint(packages))


@pytest.mark.parametrize("model", ["deit_tiny_struct_2_video", "structvit_tiny_2_2"])
def test_a_program_gives_the_logits_of_the_model_without_the_package(command, model, tmp_path):
    """With two batch sizes, in an environment with the packages that its card names."""
    config = default_config()
    config.model.name, config.data.batch_size, config.eval.batch_size = model, 8, 16
    config.data.train_examples = config.data.test_examples = 16
    if not model.endswith("_video"):
        config.data.name, config.data.frames, config.data.size = "digits", 0, 32
        config.model.depths, config.model.widths, config.model.head_width = (1,) * 4, (8, 8, 16, 16), 8
    config.train.duration = "1 steps"
    workdir = tmp_path / "run"
    loop.train(config, epath.Path(workdir), data.load(config.data, config.augment, 0))
    file = tmp_path / "model.jax"
    done = command(workdir, file, **EXPORT)
    assert done.returncode == 0, done.stderr

    trained = structvit_jax.load_trained(str(workdir))
    structure, arrays = weights.split(trained.network)
    network = jax.jit(lambda x: structure.model(arrays)(x))
    card = json.loads((tmp_path / "model.jax.json").read_text())
    absent = not_installed_by(*card["install"].removeprefix("pip install ").split())
    words, rng = [sys.executable, "-I", "-c", ELSEWHERE, absent, file], np.random.default_rng(0)
    given = [rng.integers(0, 256, (count, *trained.reader.shape), np.uint8) for count in (1, 3)]
    for pixels in given:
        places = [tmp_path / f"{name}{len(pixels)}.npy" for name in ("in", "out")]
        np.save(places[0], pixels)
        words += places
    subprocess.run(list(map(str, words)), check=True, cwd=tmp_path)
    for pixels in given:
        expected = np.asarray(network(trained.normalized(pixels)))
        difference = np.abs(np.load(tmp_path / f"out{len(pixels)}.npy") - expected).max()
        assert difference <= 1e-6 * np.abs(expected).max()

    assert card["platforms"] == ["cpu", "cuda", "tpu"]
    assert card["input"]["shape"] == [None, *trained.reader.shape]
    assert tuple(card["class_names"]) == trained.class_names


def test_export_refuses_invalid_arguments(command, run):
    done = command(run, "--platforms=cpu,gpu", "x.jax", **EXPORT)
    assert done.returncode == 2 and "unknown platform 'gpu'" in done.stderr
    done = command(run, "x.jax", "y.jax", **EXPORT)
    assert done.returncode == 2 and "unexpected extra argument (y.jax)" in done.stderr
