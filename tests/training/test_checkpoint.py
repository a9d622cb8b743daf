"""Checkpoints: digests, retention, restoring on other devices, and reading during training."""

import math
import os
import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import QUICK, contents, records, same_as
from etils import epath

from structvit_jax.config import default_config
from structvit_jax.models.weights import Weights
from structvit_jax.runtime import digests, mesh
from structvit_jax.runtime.lock import WorkdirLock
from structvit_jax.training import checkpoint, optim, restore
from structvit_jax.training.checkpoint import Checkpoints, RetentionPolicy
from structvit_jax.training.step import init_state
from structvit_jax.utils.errors import Stopped, UserError


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


DAMAGES = {"flipped": flip, "truncated": truncate, "removed": os.unlink}


def test_every_damage_to_every_file_is_found(copy):
    folder = epath.Path(copy / "checkpoints" / "12")
    files = {path: path.read_bytes() for path in (copy / "checkpoints" / "12").rglob("*") if path.is_file()}
    assert len(files) > 10 and digests.find_damage(folder) == ""
    for path, content in files.items():
        for kind, damage in DAMAGES.items():
            damage(path)
            assert digests.find_damage(folder), f"{path} {kind}"
            path.write_bytes(content)
    assert digests.find_damage(folder) == ""


@pytest.mark.parametrize(
    ("name", "kind"),
    [("weights/*/d/*", "flipped"), ("optimizer/_METADATA", "truncated"), ("sha256.json", "removed")],
)
def test_the_checkpoint_before_a_damaged_one_is_used(finished, copy, command, name, kind):
    """One line reports the damaged checkpoint, which is set aside; the run ends with the same result."""
    folder = copy / "checkpoints" / "12"
    path = max(folder.glob(name), key=lambda path: path.stat().st_size)
    DAMAGES[kind](path)
    left = len(contents(folder))
    process = command(*QUICK, f"--workdir={copy}")
    assert process.returncode == 0, process.stderr
    (line,) = [line for line in process.stdout.splitlines() if "damaged" in line]
    assert line.startswith(f"warning: {folder} is damaged (") and "; using step 9" in line
    assert f"; moved to {copy / 'damaged' / '12'};" in line
    assert len(contents(copy / "damaged" / "12")) == left
    assert same_as(finished, copy) and (folder / "sha256.json").exists()


def test_commands_on_damaged_checkpoints(finished, copy, command, refused):
    """Evaluation moves nothing, and refuses a damaged step by name; if all are damaged, commands fail."""
    flip(copy / "checkpoints" / "12" / "card" / "metadata")
    before = contents(copy / "checkpoints")
    process = command(*QUICK, f"--workdir={copy}", "--mode=eval")
    assert process.returncode == 0, process.stderr
    assert "12 is damaged (card/metadata is not what was saved); using step 9\n" in process.stdout
    assert "evaluating step 9" in process.stdout
    named = f"--config.init_from={copy}/checkpoints/12"
    line = refused(*QUICK, named, f"--workdir={copy.parent / 'other'}")
    assert "checkpoints/12 is damaged: card/metadata is not what was saved" in line
    assert contents(copy / "checkpoints") == before

    flip(copy / "checkpoints" / "9" / "card" / "metadata")
    before = contents(copy / "checkpoints")
    for mode in ("train", "eval"):
        line = refused(*QUICK, f"--workdir={copy}", f"--mode={mode}")
        assert "12 is damaged (card/metadata" in line and "move them away to start again" in line
    assert contents(copy / "checkpoints") == before


# Retention, and other devices


def tiny_state(number, grid=None):
    """Return a state of a few arrays; one is large enough to be split."""
    grid = grid or mesh.make_mesh(1, 1, jax.devices()[:1])
    random = np.random.default_rng(number)
    shapes = {"fc.kernel": (256, 128), "fc.bias": (128,), "odd.kernel": (129, 131)}
    params = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    state = init_state(
        Weights(params, {"norm.mean": random.standard_normal(128, np.float32)}),
        optim.make_optimizer(default_config().optimizer),
        grid,
    )
    return state._replace(step=jnp.int32(number))


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (RetentionPolicy(2), {9, 10}),
        (RetentionPolicy(1, best=2), {10, 3, 7}),
        (RetentionPolicy(1, every=4), {10, 4, 8}),
        (RetentionPolicy(1, best=1, every=5), {10, 3, 5}),
    ],
)
def test_which_checkpoints_are_kept(tmp_path, keep, kept):
    """The latest, the best evaluated ones (odd steps here, 3 before 7), and multiples of `every`."""
    top1 = {1: 0.1, 3: 0.9, 5: 0.2, 7: 0.8, 9: 0.3}
    state = tiny_state(0)
    for steps in (range(1, 6), range(6, 11)):  # as in a run that is resumed
        with Checkpoints(tmp_path, keep) as checkpoints:
            for number in steps:
                scores = {"top1": top1[number]} if number in top1 else None
                checkpoints.save(state._replace(step=jnp.int32(number)), {}, scores)
    assert {int(path.name) for path in (tmp_path / "checkpoints").iterdir()} == kept


