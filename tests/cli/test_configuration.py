"""Configurations on the command line: options, files, and suggestions for unknown keys."""

import pytest
from conftest import ROOT, structvit

from structvit_jax.cli import train
from structvit_jax.cli.configuration import (
    _SYNONYMS,
    find_file,
    load_config,
    load_file,
    override,
    suggest_key,
)
from structvit_jax.cli.options import ConfigArguments, split_overrides
from structvit_jax.config import KEYS, default_config, get_value
from structvit_jax.utils.errors import UserError


def parse(*given):
    """Return the default configuration with the overrides of a command line, and the other arguments."""
    overrides, others = split_overrides(given)
    config = default_config()
    override(config, overrides)
    return config, others


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("data.size=32", 32),
        ("mesh.data=-1", -1),
        ("optimizer.lr=3e-4", 3e-4),
        ("optimizer.lr=1", 1.0),
        ("data.root=a b=c", "a b=c"),
        ("data.root=", ""),
        ("data.root=None", "None"),  # a folder of this name: the key is never unset
        ("data.channels=None", None),
        ("data.channels=bgr", "bgr"),
        ("data.mean=(0.1,0.2,0.3)", (0.1, 0.2, 0.3)),
        ("data.mean=0.1,0.2,0.3", (0.1, 0.2, 0.3)),
        ("data.mean=[0.1, 0.2, 0.3]", (0.1, 0.2, 0.3)),
        ("data.mean=None", None),
        ("augment.crop_area=(0.5,1)", (0.5, 1)),
        ("model.widths=16", (16,)),
        ("model.key_window=5", 5),
        ("model.key_window=(3,5)", (3, 5)),
        ("model.drop_path=None", None),
        ("eval.ema=False", False),
        ("eval.ema=1", True),
        ("model.token_labels=t", True),
        ("init_from=runs/a", "runs/a"),
    ],
)
def test_values_of_every_type(given, value):
    name, _, text = given.partition("=")
    for arguments in ([f"--config.{given}"], [f"--config.{name}", text]):
        config, others = parse(*arguments)
        assert get_value(config, name) == value and type(get_value(config, name)) is type(value)
        assert not others


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("data.size=big", "--config.data.size='big': it takes an integer"),
        ("data.size=1.5", "--config.data.size='1.5': it takes an integer"),
        ("data.size=None", "--config.data.size='None': it takes an integer"),
        ("data.size=" + "9" * 5000, "9': it takes an integer"),
        ("optimizer.lr=fast", "--config.optimizer.lr='fast': it takes a number"),
        ("eval.ema=maybe", "--config.eval.ema='maybe': it takes true or false"),
        ("data.mean=a", "--config.data.mean='a': it takes a tuple, such as (1,2)"),
        ("data.mean=" + "(" * 1000, "it takes a tuple"),
        ("model.key_window=3x3", "it takes an integer or a tuple, such as 3 or (3,5)"),
        ("optimzer.lr=1", "the configuration has no key 'optimzer.lr'. Did you mean config.optimizer.lr?"),
        ("=1", "the configuration has no key ''. structvit show --keys lists all keys."),
        ("data.size.x=1", "the configuration has no key 'data.size.x'."),
        ("data=1", "config.data is a section; set its keys, such as --config.data.name=VALUE"),
    ],
)
def test_bad_values_are_one_line(given, message):
    with pytest.raises(UserError) as error:
        parse(f"--config.{given}")
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


def test_overrides_are_separated_from_other_arguments():
    given = ["run", "--config=a.py", "--config.train.seed", "-1", "--config.data.batch-size=8", "clip.mp4"]
    overrides, others = split_overrides(given)
    assert overrides == {"train.seed": "-1", "data.batch_size": "8"}
    assert others == ["run", "--config=a.py", "clip.mp4"]
    assert split_overrides(["--", "--config.data.size=8"]) == ({}, ["--", "--config.data.size=8"])
    for given in (["--config.data.size"], ["--config.data.size", "--workdir=w"]):
        with pytest.raises(UserError, match=r"--config\.data\.size needs a value: "):
            split_overrides(given)


def test_the_last_value_of_a_repeated_key_wins():
    given = ["--config.data.mean=(1,1,1)", "--config.data.size=8", "--config.data.mean=(2,2,2)"]
    config, _ = parse(*given, "--config.data.size", "16")
    assert (config.data.mean, config.data.size) == ((2, 2, 2), 16)


@pytest.mark.parametrize(
    ("given", "file", "workdir"),
    [
        ("--config=a.py --config=dir/b.py:c/d.py", "dir/b.py:c/d.py", "runs/b"),
        ("--config digits --workdir=w", "digits", "w"),
    ],
)
def test_file_and_workdir(given, file, workdir):
    context = train.command.make_context("train", given.split())
    assert context.params == {"arguments": ConfigArguments(file, {}, workdir), "profile": None}


