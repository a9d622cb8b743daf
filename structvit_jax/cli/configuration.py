"""Configurations on the command line: --config=FILE and --config.SECTION.KEY=VALUE."""

from __future__ import annotations

import ast
import difflib
import os
import traceback
import types
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from structvit_jax.cli.options import Override, Words
from structvit_jax.config import default_config, keys_of, short
from structvit_jax.utils.errors import UserError, did_you_mean

# Names of our keys in other projects, by the last word of the key, in lower case and without underscores.
_SYNONYMS = {
    **dict.fromkeys(("learningrate", "baselr", "maxlr", "peaklr"), "optimizer.lr"),
    **dict.fromkeys(("epochs", "numepochs", "steps", "numsteps", "maxsteps", "maxepochs"), "train.duration"),
    **dict.fromkeys(("warmupsteps", "warmupepochs"), "optimizer.warmup"),
    **dict.fromkeys(("minlr", "finallr"), "optimizer.end_lr"),
    **dict.fromkeys(("wd", "decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("gradclip", "clipgrad", "maxgradnorm", "gradientclipping"), "optimizer.clip_norm"),
    **dict.fromkeys(("emadecay", "modelema"), "optimizer.ema"),
    **dict.fromkeys(("gradaccum", "accumsteps", "gradientaccumulationsteps"), "train.grad_accum_steps"),
    **dict.fromkeys(("smoothing",), "train.label_smoothing"),
    **dict.fromkeys(("numworkers", "nworkers"), "data.workers"),
    **dict.fromkeys(("dataset", "datasetname"), "data.name"),
    **dict.fromkeys(("datadir", "datapath", "path", "dir", "folder"), "data.root"),
    **dict.fromkeys(("resolution", "imgsize", "inputsize", "cropsize"), "data.size"),
    **dict.fromkeys(("numframes", "cliplen", "nframes"), "data.frames"),
    **dict.fromkeys(("framestride", "samplingrate", "frameinterval"), "data.stride"),
    **dict.fromkeys(("bs", "trainbatchsize"), "data.batch_size"),
    **dict.fromkeys(("arch", "model", "modelname", "backbone"), "model.name"),
    **dict.fromkeys(("droppathrate", "dpr", "stochasticdepth", "dropout"), "model.drop_path"),
    **dict.fromkeys(("precision", "amp", "fp16", "bf16", "mixedprecision"), "model.dtype"),
    **dict.fromkeys(("checkpointing", "gradientcheckpointing"), "model.remat"),
    **dict.fromkeys(("pretrained", "finetune", "initfrom", "init"), "init_from"),
    **dict.fromkeys(("aa", "autoaugment"), "augment.randaugment"),
    **dict.fromkeys(("reprob", "randomerasing", "randomerase"), "augment.erase"),
    **dict.fromkeys(("hflip", "horizontalflip"), "augment.flip"),
    **dict.fromkeys(("evalevery", "evalinterval", "valinterval"), "eval.every"),
    **dict.fromkeys(("saveevery", "saveinterval"), "checkpoint.every"),
    **dict.fromkeys(("gpus", "devices", "platform"), "mesh.device"),
}


def load_config(words: Words) -> ml_collections.ConfigDict:
    """Return the configuration that a command line describes. Its values are not checked, see `check_config`.

    Raises:
      UserError: no file, a file that fails or returns something else, an unknown key, or a value of
        another type.
    """
    config = load_file(words.file).config
    override(config, words.overrides)
    return config


class File(NamedTuple):
    """A configuration file."""

    config: ml_collections.ConfigDict  # what get_config() returns
    constants: Mapping[str, Any]  # the names that it defines


def load_file(given: str) -> File:
    """Load a configuration file, as --config names it: FILE, FILE:ARGUMENT or a name of the package.

    Raises:
      UserError: no file, or a file that fails or returns something else.
    """
    if not given:
        raise UserError("say which configuration: --config=configs/moving_digits.py")
    name, _, argument = given.partition(":")
    path = find_file(name)
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        exec(compile(source, path, "exec"), module.__dict__)
        if not callable(getattr(module, "get_config", None)):
            raise UserError(f"{path} has no function get_config()")
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise _failure(error, path) from error
    _check_structure(config)
    return File(config, vars(module))


def override(config: ml_collections.ConfigDict, overrides: Sequence[Override]) -> None:
    """Set keys of a configuration in place.

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    keys = dict(keys_of(config))
    for key, text in overrides:
        if key not in keys:
            if key in config:
                raise UserError(
                    f"config.{key} is a section; set its keys, as config.{key}.{_first(config[key])}"
                )
            raise UserError(f"the configuration has no key {key!r}.{suggest_key(key, keys)}")
        section, _, name = key.rpartition(".")
        part = config[section] if section else config
        kind = part.get_type(name)
        try:
            part[name] = None if text == "None" and _is_optional(key) else _parse(text, kind)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            raise UserError(
                f"--config.{key}={short(text)}: it takes {_NEEDS.get(kind, kind.__name__)}"
            ) from error


def _first(section: Any) -> str:
    return next(iter(section))


def _is_optional(key: str) -> bool:
    return dict(keys_of(default_config()))[key] is None


_NEEDS = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    tuple: "a tuple, as (1,2)",
    object: "an integer or a tuple, as 3 or (3,5)",
}


def _parse(text: str, kind: type) -> Any:
    """Return the value that a text stands for."""
    if kind is bool:
        if text.lower() not in ("true", "false", "t", "f", "1", "0"):
            raise ValueError(text)
        return text.lower() in ("true", "t", "1")
    if kind in (int, float, str):
        return kind(text)
    value = ast.literal_eval(text)
    if isinstance(value, list):
        value = tuple(value)
    return (value,) if kind is tuple and not isinstance(value, tuple) else value


def find_file(name: str) -> Path:
    """Return the path of a configuration: a file, or one of the package, as "moving_digits".

    Raises:
      UserError: there is none.
    """
    path = Path(name)
    if path.suffix == ".py" and os.path.isfile(path):
        return path
    packaged = Path(str(resources.files("structvit_jax"))) / "configs"
    candidate = packaged / f"{path.name.removesuffix('.py')}.py"
    if path.parent.name in ("", "configs") and len(path.parts) <= 2 and candidate.is_file():
        return candidate
    known = sorted(file.stem for file in packaged.glob("*.py"))
    near = [str(file) for file in path.parent.glob("*.py")] if path.suffix == ".py" else []
    hint = did_you_mean(name, near or known)
    raise UserError(f"no configuration file (.py) at {name!r}.{hint}")


def _failure(error: BaseException, path: Path) -> UserError:
    """Return the line for an exception that the code of a configuration file raised."""
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
    ]
    where = f"{path}:{lines[-1]}: " if lines else f"{path}: "
    if isinstance(error, AttributeError | KeyError) and (key := _unknown_key(error)):
        return UserError(f"{where}the configuration has no key {key!r}.{suggest_key(key, _all_keys())}")
    text = " ".join(str(error).split())[:300]
    return UserError(f"{where}{type(error).__name__}: {text}")


def _unknown_key(error: BaseException) -> str:
    """Return the key that a configuration does not have, if that is what an exception is about."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    if frame and isinstance(frame.tb_frame.f_locals.get("self"), ml_collections.ConfigDict):
        names = (frame.tb_frame.f_locals.get(name) for name in ("attribute", "key"))
        return next((name for name in names if isinstance(name, str)), "")
    return ""


def _all_keys() -> list[str]:
    return [key for key, _ in keys_of(default_config())]


def _check_structure(config: Any) -> None:
    items = getattr(config, "items", None)
    if items is None or {key for key, _ in keys_of(config)} != set(_all_keys()):
        raise UserError(
            "the configuration does not have the right keys: get_config() has to return"
            " structvit_jax.config.default_config() with other values"
        )


def suggest_key(wrong: str, keys: Collection[str]) -> str:
    """Return ' Did you mean ...?' with keys that may have been meant by `wrong`, or how to print all keys."""
    section, _, word = wrong.rpartition(".")
    plain = word.lower().replace("_", "")
    last = {key: key.rpartition(".")[2] for key in keys}
    near = [key for key in keys if last[key] == word or last[key].replace("_", "") == plain]
    if plain in _SYNONYMS:
        near.append(_SYNONYMS[plain])
    close = difflib.get_close_matches(wrong, keys, n=2, cutoff=0.7)
    near = near or close or [k for k in keys if difflib.SequenceMatcher(None, word, last[k]).ratio() > 0.75]
    if not near:
        return " structvit show prints all keys."
    near = sorted(dict.fromkeys(near), key=lambda key: not key.startswith(f"{section}."))[:3]
    return " Did you mean " + " or ".join(f"config.{key}" for key in near) + "?"
