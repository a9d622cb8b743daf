"""Ablations: paired statistics, selection on validation clips only, a resumable grid, correct tables."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from PIL import Image
from scipy import stats

from structvit_jax.analysis.ablate import ablation, results
from structvit_jax.analysis.ablate.ablation import Ablation
from structvit_jax.analysis.ablate.results import Outcome, RunResult, compare
from structvit_jax.analysis.ablate.study import Arm, Study, parse_arms
from structvit_jax.config import default_config, durations, keys_of
from structvit_jax.data.digits import DigitMotions, MovingDigits
from structvit_jax.runtime.storage import write_json
from structvit_jax.training.card import MACHINE, as_json
from structvit_jax.utils.errors import UserError

STUDY = Study(
    arms=("plain: model.name=deit_tiny_video", "D = 2: model.name=deit_tiny_struct_2_video"),
    lrs=(1e-3, 1e-2),
    tune_seeds=1,
    seeds=2,
)
SAME_TIME = STUDY._replace(same_time="D = 2")


def config():
    config = default_config()
    config.model.name, config.model.widths = "deit_tiny_video", (16,)
    config.data.batch_size, config.eval.batch_size = 8, 24
    config.data.train_examples, config.data.test_examples = 40, 24
    config.data.name, config.train.duration = "digit_motions", "3 steps"
    return config


def test_intervals_are_those_of_the_formula():
    rng = np.random.default_rng(0)
    values, base = rng.uniform(size=(2, 6))
    differences = values - base
    result = compare(values, base)
    reach = stats.t.ppf(0.975, 5) * differences.std(ddof=1) / np.sqrt(6)
    mean = differences.mean()
    np.testing.assert_allclose(result, (mean, mean - reach, mean + reach))
    assert compare([0.5, 0.52, 0.51], [0.4, 0.41, 0.42]).is_clear
    assert not compare([0.5, 0.3], [0.4, 0.45]).is_clear
    np.testing.assert_allclose(compare([0.5, 0.6], [0.4, 0.5]), [0.1] * 3)  # equal differences
    assert compare([0.5, 0.6], [0.5, 0.6]) == (0, 0, 0)
    assert np.isnan(compare([0.5], [0.4]).low)


def test_one_interval_in_twenty_excludes_zero_by_chance():
    rng = np.random.default_rng(1)
    clear = [compare(*rng.normal(size=(2, 5))).is_clear for _ in range(4000)]
    assert np.mean(clear) == pytest.approx(0.05, abs=0.012)


def fake_train(config, workdir, dataset):
    """Replace `loop.train`: write the files of a run with a score that depends on its configuration."""
    rng = np.random.default_rng([config.train.seed, len(config.model.name), round(1e4 * config.optimizer.lr)])
    result = {"top1": rng.uniform(), "top5": 1.0, "mean_class": 0.5, "examples": 24, "missing": 0}
    total = durations(config, dataset.rows_per_epoch).total
    workdir.mkdir(parents=True)
    write_json(workdir / "config.json", as_json(config))
    write_json(
        workdir / "goodput.json", {"seconds": {"step": 1800.0, "input": 180.0}, "at_save": {}, "sessions": 1}
    )
    write_json(workdir / "result.json", result | {"step": total, "params_sha256": "0" * 64})
    return result


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """Return the workdir of an ablation of fake runs, its outcomes, and the scored ids by split."""
    workdir, scored = epath.Path(tmp_path), {}

    def recording(config, workdir, dataset):
        scored.setdefault(config.data.test_split, set()).update(dataset.test_ids)
        return fake_train(config, workdir, dataset)

    monkeypatch.setattr(ablation.loop, "train", recording)
    write_json(workdir / "times.json", {"plain": 0.5, "D = 2": 2.0})
    return workdir, Ablation(config(), SAME_TIME, workdir).run("--config=x"), scored


def test_results_are_those_of_the_runs(tmp_path):
    workdir = epath.Path(tmp_path)
    shallow = config()
    shallow.model.depths = (1,)
    found = Ablation(shallow, STUDY._replace(lrs=(), seeds=1), workdir).run("--config=x")
    for one in found:
        (run,) = one.steps
        result = json.loads((workdir / one.arm.folder / "steps" / "seed=0" / "result.json").read_text())
        assert (run.top1, run.steps, run.lr) == (result["top1"], 3, 1e-3) and run.took > 0
        assert result["examples"] == 24 and not one.tried
    text = (workdir / "ablation.md").read_text()
    assert text.count("| 3 | 0.001 |") == 2 and "selected" not in text  # there is one rate
    times = json.loads((workdir / "times.json").read_text())
    assert [one.seconds for one in found] == list(times.values()) and min(times.values()) > 1e-5


def test_every_arm_gets_its_seeds_and_its_learning_rate(outcome):
    _, found, scored = outcome
    assert [one.arm.name for one in found] == ["plain", "D = 2"]
    for one in found:
        assert [run.seed for run in one.steps] == [0, 1] and {run.steps for run in one.steps} == {3}
        assert {(run.lr, run.seed) for run in one.tried} == {(1e-3, 1000), (1e-2, 1000)}
        best = max(one.tried, key=lambda run: run.top1)
        assert next(run.top1 for run in one.tried if run.lr == one.lr) == best.top1
        assert {run.lr for run in one.steps} == {one.lr}
    plain, struct = found
    assert struct.time == struct.steps and struct.params > plain.params
    assert (plain.seconds, struct.seconds) == (0.5, 2.0) and {run.steps for run in plain.time} == {12}
    assert {name.split("/")[1] for name in scored["tune"]} == {"tune"}
    assert {name.split("/")[1] for name in scored["val"]} == {"test"}


def test_tables_have_the_results_of_the_runs(outcome):
    workdir, found, _ = outcome
    text = (workdir / "ablation.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    head, _, plain, struct, *timed, rates, _, tuned, _ = rows
    assert len(timed) == 4 and head[:4] == ["arm", "top-1", "seeds", "difference from plain"]
    assert rates == ["arm", "0.001", "0.01"] and tuned[0] == "plain"
    for cell, run in zip(tuned[1:], found[0].tried, strict=True):
        assert cell == (f"**{run.top1:.3f}**" if run.lr == found[0].lr else f"{run.top1:.3f}")
    for row, one in zip((plain, struct), found, strict=True):
        top1 = [run.top1 for run in one.steps]
        assert row[1] == f"{np.mean(top1):.3f} ± {np.std(top1, ddof=1):.3f}"
        assert row[-2:] == [f"{one.params:,}", f"{one.macs:,}"]
    assert plain[3] == ""
    difference = np.mean([a.top1 - b.top1 for a, b in zip(found[1].steps, found[0].steps, strict=True)])
    assert re.match(rf"\**{difference:+.3f} \[".replace("+", r"\+"), struct[3])
    written = json.loads((workdir / "ablation.json").read_text())
    assert [run["top1"] for run in written["arms"][1]["steps"]] == [run.top1 for run in found[1].steps]
    assert "; 10 runs, 5.5 hours." in text and written["arms"][0]["tried"][0]["took"] == 1980
    assert Image.open(workdir / "ablation.png").width > 300


def test_complete_runs_are_not_trained_again(outcome, monkeypatch):
    workdir, found, _ = outcome
    trained = []

    def train(config, path, dataset):
        trained.append(path)
        return fake_train(config, path, dataset)

    monkeypatch.setattr(ablation.loop, "train", train)
    assert Ablation(config(), SAME_TIME, workdir).run("--config=x") == found
    assert not trained
    gone = workdir / "D_=_2" / "steps" / "seed=1"
    gone.rmtree()
    assert Ablation(config(), SAME_TIME, workdir).run("--config=x") == found
    assert trained == [gone]


def test_equal_times_within_noise_need_no_further_runs(tmp_path, monkeypatch):
    workdir, longer, options = epath.Path(tmp_path), config(), SAME_TIME._replace(lrs=())
    longer.train.duration = "100 steps"
    monkeypatch.setattr(ablation.loop, "train", fake_train)
    write_json(workdir / "times.json", {"plain": 0.5, "D = 2": 0.52})
    assert all(one.time is one.steps for one in Ablation(longer, options, workdir).run(""))
    write_json(workdir / "times.json", {"plain": 0.5, "D = 2": 0.54})
    plain, _ = Ablation(longer, options, workdir).run("")
    assert {run.steps for run in plain.time} == {108}


def test_arms_with_other_batches_have_other_steps(tmp_path, monkeypatch):
    """The duration is in epochs: an arm with half the batch size takes twice the steps."""
    epochs, arms = config(), ("whole: data.batch_size=8", "half: data.batch_size=4")
    epochs.train.duration = "1 epochs"
    trained = []
    monkeypatch.setattr(ablation.loop, "train", lambda *run: trained.append(run) or fake_train(*run))
    workdir = epath.Path(tmp_path)
    write_json(workdir / "times.json", {"whole": 0.5, "half": 0.5})
    for _ in range(2):
        whole, half = Ablation(epochs, Study(arms, seeds=1), workdir).run("")
        assert (whole.steps[0].steps, half.steps[0].steps) == (5, 10)
    assert len(trained) == 2  # a complete run is not trained again


def test_another_ablation_is_refused(outcome):
    workdir, _, _ = outcome
    other = config()
    other.optimizer.weight_decay = 0.5
    message = r"another ablation: it has config.optimizer.weight_decay=0\.05, and this one has 0\.5"
    with pytest.raises(UserError, match=message):
        Ablation(other, STUDY, workdir).run("")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"arms": ()}, "at least two arms"),
        ({"arms": ("a", "b: model.name=x")}, "'a' should be 'NAME: key=value key=value'"),
        ({"arms": ("a: model.patch=", "b: model.patch=4")}, "'a: model.patch=' should be"),
        ({"arms": ("a: model.patch=8", "a: model.patch=4")}, "names of arms should differ"),
        ({"arms": ("a: modle.patch=8", "b: model.patch=4")}, "Did you mean 'model'"),
        ({"arms": ("a: model.ptch=1", "b: model.patch=4")}, "Did you mean 'patch'"),
        ({"arms": ("a: model.patch=x", "b: model.patch=4")}, "patch is 'x'; it takes a positive integer"),
        ({"arms": ("a: train.seed=-1", "b: model.patch=4")}, "config.train.seed is -1"),
        ({"against": "D = 3"}, "Did you mean 'D = 2'"),
    ],
)
def test_invalid_studies_are_refused_before_training(changes, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        Ablation(config(), STUDY._replace(**changes), epath.Path("nowhere"))


def test_the_command_suggests_names(refused):
    assert "--config=" in refused(program="ablate")
    line = refused("--config=configs/ablate_digit.py", program="ablate")
    assert "Did you mean" in line and "ablate_digits" in line
    assert "--seeds" in refused("--config=ablate_digits", "--seds=3", program="ablate")


def default_study():
    from configs import ablate_digits

    return ablate_digits.get_config(), Study(**ablate_digits.STUDY)


def test_the_default_grid():
    names = [arm.name for arm in parse_arms(*default_study())]
    assert {"plain attention", "ConvSA", "D = 4"} <= set(names)


def published(name):
    """Return the settings, the study and the outcomes in a file of docs/."""
    written = json.loads((ROOT / "docs" / name).read_text())
    return (
        written["settings"],
        Study(**written["study"]),
        [
            Outcome(
                Arm(arm["arm"], arm["changes"]),
                *(arm[key] for key in ("params", "macs", "seconds", "lr")),
                *([RunResult(**run) for run in arm[kind]] for kind in ("tried", "steps", "time")),
            )
            for arm in written["arms"]
        ],
    )


@pytest.mark.parametrize(
    ("name", "tables"), [("ablate_digits.json", 3), ("ablate_digits_2400_steps.json", 1)]
)
def test_published_tables_have_the_results_of_published_runs(name, tables):
    _, options, outcomes = published(name)
    _, *found = results.to_markdown(outcomes, options.against, options.same_time, [""]).split("###")
    assert len(found) == tables
    text = (ROOT / "docs" / "ablations.md").read_text()
    for table in found:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) == len(outcomes) + 2 and "\n".join(rows) in text


def test_published_differences_beside_those_of_the_paper():
    _, _, outcomes = published("ablate_digits.json")
    top1 = {outcome.arm.name: [run.top1 for run in outcome.steps] for outcome in outcomes}
    text = (ROOT / "docs" / "ablations.md").read_text()
    rows = re.findall(r"^\| (.+) minus (.+) \| [-+]\d\.\d \| \**([^*|]+?)\** \| .+ \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for ours, theirs, written in rows:
        found = compare(top1[ours], top1[theirs])
        assert written == f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def test_published_runs_are_of_the_default_grid():
    """Arms, model sizes, learning rates, seeds and configuration have not changed since."""
    config, default = default_study()
    settings, options, outcomes = published("ablate_digits.json")
    assert options._asdict() == json.loads(json.dumps(default._asdict()))
    then, now = dict(keys_of(settings)), dict(keys_of(as_json(config)))
    shared = (then.keys() & now.keys()) - set(MACHINE)  # keys may have been renamed or removed
    assert len(shared) > 60 and {key: then[key] for key in shared} == {key: now[key] for key in shared}
    found = Ablation(config, default, epath.Path("nowhere"))
    assert [outcome.arm for outcome in outcomes] == found.arms
    for outcome in outcomes:
        size = found.size(outcome.arm)
        assert (outcome.params, outcome.macs) == (size.params, size.macs)
        scores = {rate: [run.top1 for run in outcome.tried if run.lr == rate] for rate in default.lrs}
        assert {len(top1) for top1 in scores.values()} == {default.tune_seeds}
        assert outcome.lr == max(scores, key=lambda rate: np.mean(scores[rate]))
        assert [run.seed for run in outcome.steps] == list(range(default.seeds))


def test_motions_come_in_time_reversed_pairs():
    source = DigitMotions("train", 1000, seed=0)
    clips, labels = zip(*map(source.open, range(20)), strict=True)
    assert labels == (*range(10), *range(10))
    first, again = (DigitMotions("train", 1000, seed=0).open(8)[0].frames(range(8)) for _ in range(2))
    assert (first == again).all() and first.shape == (8, 24, 24, 3)
    assert (first != clips[18].frames(range(8))).any()

    sprite = source._draw(np.random.default_rng(0))
    square, turned = (source._turned(sprite, degrees) for degrees in (0.0, 90.0))
    np.testing.assert_allclose(turned, np.rot90(square), atol=1e-5)  # counterclockwise
    left, right = (_angles(label) for label in (8, 9))
    assert (left > 0).all() and (right < 0).all()


def _angles(label):
    """Return by how much the direction of the brightest part turns from frame to frame."""
    source = DigitMotions("train", 10, seed=0)
    seen = []
    source._placed = lambda pictures, corners: seen.append(pictures) or pictures
    source._moving(np.random.default_rng(3), label)
    y, x = np.mgrid[8.5:-9.5:-1, -8.5:9.5]
    centres = [complex((p * x).sum(), (p * y).sum()) for p in seen[0]]
    return np.angle(np.divide(centres[1:], centres[:-1]))


def test_validation_clips_show_training_sprites():
    train, test, tune = (MovingDigits(split, 8, seed=0) for split in ("train", "test", "tune"))
    assert len(tune._sprites) == len(train._sprites) == 1437 and len(test._sprites) == 360
    pixels = [source.open(0)[0].frames(range(8)) for source in (train, test, tune)]
    assert (pixels[2] != pixels[0]).any() and (pixels[2] != pixels[1]).any()
    assert (MovingDigits("tune", 8, seed=5).open(0)[0].frames(range(8)) == pixels[2]).all()
