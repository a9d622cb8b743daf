"""Untrusted input: cards of checkpoints, cached code, files of a run, names, and output paths."""

import json
import os
import stat
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import structvit
from etils import epath

from structvit_jax import create_model, data, load_trained
from structvit_jax.analysis.ablate.ablation import Ablation
from structvit_jax.analysis.ablate.study import Study
from structvit_jax.analysis.report.predictions import Predictions
from structvit_jax.analysis.report.render import confusion_matrix
from structvit_jax.cli import predict
from structvit_jax.config import check_config, default_config
from structvit_jax.data import Problem
from structvit_jax.inference.trained import Prediction
from structvit_jax.models import weights
from structvit_jax.runtime import devices, goodput, mesh, storage
from structvit_jax.runtime.digests import write_digests
from structvit_jax.runtime.process import exit_in_one_line
from structvit_jax.training import evaluation, log
from structvit_jax.training.card import (
    MACHINE,
    PORTABLE,
    as_json,
    check_card,
    differences,
    from_card,
    is_portable,
    keys_of,
)
from structvit_jax.training.log import Unreadable
from structvit_jax.utils import native_library, paths, user_cache
from structvit_jax.utils.errors import UserError
from structvit_jax.utils.failures import printable

RED = "\x1b[31mred\x1b[0m"
KEYS = [key for key, _ in keys_of(default_config())]


# Cards


def test_every_key_is_portable_or_of_the_machine():
    """Add a new key to one of the two in `structvit_jax.training.card`."""
    for key in KEYS:
        names = {key, key.partition(".")[0]}
        assert bool(names & {*PORTABLE}) != bool(names & {*MACHINE}), key
    assert {*PORTABLE, *MACHINE} <= {*KEYS, *(key.partition(".")[0] for key in KEYS)}


def card_of(**changes):
    """Return the configuration of a card with other values, given as section__key."""
    saved = as_json(default_config())
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (saved[section] if section else saved)[name] = value
    return saved


def test_a_card_sets_nothing_of_this_machine():
    hostile = card_of(
        mesh__compilation_cache="/evil", mesh__device="tpu", mesh__heartbeat=1, mesh__data=7,
        data__workers=99, profile="1:2", init_from="/evil", topologies=["v5e:2x4"], device_batch=9,
        model__name="deit_tiny", data__root="/data", data__label_maps="http://evil/maps", data__size=32,
    )  # fmt: skip
    config = from_card(hostile, "card")
    for key, value in keys_of(config):
        if not is_portable(key):
            assert value == dict(keys_of(default_config()))[key], key
    assert (config.model.name, config.data.root, config.data.size) == ("deit_tiny", "/data", 32)
    assert config.data.label_maps == ""
    assert from_card(card_of(data__root="gs://evil/data"), "card").data.root == ""
    assert [difference.describe() for difference in differences(hostile, as_json(config))] == [
        "config.data.label_maps is now ''; the checkpoint was trained with 'http://evil/maps'"
    ]


@pytest.mark.parametrize(
    ("changes", "phrase"),
    [
        ({"data__size": "large"}, "config.data.size cannot be 'large'"),
        ({"data__size": 24.5}, "config.data.size cannot be 24.5"),
        ({"data__size": True}, "config.data.size cannot be True"),
        ({"data__root": None}, "config.data.root cannot be None"),
        ({"data__root": ["a"]}, r"config.data.root cannot be \['a'\]"),
        ({"data__size": 10**9}, "config.data.size is 1000000000; it needs to lie from 1 to 2"),
        ({"augment__crop_area": ["a", 1]}, r"config.augment.crop_area is \('a', 1\); it needs two numbers"),
        ({"data__mean": ["a"] * 3}, "config.data.mean is .* it needs three finite numbers"),
        ({"data__crop_fraction": 0}, "config.data.crop_fraction is 0.0; it needs to lie above 0"),
        ({"optimizer__lr": 1e300}, "config.optimizer.lr is 1e"),
        ({"optimizer__b1": 10**400}, "config.optimizer.b1 cannot be 1000"),
        ({"model__depths": 3}, "config.model.depths cannot be 3"),
        ({"model__widths": [10**9] * 4}, r"structvit_tiny_4_1_video: widths is \(1000000000, "),
        ({"model__name": "structvit_tiny_9999999_1"}, "unknown model 'structvit_tiny_9999999_1'"),
    ],
)
def test_values_of_a_card_are_checked(changes, phrase):
    with pytest.raises(UserError, match=f"^/run/card is not valid: {phrase}") as error:
        from_card(card_of(**changes), "/run/card")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "card",
    [
        None,
        [],
        {},
        {"class_names": None},
        {"config": {"model": {"name": "deit_tiny"}}},
        {"class_names": "abc", "config": {"model": {"name": "deit_tiny"}}},
        {"class_names": [1], "config": {"model": {"name": "deit_tiny"}}},
        {"class_names": ["a"], "config": {"model": {}}},
        {"class_names": ["a"], "config": {"model": {"name": "deit_tiny", "depths": {"a": {"b": 1}}}}},
    ],
)
def test_a_card_of_another_shape_is_refused(card):
    with pytest.raises(UserError, match=r"^card is not a valid card of a checkpoint: "):
        check_card(card, "card")


