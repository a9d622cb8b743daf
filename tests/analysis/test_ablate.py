"""Ablations: textbook statistics, nothing chosen on test clips, a grid that resumes, right tables."""

import json
import re

import numpy as np
import pytest
from conftest import ROOT
from etils import epath
from PIL import Image
from scipy import stats

from structvit_jax.analysis.ablate import arms, compare, grid, results, study, summarize
from structvit_jax.config import default_config, durations
from structvit_jax.data.digits import DigitMotions, MovingDigits
from structvit_jax.runtime.storage import write_json
from structvit_jax.training.card import as_json
from structvit_jax.utils.errors import UserError


def config(**changes):
    config = default_config()
    config.model.name, config.model.widths = "deit_tiny_video", (16,)
    config.data.batch_size, config.eval.batch_size = 8, 24
    config.data.train_examples, config.data.test_examples = 40, 24
    config.data.name, config.train.duration = "digit_motions", "3 steps"
    config.ablate.arms = (
        "plain: model.name=deit_tiny_video",
        "D = 2: model.name=deit_tiny_struct_2_video",
    )
    config.ablate.lrs, config.ablate.tune_seeds, config.ablate.seeds = (1e-3, 1e-2), 1, 2
    for key, value in changes.items():
        config.ablate[key] = value
    return config


def test_statistics():
    rng = np.random.default_rng(0)
    ours, theirs = rng.uniform(size=(2, 6))
    summary, found = summarize(ours), compare(ours, theirs)
    assert summary == (ours.mean(), pytest.approx(np.sqrt(((ours - ours.mean()) ** 2).sum() / 5)), 6)
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.difference == pytest.approx((ours - theirs).mean())
    np.testing.assert_allclose([found.low, found.high], [interval.low, interval.high])
    assert compare([0.5, 0.52, 0.51], [0.4, 0.41, 0.42]).clear
    assert not compare([0.5, 0.3], [0.4, 0.45]).clear
    assert np.isnan(compare([0.5], [0.4]).low) and np.isnan(summarize([0.5]).deviation)


def test_intervals_hold_what_they_promise():
    """Of many experiments with no difference, one in twenty finds one."""
    rng = np.random.default_rng(1)
    clear = [compare(*rng.normal(size=(2, 5))).clear for _ in range(4000)]
    assert np.mean(clear) == pytest.approx(0.05, abs=0.012)


def pretend(config, workdir, dataset):
    """In the place of `loop.train`: files as of a run, with a score made up from its settings."""
    rng = np.random.default_rng([config.train.seed, len(config.model.name), round(1e4 * config.optimizer.lr)])
    result = {"top1": rng.uniform(), "top5": 1.0, "mean_class": 0.5, "examples": 24, "missing": 0}
    total = durations(config, dataset.rows_per_epoch).total
    workdir.mkdir(parents=True)
    write_json(workdir / "config.json", as_json(config))
    write_json(workdir / "goodput.json", {"seconds": {"step": 1800.0, "input": 180.0}})
    write_json(workdir / "result.json", result | {"step": total, "params_sha256": "0" * 64})
    return result


@pytest.fixture
def outcome(tmp_path, monkeypatch):
    """The workdir of an ablation of pretended runs, its outcomes, and ids of what was scored, by split."""
    workdir, scored = epath.Path(tmp_path), {}

    def noting(config, workdir, dataset):
        scored.setdefault(config.data.test_split, set()).update(dataset.test_ids)
        return pretend(config, workdir, dataset)

    monkeypatch.setattr(grid.loop, "train", noting)
    write_json(workdir / "times.json", {"plain": 0.5, "D = 2": 2.0})
    return workdir, study.run(config(same_time="D = 2"), workdir, "--config=x"), scored


def test_real_runs(tmp_path):
    """Their scores are those of their own evaluation."""
    workdir = epath.Path(tmp_path)
    shallow = config(lrs=(), seeds=1)
    shallow.model.depths = (1,)
    found = study.run(shallow, workdir, "--config=x")
    for one in found:
        (run,) = one.steps
        result = json.loads((workdir / one.arm.folder / "steps" / "seed=0" / "result.json").read_text())
        assert (run.top1, run.steps, run.lr) == (result["top1"], 3, 1e-3) and run.took > 0
        assert result["examples"] == 24 and not one.tried
    text = (workdir / "ablation.md").read_text()
    assert text.count("| 3 | 0.001 |") == 2 and "chosen" not in text  # from one rate nothing is
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
    assert struct.time == struct.steps and struct.size.params > plain.size.params
    assert (plain.seconds, struct.seconds) == (0.5, 2.0) and {run.steps for run in plain.time} == {12}
    assert {name.split("/")[1] for name in scored["tune"]} == {"tune"}
    assert {name.split("/")[1] for name in scored["val"]} == {"test"}