def test_a_run_keeps_the_best_of_its_evaluations(finished, command, tmp_path):
    """Saving after evaluations does not change the result of the run."""
    options = ["--config.eval.every=2 steps", "--config.checkpoint.keep=1"]
    options += ["--config.checkpoint.keep_best=1", "--config.checkpoint.keep_every=5 steps"]
    process = command(*QUICK, *options, f"--workdir={tmp_path}")
    assert process.returncode == 0, process.stderr
    top1 = {r["step"]: r["eval_top1"] for r in records(tmp_path) if "eval_top1" in r and r["step"] < 12}
    assert list(top1) == [2, 4, 6, 8, 10]
    steps = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    (best,) = steps - {5, 10, 12}  # multiples of 5 are kept although the run saves every 3 steps
    assert top1[best] == max(top1.values())
    assert (tmp_path / "result.json").read_bytes() == (finished[0] / "result.json").read_bytes()


@pytest.mark.parametrize("parts", [True, False])
def test_eight_devices_save_and_others_restore(tmp_path, monkeypatch, caplog, parts):
    """Restored arrays are identical on 1, 2 and 4 devices; saving small arrays compiles no program."""
    if parts:
        monkeypatch.setattr(checkpoint, "_MIN_PART_BYTES", 1)
    state = tiny_state(3, mesh.make_mesh(2, 4))
    assert not state.weights.params["fc.kernel"].sharding.is_fully_replicated
    with jax.log_compiles(), Checkpoints(tmp_path, RetentionPolicy(1)) as checkpoints:
        checkpoints.save(state, {})
    assert ("Compiling" in caplog.text) == parts
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() == 3
        for ways in ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4)):
            grid = mesh.make_mesh(*ways, jax.devices()[: math.prod(ways)])
            restored = checkpoints.state(3, tiny_state(0, grid), grid, "")
            assert restored.weights.params["fc.kernel"].sharding.is_fully_replicated == (ways[1] == 1)
            chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state))


def test_a_failing_save_is_reported_when_a_signal_stops_the_run(tmp_path, monkeypatch):
    """The last save runs in the background until the checkpoints are closed."""
    checkpoints = Checkpoints(tmp_path, RetentionPolicy(1))
    monkeypatch.setattr(checkpoints._manager, "close", lambda: os.write(-1, b"x"))
    with pytest.raises(UserError, match="Bad file descriptor"), checkpoints:
        raise Stopped("stopped")


def test_damage_is_set_aside_in_a_bucket_and_on_a_disk(place):
    """Damage to the scores of an older checkpoint counts, too, because Orbax reads them."""
    with Checkpoints(place, RetentionPolicy(3, best=1)) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(tiny_state(number), {}, {"top1": 0.5})
    folder = place / "checkpoints"
    (folder / "3" / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / "1" / "metrics" / "metrics").write_text("{")
    with Checkpoints(place, RetentionPolicy(3, best=1)) as checkpoints:
        assert checkpoints.latest() == 2 and checkpoints.steps() == [2]
    assert {path.name for path in (place / "damaged").iterdir()} == {"1", "1.txt", "3", "3.txt"}
    assert (place / "damaged" / "3.txt").read_text() == "_CHECKPOINT_METADATA is not what was saved\n"


def test_leftovers_of_killed_saves_are_removed(tmp_path):
    """Both temporary names of an unfinished save are removed."""
    folder = tmp_path / "checkpoints"
    for name in ("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-written"):
        (folder / name / "weights").mkdir(parents=True)
        (folder / name / "_CHECKPOINT_METADATA").write_text("{}")
    with Checkpoints(tmp_path, RetentionPolicy(2)) as checkpoints:
        assert checkpoints.latest() is None
        checkpoints.save(tiny_state(3), {})
    assert [path.name for path in folder.iterdir()] == ["3"]