_BEGIN = "from structvit_jax.config import default_config\ndef get_config(argument='none'):\n    "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(): raise RuntimeError('boom\\nbang')", "file.py:1: RuntimeError: boom bang"),
        ("x = 0\ndef get_config(): return int('a')", "file.py:2: ValueError: invalid literal"),
        ("def get_config(): open('/no/file')", "file.py:1: FileNotFoundError"),
        ("import sys\nsys.exit(3)", "file.py:2: SystemExit: 3"),
        ("import no_such_module", "file.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def get_config(:", "file.py:1: invalid syntax"),
        ("x = '\\ud800'.encode()", "file.py:1: UnicodeEncodeError"),
        (b"x = '\xff'", "file.py:1: "),
        (b"x = 0\0", "null bytes"),
        ("x = 1", "file.py has no function get_config()"),
        ("get_config = 3", "file.py has no function get_config()"),
        ("def get_config(): pass", "file.py must return structvit_jax.config.default_config()"),
        (_BEGIN + "return default_config().to_dict()", "file.py must return"),
        (
            _BEGIN + "c = default_config(); c.unlock(); del c.train.seed; return c",
            "file.py must return",
        ),
        (_BEGIN + "c = default_config(); c.unlock(); c.train = 5; return c", "file.py:3: TypeError: "),
        (_BEGIN + "c = default_config(); c.train.nonsense = 1", "the configuration has no key 'nonsense'."),
        (
            _BEGIN + "c = default_config(); c.eval.batchsize = 1",
            "Did you mean config.data.batch_size or config.eval",
        ),
        (_BEGIN + "c = default_config(); c.optimzer.lr = 1", "the configuration has no key 'optimzer'."),
        (_BEGIN + "c = default_config(); c.train.seed = 'x'", "file.py:3: TypeError: "),
        ("def get_config(): return {}['x']", "file.py:1: KeyError: 'x'"),
    ],
)
def test_configuration_files_that_fail(text, message, tmp_path):
    path = tmp_path / "file.py"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        load_file(str(path))
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "file.py" in str(error.value) or "file.py must return" in message


def test_arguments_overrides_and_constants_of_a_file(tmp_path):
    path = tmp_path / "file.py"
    path.write_text(f"STUDY = 3\n{_BEGIN}c = default_config(); c.data.name = argument; return c")
    assert load_file(str(path)).config.data.name == "none"
    assert load_file(f"{path}:a:b,c=1").config.data.name == "a:b,c=1"
    assert load_file(str(path)).constants["STUDY"] == 3
    config = load_config(ConfigArguments(f"{path}:x", {"data.size": "8"}, ""))
    assert (config.data.name, config.data.size) == ("x", 8) and config.is_locked
    assert list(tmp_path.iterdir()) == [path]  # no __pycache__


def test_no_configuration():
    with pytest.raises(UserError, match=r"no configuration is given: set --config"):
        load_config(ConfigArguments("", {}, ""))


@pytest.mark.parametrize("name", ["digits", "digits.py", "configs/digits.py"])
def test_configurations_of_the_package_are_found_everywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_file(name).read_bytes() == (ROOT / "configs" / "digits.py").read_bytes()
    (tmp_path / "digits.py").write_text("")
    assert str(find_file("digits.py")) == "digits.py"  # a local file comes first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digist", "no configuration file (.py) at 'digist'. Did you mean 'digits'?"),
        ("configs/moving_digts.py", "Did you mean 'configs/moving_digits.py' or "),
        ("configs", "Known: ablate_digits, ablate_garments, ablations"),
        ("a/configs/digits.py", "no configuration file (.py) at 'a/configs/digits.py'."),
        ("README.md", "no configuration file (.py) at 'README.md'."),
        ("x" * 300 + "/file.py", "no configuration file (.py) at "),
    ],
)
def test_missing_files_have_suggestions(name, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError) as error:
        find_file(name)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "keys"),
    [
        ("train.lr", "config.optimizer.lr"),
        ("optimizer.learning_rate", "config.optimizer.lr"),
        ("lr", "config.optimizer.lr"),
        ("optimzer.lr", "config.optimizer.lr"),
        ("train.epochs", "config.train.duration"),
        ("batch_size", "config.data.batch_size or config.eval.batch_size"),
        ("eval.batchSize", "config.eval.batch_size or config.data.batch_size"),
        ("data.num_workers", "config.data.workers"),
    ],
)
def test_suggestions_for_unknown_keys(wrong, keys):
    assert suggest_key(wrong) == f" Did you mean {keys}?"


def test_the_list_of_keys(capsys):
    assert structvit("show", "--keys") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(KEYS)
    (line,) = (line for line in lines if line.startswith("data.test_crops "))
    assert "  1  crops of a test clip" in line and line.endswith("; needs to be 1 or 3")


def test_synonyms_name_existing_keys():
    assert {*_SYNONYMS.values()} <= {*KEYS}
    assert suggest_key("zzzzz") == " structvit show --keys lists all keys."