def test_the_table_says_what_the_runs_say(outcome):
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
        assert row[-2:] == [f"{one.size.params:,}", f"{one.size.macs:,}"]
    assert plain[3] == ""
    difference = np.mean([a.top1 - b.top1 for a, b in zip(found[1].steps, found[0].steps, strict=True)])
    assert re.match(rf"\**{difference:+.3f} \[".replace("+", r"\+"), struct[3])
    told = json.loads((workdir / "ablation.json").read_text())
    assert [run["top1"] for run in told["arms"][1]["steps"]] == [run.top1 for run in found[1].steps]
    assert "; 10 runs, 5.5 hours." in text and told["arms"][0]["tried"][0]["took"] == 1980
    assert Image.open(workdir / "ablation.png").width > 300


def test_it_goes_on_where_it_was(outcome, monkeypatch):
    workdir, found, _ = outcome
    trained = []

    def train(config, path, dataset):
        trained.append(path)
        return pretend(config, path, dataset)

    monkeypatch.setattr(grid.loop, "train", train)
    assert study.run(config(same_time="D = 2"), workdir, "--config=x") == found
    assert not trained
    gone = workdir / "D_=_2" / "steps" / "seed=1"
    gone.rmtree()
    assert study.run(config(same_time="D = 2"), workdir, "--config=x") == found
    assert trained == [gone]


def test_times_too_alike_to_tell_apart_take_no_further_runs(tmp_path, monkeypatch):
    workdir, longer = epath.Path(tmp_path), config(same_time="D = 2", lrs=())
    longer.train.duration = "100 steps"
    monkeypatch.setattr(grid.loop, "train", pretend)
    write_json(workdir / "times.json", {"plain": 0.5, "D = 2": 0.52})
    assert all(one.time is one.steps for one in study.run(longer, workdir, ""))
    write_json(workdir / "times.json", {"plain": 0.5, "D = 2": 0.54})
    plain, _ = study.run(longer, workdir, "")
    assert {run.steps for run in plain.time} == {108}


