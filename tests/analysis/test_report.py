"""Reports: numbers against NumPy, thumbnails against the data, runs with missing files."""

import base64
import functools
import io
import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import QUICK, Command, contents, records, refusal, structvit
from PIL import Image
from scipy.special import softmax

from structvit_jax import data
from structvit_jax.analysis.contact_sheet import FRAME_GAP
from structvit_jax.analysis.report.charts import COLOURS, smoothed
from structvit_jax.analysis.report.predictions import Predictions
from structvit_jax.analysis.report.record import read_records
from structvit_jax.analysis.report.render import Thumbnails, write_report
from structvit_jax.config import default_config
from structvit_jax.data.digits import Digits, MovingDigits
from structvit_jax.training.losses import in_top
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import DecodeError

EVIL = '<b>&.mp4"><script>alert(1)</script>'


class Element(HTMLParser):
    """An element of a page; the parser itself is the whole page."""

    def __init__(self, tag="page", attributes=()):
        super().__init__()
        self.tag, self.attributes, self.inside = tag, dict(attributes), []
        self._open = [self]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs)
        self._open[-1].inside.append(element)
        if tag not in ("img", "meta", "wbr"):
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop().tag == tag

    def handle_data(self, data):
        self._open[-1].inside.append(data)

    @property
    def text(self):
        return "".join(part if isinstance(part, str) else part.text for part in self.inside)

    def all(self, tag=None, **wanted):
        """Yield the elements with a tag and attributes, in order."""
        for part in self.inside:
            if not isinstance(part, str):
                if tag in (None, part.tag) and wanted.items() <= part.attributes.items():
                    yield part
                yield from part.all(tag, **wanted)

    def one(self, tag=None, **wanted):
        (found,) = self.all(tag, **wanted)
        return found

    def rows(self):
        """Return the cells of a table as text."""
        return [[cell.text for cell in row.all() if cell.tag in ("td", "th")] for row in self.all("tr")]