def test_folders_that_are_no_steps(tmp_path):
    """Names of digits that int() rejects, or that differ from str(int(name))."""
    for name in ("\u00b2", "\u0663", "007", "9" * 200):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        with Checkpoints(tmp_path, RetentionPolicy(2)) as checkpoints:
            assert checkpoints.latest() is None


@pytest.mark.parametrize("place", ["bucket"], indirect=True)
@pytest.mark.parametrize(
    ("files", "unfinished"),
    [
        ({"weights/a": "1"}, True),
        ({"weights/a": "1", "sha256.json": "{}"}, True),
        ({"weights/a": "1", "sha256.json": "{}", "commit_success.txt": "yes"}, True),
        ({"weights/a": "1", "commit_success.txt": "yes"}, False),
        ({"weights/a": "1", "sha256.json": ""}, False),
    ],
)
def test_a_save_in_a_bucket_is_finished_by_its_digests(place, files, unfinished):
    """What a kill left is removed; states that only damage can explain are reported and kept."""
    folder = place / "checkpoints" / "3"
    for name, text in files.items():
        (folder / name).write_text(text)
    if unfinished:
        assert Checkpoints(place, RetentionPolicy(1)).latest() is None
    else:
        with pytest.raises(UserError, match=r"is damaged \(.*sha256\.json"):
            Checkpoints(place, RetentionPolicy(1))
    assert folder.exists() != unfinished


# Reading while a run is training


def save(place, number, keep):
    with Checkpoints(place, keep) as checkpoints:
        checkpoints.save(tiny_state(number), card_of(number))


def card_of(number):
    return {"class_names": None, "config": {"model": {"name": "of"}}, "of": number}


def test_the_next_checkpoint_is_read_when_a_run_replaces_one(tmp_path, monkeypatch):
    """The run may replace it after its files are compared, or during that. A named step is not replaced."""
    save(tmp_path, 1, RetentionPolicy(1))
    read_card, damage = checkpoint.read_card, checkpoint.find_damage
    pending = [2]

    def read_late(folder):
        while pending:
            save(tmp_path, pending.pop(), RetentionPolicy(1))
        return read_card(folder)

    def compare_late(folder, part=""):
        while pending:
            save(tmp_path, pending.pop(), RetentionPolicy(2))
            (folder / "card" / "metadata").unlink()  # its removal begins, and takes a while
            threading.Timer(0.2, shutil.rmtree, [folder]).start()
        return damage(folder, part)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "read_card", read_late)
        assert restore.open_card(str(tmp_path)) == card_of(2)
    pending = [3]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "find_damage", compare_late)
        assert restore.open_card(str(tmp_path)) == card_of(3)
    with pytest.raises(UserError, match=r"no finished checkpoint at .*; .* has these steps: 3"):
        restore.open_card(f"{tmp_path}/checkpoints/1")


def test_advice_on_damage_while_a_run_is_writing(tmp_path):
    save(tmp_path, 1, RetentionPolicy(1))
    flip(tmp_path / "checkpoints" / "1" / "card" / "metadata")
    with WorkdirLock(epath.Path(tmp_path)):
        with pytest.raises(UserError, match=r"damaged .* being written by a run .* try again") as caught:
            restore.open_card(str(tmp_path))
        assert "move them away" not in str(caught.value)
    with pytest.raises(UserError, match="move them away"):
        restore.open_card(str(tmp_path))


def test_files_without_permission_are_not_damaged(tmp_path, monkeypatch):
    """They are an error, instead of a silent use of the older checkpoint.

    The test replaces `open`, because root may read every file.
    """
    for number in (1, 2):
        save(tmp_path, number, RetentionPolicy(2))
    closed = tmp_path / "checkpoints" / "2" / "card" / "metadata"
    open_file = type(epath.Path("/")).open

    def refuse(self, *arguments, **options):
        if str(self) == str(closed):
            raise PermissionError(13, "Permission denied", str(self))
        return open_file(self, *arguments, **options)

    monkeypatch.setattr(type(epath.Path("/")), "open", refuse)
    with pytest.raises(UserError, match=f"{closed} cannot be read: Permission denied"):
        restore.open_card(str(tmp_path))


def test_a_file_named_checkpoints(tmp_path, refused):
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(UserError, match="checkpoints is a file"):
        restore.open_card(str(tmp_path))
    assert "checkpoints" in refused(*QUICK, f"--workdir={tmp_path}")