def test_another_ablation_is_refused(outcome):
    workdir, _, _ = outcome
    other = config()
    other.optimizer.weight_decay = 0.5
    with pytest.raises(UserError, match=r"is of another ablation: config.optimizer.weight_decay is now 0\.5"):
        study.run(other, workdir, "")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"arms": ()}, "two arms at least"),
        ({"arms": ("a", "b: model.name=x")}, "'a' should be 'NAME: key=value key=value'"),
        ({"arms": ("a: model.patch=", "b: model.patch=4")}, "'a: model.patch=' should be"),
        ({"arms": ("a: model.patch=8", "a: model.patch=4")}, "names should differ"),
        ({"arms": ("a: modle.patch=8", "b: model.patch=4")}, "Did you mean 'model'"),
        ({"arms": ("a: model.ptch=1", "b: model.patch=4")}, "Did you mean 'patch'"),
        ({"arms": ("a: model.patch=x", "b: model.patch=4")}, "patch is 'x'; it takes a positive integer"),
        ({"arms": ("a: train.seed=-1", "b: model.patch=4")}, "config.train.seed is -1"),
        ({"against": "D = 3"}, "Did you mean 'D = 2'"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(changes, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        arms(config(**changes))


def test_the_command_needs_a_configuration(command):
    module = {"program": "ablate"}
    assert "say which configuration" in command(**module).stderr
    done = command("--config=configs/ablate_digit.py", **module)
    assert "Did you mean 'configs/ablate_digits.py'" in done.stderr
    done = command("--config=configs/ablate_digits.py", "--config.ablate.seds=3", **module)
    assert done.returncode == 2 and "Did you mean config.ablate.seeds" in done.stderr


def test_the_default_grid():
    from configs import ablate_digits

    names = [arm.name for arm in arms(ablate_digits.get_config())]
    assert {"plain attention", "ConvSA", "D = 4"} <= set(names)


def published(name):
    """A file of docs/ as settings and outcomes."""
    told = json.loads((ROOT / "docs" / name).read_text())
    return told["settings"], [
        results.Outcome(
            grid.Arm(arm["arm"], arm["changes"]),
            grid.Size(arm["params"], arm["macs"]),
            arm["seconds"],
            arm["lr"],
            *([grid.RunResult(**run) for run in arm[kind]] for kind in ("tried", "steps", "time")),
        )
        for arm in told["arms"]
    ]


@pytest.mark.parametrize(
    ("name", "tables"), [("ablate_digits.json", 3), ("ablate_digits_2400_steps.json", 1)]
)
def test_the_published_tables_are_those_of_the_published_runs(name, tables):
    settings, outcomes = published(name)
    against, same_time = settings["ablate"]["against"], settings["ablate"]["same_time"]
    _, *found = results.document(outcomes, against, same_time, [""]).split("###")
    assert len(found) == tables
    text = (ROOT / "docs" / "ABLATIONS.md").read_text()
    for table in found:
        rows = [line for line in table.splitlines() if line.startswith("|")]
        assert len(rows) == len(outcomes) + 2 and "\n".join(rows) in text


def test_the_published_comparison_with_the_paper():
    """Its column of what was found here: differences between two arms after as many steps."""
    _, outcomes = published("ablate_digits.json")
    top1 = {outcome.arm.name: [run.top1 for run in outcome.steps] for outcome in outcomes}
    text = (ROOT / "docs" / "ABLATIONS.md").read_text()
    rows = re.findall(r"^\| (.+), less (.+) \| [-+]\d\.\d \| \**([^*|]+?)\** \| .+ \|$", text, re.MULTILINE)
    assert len(rows) == 8
    for ours, theirs, told in rows:
        found = compare(top1[ours], top1[theirs])
        assert told == f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def test_the_published_runs_are_of_the_default_grid():
    """As it is now: arms, sizes of their models, learning rates, seeds, and the best of the rates."""
    from configs import ablate_digits

    config = ablate_digits.get_config()
    settings, outcomes = published("ablate_digits.json")
    now = as_json(config)
    for section in ("ablate", "data", "model", "optimizer", "train"):
        assert settings[section] == {key: now[section].get(key) for key in settings[section]}
    ablation = grid.Ablation(config, epath.Path("nowhere"))
    assert [outcome.arm for outcome in outcomes] == ablation.arms
    for outcome in outcomes:
        assert outcome.size == ablation.size(outcome.arm)
        scores = {rate: [run.top1 for run in outcome.tried if run.lr == rate] for rate in config.ablate.lrs}
        assert {len(top1) for top1 in scores.values()} == {config.ablate.tune_seeds}
        assert outcome.lr == max(scores, key=lambda rate: np.mean(scores[rate]))
        assert [run.seed for run in outcome.steps] == list(range(config.ablate.seeds))


def test_clips_that_turn_or_drift():
    """Classes in time-reversed pairs: of clips without noise, one reversed is one of the opposite class."""
    source = DigitMotions("train", 1000, seed=0)
    clips, labels = zip(*map(source.open, range(20)), strict=True)
    assert labels == (*range(10), *range(10))
    first, again = (DigitMotions("train", 1000, seed=0).open(8)[0].frames(range(8)) for _ in range(2))
    assert (first == again).all() and first.shape == (8, 24, 24, 3)
    assert (first != clips[18].frames(range(8))).any()

    square, turned = (source._turned(source._scans[0], degrees) for degrees in (0.0, 90.0))
    np.testing.assert_allclose(turned, np.rot90(square), atol=1e-5)  # counterclockwise
    left, right = (_angles(label) for label in (8, 9))
    assert (left > 0).all() and (right < 0).all()


def _angles(label):
    """How far a digit turns from frame to frame: the angle of its brightness about the middle."""
    source = DigitMotions("train", 10, seed=0)
    seen = []
    source._placed = lambda pictures, corners: seen.append(pictures) or pictures
    source._turned_any_way(np.random.default_rng(3), label)
    y, x = np.mgrid[8.5:-9.5:-1, -8.5:9.5]
    centres = [complex((p * x).sum(), (p * y).sum()) for p in seen[0]]
    return np.angle(np.divide(centres[1:], centres[:-1]))


def test_clips_to_tune_on_show_scans_for_training():
    train, test, tune = (MovingDigits(split, 8, seed=0) for split in ("train", "test", "tune"))
    assert len(tune._scans) == len(train._scans) == 1437 and len(test._scans) == 360
    pixels = [source.open(0)[0].frames(range(8)) for source in (train, test, tune)]
    assert (pixels[2] != pixels[0]).any() and (pixels[2] != pixels[1]).any()
    assert (MovingDigits("tune", 8, seed=5).open(0)[0].frames(range(8)) == pixels[2]).all()