def parse(path):
    page = Element()
    page.feed(path.read_text())
    assert page._open == [page]  # all elements are closed
    return page


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Return the workdir of a run like the finished one with another seed."""
    folder = tmp_path_factory.mktemp("other")
    process = Command(folder, *QUICK, "--config.train.seed=1", f"--workdir={folder / 'seed1'}").wait()
    assert process.returncode == 0, process.stderr
    return folder / "seed1"


@pytest.fixture(scope="module")
def pair(finished, other, tmp_path_factory):
    """Return the workdirs of two runs and the page about both."""
    out = tmp_path_factory.mktemp("pair") / "report.html"
    write_report([str(finished[0]), str(other)], str(out), hardest=5)
    return (finished[0], other), parse(out)


@pytest.fixture
def report(copy):
    """Return a function that writes the page of a copy of the finished run and parses it."""
    return lambda **options: parse(write_report([str(copy)], **options))


def predictions(workdir):
    with np.load(workdir / "predictions.npz") as arrays:
        return dict(arrays)


def change(workdir, **arrays):
    """Replace arrays of predictions.npz."""
    np.savez(workdir / "predictions.npz", **predictions(workdir) | arrays)


def change_config(workdir, section, **values):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    config[section] |= values
    path.write_text(json.dumps(config))


def confident_errors(arrays):
    """Return indices of wrong examples, highest probability first, and all probabilities."""
    probabilities = softmax(arrays["scores"].astype(float), axis=1)
    found = probabilities.argmax(axis=1)
    wrong = [i for i in range(len(found)) if found[i] != arrays["labels"][i]]
    return sorted(wrong, key=lambda i: -probabilities[i].max()), probabilities


def decoded(url):
    kind, _, content = url.removeprefix("data:").partition(";base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(content)))
    assert f"image/{picture.format.lower()}" == kind
    return np.asarray(picture)


# Contents of the page


def test_scores_side_by_side(pair, finished):
    workdirs, page = pair
    names, *rows = page.one("table", id="facts").rows()
    assert names == ["", "run", "seed1"]
    facts = {name: cells for name, *cells in rows}
    results = [json.loads((workdir / "result.json").read_text()) for workdir in workdirs]
    assert facts["top-1"] == [f"{result['top1']:.4f}" for result in results]
    assert facts["top-5"] == [f"{result['top5']:.4f}" for result in results]
    assert facts["mean accuracy over classes"] == [f"{result['mean_class']:.4f}" for result in results]
    assert (facts["step"], facts["test examples"]) == (["12"] * 2, ["20"] * 2)
    assert facts["parameters"] == re.findall(r"([\d,]+) parameters", finished[1]) * 2
    seconds = json.loads((workdirs[0] / "goodput.json").read_text())["seconds"]
    assert facts["goodput"][0] == f"{seconds['step'] / sum(seconds.values()):.0%}"
    assert facts["speed"][0] == f"{12 * 8 / (seconds['step'] + seconds['input']):.1f} clips/s"


def test_differences_between_configurations(pair):
    _, page = pair
    assert page.one("table", id="differences").rows() == [
        ["key", "run", "seed1"],
        ["config.train.seed", "0", "1"],
    ]


def test_time_of_each_activity(pair):
    (workdir, _), page = pair
    rows = {name: cells for name, *cells in page.one("table", id="seconds").rows()}
    seconds = json.loads((workdir / "goodput.json").read_text())["seconds"]
    total = sum(seconds.values())
    assert rows.keys() == {"", "all", *seconds}
    for name, spent in seconds.items():
        assert rows[name][0] == f"{spent:.1f} s, {spent / total:.0%}"
    assert rows["all"][0] == f"{total:.1f} s"


def test_classes_and_confusion_agree_with_numpy(pair):
    workdirs, page = pair
    for number, workdir in enumerate(workdirs):
        arrays, section = predictions(workdir), page.one("section", id=f"run-{number}")
        names, labels, found = arrays["class_names"], arrays["labels"], arrays["scores"].argmax(axis=1)
        head, *rows = section.one("table", **{"class": "matrix"}).rows()
        assert head[1:] == [name for name, *_ in rows] == list(names)
        counts = [[int(((labels == i) & (found == j)).sum()) for j in range(8)] for i in range(8)]
        assert [list(map(int, cells)) for _, *cells in rows] == counts

        _, *rows = section.one("table", **{"class": "classes"}).rows()
        assert {row[0] for row in rows} == set(names[np.unique(labels)])
        accuracies = []
        for name, accuracy, confused, examples, place in rows:
            own = labels == list(names).index(name)
            assert (int(examples), names[int(place)]) == (own.sum(), name)
            accuracies.append((found == labels)[own].mean())
            assert accuracy == f"{accuracies[-1]:.3f}"
            wrong = np.bincount(found[own & (found != labels)], minlength=8)
            most = f"{names[wrong.argmax()]}: {wrong.max()} of {own.sum()}"
            assert confused == (most if wrong.any() else "")
        assert accuracies == sorted(accuracies)


def test_errors_are_in_the_order_of_their_probabilities(pair):
    workdirs, page = pair
    for number, workdir in enumerate(workdirs):
        arrays = predictions(workdir)
        surest, probabilities = confident_errors(arrays)
        cards = list(page.one("section", id=f"run-{number}").one("ol").all("li"))
        assert len(cards) == 5 < len(surest)
        for card, i in zip(cards, surest, strict=False):
            assert card.one("code").text == arrays["ids"][i]
            found, label = probabilities[i].argmax(), arrays["labels"][i]
            classes = [element.text for element in card.all("dd")]
            assert classes[::2] == [arrays["class_names"][found], arrays["class_names"][label]]
            expected = [f"{probabilities[i, found]:.4f}", f"{probabilities[i, label]:.4f}"]
            assert classes[1::2] == expected


def test_thumbnails_are_the_pixels_of_their_examples(pair):
    """They show frames 0, 2, 4 and 7 of eight beside each other."""
    _, page = pair
    source, seen = MovingDigits("test", 20, seed=0), 0
    for card in page.all("li"):
        for image in card.all("img"):
            strip, seen = decoded(image.attributes["src"]), seen + 1
            assert strip.shape == (24, 4 * 24 + 3 * FRAME_GAP, 3)
            clip, _ = source.open(int(card.one("code").text.rpartition("/")[2]))
            for place, frame in enumerate((0, 2, 4, 7)):
                shown = strip[:, place * (24 + FRAME_GAP) :][:, :24]
                np.testing.assert_array_equal(shown, clip.frames(range(8))[frame])
    assert seen == 10


def test_curves_show_every_run(pair):
    workdirs, page = pair
    figures = list(page.one("section", id="curves").all("img"))
    assert len(figures) == 4
    for figure in figures:
        assert "run, seed1" in figure.attributes["alt"]
        svg = base64.b64decode(figure.attributes["src"].partition("base64,")[2]).decode()
        ElementTree.fromstring(svg)
        assert all(f"stroke: {colour}" in svg for colour in COLOURS[:2])
    for record, workdir in zip(read_records([str(workdir) for workdir in workdirs]), workdirs, strict=True):
        logged = [line for line in records(workdir) if "loss" in line]
        steps, losses = record.curve("loss")
        assert steps.tolist() == [line["step"] for line in logged] == list(range(1, 13))
        assert losses.tolist() == [line["loss"] for line in logged]
        assert record.curve("eval_top1")[0].tolist() == [6, 12]


def test_the_page_is_self_contained(pair):
    _, page = pair
    assert not list(page.all("script")) + list(page.all("link"))
    assert all(image.attributes["src"].startswith("data:") for image in page.all("img"))
    assert all(image.attributes["alt"] for image in page.all("img"))
    targets = {element.attributes.get("id") for element in page.all()}
    links = [link.attributes["href"] for link in page.all("a")]
    assert len(links) == 5 and {link.removeprefix("#") for link in links} <= targets
    policy = page.one("meta", **{"http-equiv": "Content-Security-Policy"}).attributes["content"]
    assert policy.startswith("default-src 'none'")


# Missing files


def test_an_unfinished_run(copy, report):
    for name in ("result.json", "predictions.npz", "goodput.json"):
        (copy / name).unlink()
    page = report()
    facts = {name: cells for name, *cells in page.one("table", id="facts").rows()}
    assert facts["top-1"] == ["not evaluated yet"] and facts["top-5"] == facts["speed"] == ["–"]
    assert facts["parameters"] != ["–"] and facts["step"] == ["12"]
    section = page.one("section", id="run-0")
    assert [note.text[:17] for note in section.all("p", **{"class": "note"})] == [
        "Not evaluated yet",
        "There is no predi",
        "There is no goodp",
    ]
    assert not list(section.all("table")) and len(list(page.all("img"))) == 4


def test_a_run_without_steps(copy, report):
    for path in contents(copy):
        if path.name != "config.json":
            path.unlink()
    page = report()
    assert "Not trained yet" in page.one("section", id="run-0").text
    assert not list(page.all("img"))


def test_scores_of_an_earlier_step(copy, report):
    with (copy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "loss": null, "top1": 0.5, "grad_norm": null, "lr": 0.1, "skipped": 1}\n')
    assert "The scores were computed at step 12; the run is at step 13." in report().text


def test_data_that_cannot_be_opened(copy, report):
    change_config(copy, "data", name="folder", root=str(copy / "moved"))
    page = report()
    section = page.one("section", id="run-0")
    assert not list(section.all("img"))
    assert "the data cannot be opened here" in section.text and str(copy / "moved") in section.text
    assert len(list(section.one("ol").all("li"))) == len(confident_errors(predictions(copy))[0])


def test_hostile_names_stay_text(copy, report):
    arrays = predictions(copy)
    ids, names = list(arrays["ids"]), list(arrays["class_names"])
    evil = confident_errors(arrays)[0][0]
    ids[evil], names[arrays["labels"][evil]] = EVIL, EVIL
    change(copy, ids=np.array(ids), class_names=np.array(names))
    renamed = copy.rename(copy.with_name("<b>$&"))
    page = parse(write_report([str(renamed)]))
    assert not list(page.all("b")) + list(page.all("script"))
    card = next(page.one("ol").all("li"))
    assert card.one("code").text == EVIL and EVIL in [element.text for element in card.all("dd")]
    assert "the example is no longer in the data set" in card.text
    assert EVIL in page.one("table", **{"class": "matrix"}).rows()[0]
    assert page.one("h1").text == "Report: <b>$&"


def test_many_classes(copy, report):
    """The lowest 20 and the highest 5 are shown, the rest is folded; the matrix is an image."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(40), 10).astype(np.int32)
    scores = rng.normal(size=(400, 40))
    scores[np.arange(400), labels] += labels / 8  # later classes are easier
    ids, names = np.array([f"{i}.mp4" for i in range(400)]), np.array([f"c{i}" for i in range(41)])
    scores = np.concatenate([scores, np.full((400, 1), -9.0)], axis=1)  # a class without examples
    change(copy, ids=ids, labels=labels, scores=scores, class_names=names)
    section = report(hardest=0).one("section", id="run-0")
    tables = [table.rows()[1:] for table in section.all("table", **{"class": "classes"})]
    assert [len(rows) for rows in tables] == [20, 15, 5]
    assert section.one("details").one("table").rows()[1:] == tables[1]
    shown = {row[0]: row[1] for rows in tables for row in rows}
    right = (scores.argmax(axis=1) == labels).reshape(40, 10).mean(axis=1)
    assert shown == {f"c{i}": f"{right[i]:.3f}" for i in range(40)}
    accuracies = [float(row[1]) for rows in tables for row in rows]
    assert accuracies == sorted(accuracies)
    assert "1 of 41 classes have no examples" in section.text
    assert decoded(section.one("figure", **{"class": "matrix"}).one("img").attributes["src"]).ndim == 3
    assert not list(section.all("table", **{"class": "matrix"})) + list(section.all("ol"))