def test_a_checkpoint_with_a_hostile_card(copy):
    """Its digests are correct, since the author of the card can compute them."""
    folder = epath.Path(copy) / "checkpoints" / "12"
    path = folder / "card" / "metadata"
    card = json.loads(path.read_text())

    def sign(content):
        path.write_text(content)
        write_digests(folder)

    card["config"]["mesh"]["compilation_cache"] = "/evil"
    card["config"]["data"]["workers"] = 50
    sign(json.dumps(card))
    trained = load_trained(str(copy))
    assert trained.config.mesh.compilation_cache == "auto" and trained.config.data.workers == -1
    for content in ("[" * 100_000, "{}", '{"class_names": null, "config": 3}'):
        sign(content)
        with pytest.raises(UserError, match="card/metadata is not a valid card"):
            load_trained(str(copy))


@pytest.mark.parametrize("name", ["huggingface:mnist", "kaggle:a/b", "os.path", "mnist/a=1,b=2", "../x", ""])
def test_a_card_names_data_sets_of_tfds_alone(name):
    options = dict(default_config().data.items()) | {"name": f"tfds:{name}", "frames": 0}
    with pytest.raises(UserError, match="is not NAME, NAME/CONFIG or NAME/CONFIG:VERSION"):
        data.load(options, default_config().augment)


# Ranges


@pytest.mark.parametrize(
    ("key", "value"),
    [("data.size", 10**9), ("optimizer.lr", 1e39), ("data.frames", 10**6)],
)
def test_unreasonable_values_are_refused(key, value):
    config = default_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"config.{key} is "):
        check_config(config)


def test_an_unreasonable_batch_is_refused():
    config = default_config()
    config.data.size, config.data.batch_size = 2**14, 2**16
    with pytest.raises(UserError, match=r"config.data.batch_size=65536, size=16384 .*the limit is 256 GiB"):
        check_config(config)


def test_batches_are_no_larger_than_the_data():
    grid = mesh.make_mesh(-1, 1)  # eight devices
    assert [mesh.fitting_batch(grid, size, 20) for size in (100_000, 24, 16)] == [24, 24, 16]
    seen = []

    def batches(size, shard):
        seen.append(size)
        raise InterruptedError

    source = types.SimpleNamespace(test_examples=20, test_batches=batches)
    section = types.SimpleNamespace(batch_size=100_000)
    with pytest.raises(InterruptedError):
        evaluation.evaluate(evaluation.StepRunner(None, grid), None, source, section)
    assert seen == [24]


def test_an_ablation_checks_all_rates_before_it_trains(tmp_path):
    config = default_config()
    arms = ("a: model.drop_path=0.0", "b: model.drop_path=0.1")
    for rates, phrase in (
        ((0.001, -1.0), "config.optimizer.lr is -1.0"),
        (("x",), "lr does not take 'x'"),
    ):
        with pytest.raises(UserError, match=phrase):
            Ablation(config, Study(arms, lrs=rates), epath.Path(tmp_path))


@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_struct_1_video"])
def test_remat_of_fewer_blocks_than_quarters(name):
    """In DeiTs of two blocks, two of the quarters are empty."""
    x = jnp.ones((1, 8, 24, 24, 3) if "video" in name else (1, 24, 24, 3))
    structure, arrays = weights.split(create_model(name, num_classes=3, remat="full"))
    assert jax.eval_shape(lambda a: structure.model(a)(x), arrays).shape == (1, 3)


# Cached code