def test_unreadable_examples_do_not_count(copy, report):
    arrays = predictions(copy)
    arrays["labels"][:3] = -1
    change(copy, labels=arrays["labels"])
    rows = report().one("table", **{"class": "matrix"}).rows()[1:]
    assert sum(int(count) for _, *counts in rows for count in counts) == 17


# Parts


def test_accuracy_is_that_of_an_evaluation():
    """Of equal scores the first is predicted, and none with NaN."""
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 3, (200, 4)).astype(np.float32)
    scores[::7, 2] = np.nan
    labels = rng.integers(0, 4, 200)
    found = Predictions(np.arange(200), labels, scores, tuple("abcd"))
    np.testing.assert_array_equal(found.predicted == labels, in_top(scores, labels, 1))
    assert found.confusion().sum() == 200 - len(scores[::7])
    assert sum(score.right for score in found.by_class()) == (found.predicted == labels).sum()


def test_averaged_probabilities_are_used_as_they_are():
    scores = np.array([[0.7, 0.3], [0.9, 0.1], [0.2, 0.8]])
    found = Predictions(np.arange(3), np.array([1, 1, 1]), scores, ("a", "b"))
    errors = [(i, p.tolist()) for i, p in found.confident_errors(9, "softmax")]
    assert errors == [(1, [0.9, 0.1]), (0, [0.7, 0.3])]


def test_smoothed_is_a_centred_mean():
    values = np.random.default_rng(0).normal(size=230)
    expected = [values[max(i - 4, 0) : i + 5].mean() for i in range(230)]  # 2 % are four to either side
    np.testing.assert_allclose(smoothed(values), expected)
    assert smoothed(np.array([3.0])).tolist() == [3.0]


def test_thumbnails_of_images_are_rgb():
    config = default_config()
    config.data.name, config.data.frames, config.data.size = "digits", 0, 32
    picture = Digits("test", 0, 0).open(5)[0].frames([0])[0]
    np.testing.assert_array_equal(Thumbnails(config).pixels("digits/test/5"), picture)
    config.data.name, config.data.channels = "noise:3", "bgr"
    config.data.test_examples = config.data.train_examples = 4
    thumbnails = Thumbnails(config)
    seen = data.load(config.data, config.augment).test.test(1)["inputs"][0]
    np.testing.assert_array_equal(thumbnails.pixels("noise/test/1"), seen[..., ::-1])
    with pytest.raises(DecodeError):
        thumbnails.pixels("noise/test/4")


def test_thumbnails_show_the_middle_view(monkeypatch):
    """Views are ordered by clip, then by crop; the middle is the second crop of the second clip."""
    config = default_config()
    config.data.test_clips, config.data.test_crops = 2, 3
    config.data.train_examples = config.data.test_examples = 8
    thumbnails = Thumbnails(config)
    views = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None, None, None], (6, 8, 24, 24, 3))
    monkeypatch.setattr(thumbnails._data.test, "test", lambda index: {"inputs": views})
    assert np.unique(thumbnails.pixels("moving_digits/test/2")).tolist() == [4, 255]