def test_a_private_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder, problem = user_cache.user_folder("native")
    assert folder == tmp_path.resolve() / "structvit_jax" / "native" and not problem
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    assert user_cache.user_folder("native")[0] and stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o770)
    assert user_cache.user_folder("native") == (None, f"others can write into {folder}; remove it")
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    assert "others can write into" in user_cache.user_folder("native")[1]
    folder.parent.chmod(0o1777)
    assert user_cache.user_folder("native")[0]
    monkeypatch.setattr(user_cache.os, "geteuid", lambda: 54321)
    assert "belongs to another user" in user_cache.user_folder("native")[1]


def test_no_home_folder(tmp_path, monkeypatch):
    """No folder named "~" is created if HOME is not set and the user is unknown."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(user_cache.os.path, "expanduser", lambda path: path)
    for root in (None, "~", "relative"):
        if root is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", root)
        assert user_cache.user_folder("native") == (None, "there is no home folder; set XDG_CACHE_HOME")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut off", "flipped", "empty", "garbage"])
def test_a_changed_library_is_rebuilt(tmp_path, monkeypatch, damage):
    content, built = b"\x7fELF" + bytes(range(256)), []

    def build(command, folder):
        built.append(command)
        (path := folder / "native.so").write_bytes(content)
        return path

    monkeypatch.setattr(native_library, "_build", build)
    path = native_library._cached(tmp_path, "ops-1", ["c++"])
    assert native_library._cached(tmp_path, "ops-1", ["c++"]) == path and len(built) == 1
    flipped = bytes([content[0] ^ 1]) + content[1:]
    path.write_bytes({"cut off": content[:100], "flipped": flipped, "empty": b"", "garbage": b"junk"}[damage])
    assert native_library._cached(tmp_path, "ops-1", ["c++"]) == path and len(built) == 2
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]
    assert native_library._cached(tmp_path, "ops-2", ["c++"]) != path


def test_a_library_without_a_private_folder_leaves_nothing(tmp_path, monkeypatch, capsys):
    loaded = []
    folder = (None, "others can write into /x")
    monkeypatch.setattr(native_library.user_cache, "user_folder", lambda name: folder)
    monkeypatch.setattr(native_library, "_build", lambda command, folder: folder / "native.so")
    monkeypatch.setattr(native_library, "_ingredients", lambda command, files: b"")
    monkeypatch.setattr(native_library.shutil, "which", lambda name: "c++")
    monkeypatch.setattr(native_library.ctypes, "CDLL", loaded.append)
    native_library.load("ops", [], [])
    assert len(loaded) == 1 and not os.path.exists(os.path.dirname(loaded[0]))
    assert capsys.readouterr().err.startswith(
        "note: others can write into /x; C++ is compiled again for this process only"
    )


def test_compiled_programs_are_kept_in_private(tmp_path, monkeypatch, capsys):
    before = jax.config.jax_compilation_cache_dir
    try:
        monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        devices.use_compilation_cache("auto")
        folder = tmp_path.resolve() / "structvit_jax" / "compiled"
        assert jax.config.jax_compilation_cache_dir == str(folder)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        folder.chmod(0o777)
        devices.use_compilation_cache("auto")
        assert jax.config.jax_compilation_cache_dir is None
        assert "others can write into" in capsys.readouterr().err
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# Command lines


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y cannot be used: Permission denied", 2),
        (OSError(28, "No space left on device"), "No space left on device", 2),
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused", 75),
        (UserError(f"unknown class {RED}\nsecond line"), r"unknown class \x1b[31mred\x1b[0m\nsecond line", 2),
    ],
)
def test_expected_failures_are_one_line(error, line, code, capsys):
    with pytest.raises(SystemExit) as end, exit_in_one_line():
        raise error
    assert end.value.code == code and capsys.readouterr().err == f"error: {line}\n"


def test_bugs_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), exit_in_one_line():
        raise ZeroDivisionError


def test_a_device_without_its_plug_in(monkeypatch):
    def no_devices():
        raise AssertionError

    monkeypatch.setattr(jax, "devices", no_devices)
    monkeypatch.setattr(jax.config, "update", lambda *words: None)
    monkeypatch.setattr(devices, "_has_nvidia_gpu", lambda: False)
    with pytest.raises(UserError, match=r"JAX finds no device for config.mesh.device='gpu': its plug-in"):
        devices.select_devices("gpu")


def test_the_bench_of_data_names_what_it_cannot_read(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.mp4 cannot be read"):
        structvit("bench", "input", tmp_path / "nothing.mp4")
    with pytest.raises(UserError, match="0 is not in the range"):
        structvit("bench", "input", "--rounds=0")


@pytest.mark.parametrize("text", ["s3://bucket/run", "http://127.0.0.1/run", "file://x", "://"])
def test_places_are_folders_or_buckets(text):
    with pytest.raises(UserError, match="use a local path, or gs://BUCKET/PATH"):
        paths.parse_path(text)


# Names


def test_names_are_printed_as_one_plain_line():
    assert printable(f"a{RED}b\n\r\x9b\u202e\u2028é木") == r"a\x1b[31mred\x1b[0mb\n\r\x9b\u202e\u2028é木"
    scores = np.array([0.0, 1.0], np.float32)
    made = Prediction("x.mp4", "", ("plain", f"{RED}\u202e"), scores, scores, None)
    for as_text in (predict._text, predict._jsonl, predict._csv):
        assert all(line.isprintable() for line in as_text(made, 2).splitlines())
    assert json.loads(predict._jsonl(made, 2))["classes"] == [f"{RED}\u202e", "plain"]


# Files


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    path = tmp_path / "out"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link": lambda p: os.symlink("/dev/null", p)}[kind](path)
    before = os.lstat(path)
    with pytest.raises(UserError, match="and is not replaced"):
        storage.write(epath.Path(path), b"content")
    assert os.lstat(path) == before and list(tmp_path.iterdir()) == [path]


def test_a_planted_partial_file_is_not_followed(tmp_path):
    victim, path = tmp_path / "victim", tmp_path / "out"
    victim.write_text("precious")
    os.symlink(victim, f"{path}.{os.getpid()}.tmp")
    storage.write(epath.Path(path), "new")
    assert (victim.read_text(), path.read_text()) == ("precious", "new")


def test_damaged_lines_of_a_run_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 1, "loss": 2.0}'
    path.write_bytes(b"\n".join([good, b'{"step": 2, "l\xffss": 1}', b"[" * 10**5, b"3", b'{"step": "x"}']))
    lines = log._Lines(epath.Path(path), 10)
    assert lines.last() == good.decode()
    lines.write()
    assert path.read_bytes() == good + b"\n"


def test_odd_types_in_goodput(tmp_path):
    workdir, path = epath.Path(tmp_path), tmp_path / goodput.FILE
    odd = {"seconds": {"step": "x", "input": 2, "x": 3}, "sessions": [], "at_save": {"²": 1, "3": 9}}
    for content in (json.dumps(odd), '{"seconds": 3, "at_save": []}', "[" * 10**5, "\xff"):
        path.write_text(content, "latin-1")
        made = goodput.Goodput(workdir)
        made.resume(3)
        made.write()
        assert goodput.wall_seconds(workdir) < 3 and json.loads(path.read_text())["sessions"] == 1


def test_a_list_of_unreadable_files_that_is_not_text(tmp_path):
    (tmp_path / "unreadable.tsv").write_bytes(b"train\ta\xff.mp4\tempty file\n")
    found = Unreadable(epath.Path(tmp_path), 100, 0.5)
    found.note("train", [Problem("b.mp4", "empty file")])
    assert (tmp_path / "unreadable.tsv").read_text().splitlines()[1] == "train\tb.mp4\tempty file"


def test_a_report_of_many_classes_takes_little_memory():
    """A dense confusion matrix would take 320 GB."""
    classes = 200_000
    scores = np.zeros((4, classes), np.float32)
    scores[[0, 1, 2, 3], [5, 7, 7, 9]] = 1
    labels = np.array([5, 5, 5, 5])
    names = tuple(map(str, range(classes)))
    found = Predictions(np.array(list("abcd")), labels, scores, names)
    (score,) = found.by_class()
    assert score == (5, 4, 1, 7, 2)
    assert [place for place, _ in found.confident_errors(2, "softmax")] == [1, 2]
    assert confusion_matrix(found) is None


def test_scores_by_class_are_those_of_the_matrix():
    rng = np.random.default_rng(0)
    scores = rng.random((500, 7)).astype(np.float32)
    scores[::50, 3] = np.nan
    labels = rng.integers(0, 7, 500)
    found = Predictions(np.arange(500), labels, scores, tuple("abcdefg"))
    matrix = found.confusion()
    wrong = matrix * ~np.eye(7, dtype=bool)
    assert matrix.sum() == 490
    for score in found.by_class():
        assert score.examples == (labels == score.number).sum()
        assert score.right == matrix[score.number, score.number]
        assert (score.confused, score.times) == (wrong[score.number].argmax(), wrong[score.number].max())