def test_large_thumbnails_shrink():
    config = default_config()
    config.data.name, config.data.size, config.data.frames = "noise:3", 224, 0
    config.data.test_examples = config.data.train_examples = 1
    thumbnail = Thumbnails(config).image("noise/test/0")
    assert decoded(thumbnail.url).shape == (112, 112, 3) and len(thumbnail.url) < 30_000


# Paths and errors


def test_runs_on_a_disk_and_in_a_bucket(finished, place):
    for name in ("config.json", "metrics.jsonl", "result.json", "predictions.npz"):
        (place / name).write_bytes((finished[0] / name).read_bytes())
    assert write_report([str(place)], hardest=1) == place / "report.html"
    assert [run.text for run in parse(place / "report.html").all("h1")] == [f"Report: {place.name}"]


@pytest.mark.parametrize(
    ("path", "content", "phrase"),
    [
        ("config.json", None, "is not the --workdir of a run: there is no config.json"),
        ("config.json", "{", "config.json is damaged: it contains no JSON object"),
        (
            "config.json",
            '{"data": {"size": "large"}}',
            "config.json is not valid: config.data.size cannot be 'large'",
        ),
        ("result.json", "[1]", "result.json is damaged"),
        ("predictions.npz", "PK", "predictions.npz is damaged: "),
        ("metrics.jsonl", '{"step": 1}\n{"step": 2, "lo', "metrics.jsonl:2 is damaged"),
        ("metrics.jsonl", '{"step": 1}\n\n{"loss": 2}', "metrics.jsonl:2 is damaged"),
        ("metrics.jsonl", '{"step": 1, "loss": "low"}', "metrics.jsonl:1 is damaged"),
    ],
)
def test_damaged_files_are_named(copy, path, content, phrase):
    if content is None:
        (copy / path).unlink()
    else:
        (copy / path).write_text(content)
    with pytest.raises(UserError) as mistake:
        write_report([str(copy)])
    assert str(copy) in str(mistake.value) and phrase in str(mistake.value)
    assert "\n" not in str(mistake.value) and not (copy / "report.html").exists()


@pytest.mark.parametrize("arrays", [{"labels": np.zeros(3, int)}, {"labels": np.full(20, 8)}, {"ids": None}])
def test_predictions_that_do_not_fit_together(copy, arrays):
    change(copy, **arrays)
    with pytest.raises(UserError, match=r"predictions\.npz is damaged"):
        write_report([str(copy)])


def test_unusable_paths(copy):
    with pytest.raises(UserError, match=r"no folder at .*nowhere"):
        write_report([str(copy), str(copy / "nowhere")])
    with pytest.raises(UserError, match=r"checkpoints is a folder and is not replaced"):
        write_report([str(copy)], str(copy / "checkpoints"))
    with pytest.raises(UserError, match=r"cannot be written: .*choose another path"):
        write_report([str(copy)], str(copy / "config.json" / "page.html"))


def test_the_command(command, copy, tmp_path, capsys):
    run = functools.partial(command, program="report")
    out = tmp_path / "new" / "page.html"
    process = run(copy, f"--out={out}", "--hardest=2")
    assert (process.returncode, process.stdout) == (0, f"{out}\n"), process.stderr
    assert len(list(parse(out).one("ol").all("li"))) == 2
    assert "'WORKDIR...'" in refusal(run("--hardest=2"))
    assert structvit("report", "--help") == 0 and "default: 24" in capsys.readouterr().out
