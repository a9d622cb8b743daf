"""Configurations on the command line: --config=FILE and --config.SECTION.KEY=VALUE."""

from __future__ import annotations

import ast
import difflib
import glob
import os
import runpy
import traceback
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections

from structvit_jax.cli.options import ConfigArguments
from structvit_jax.config import KEYS, automatic, keys_of, set_value, short
from structvit_jax.utils.errors import UserError, did_you_mean

# Names that other projects use for these keys: last part only, lower case, without underscores.
_SYNONYMS = {
    synonym: key
    for key, synonyms in {
        "optimizer.lr": "learningrate baselr maxlr peaklr",
        "optimizer.warmup": "warmupsteps warmupepochs",
        "optimizer.end_lr": "minlr finallr",
        "optimizer.weight_decay": "wd decay",
        "optimizer.clip_norm": "gradclip clipgrad maxgradnorm gradientclipping",
        "optimizer.ema": "emadecay modelema",
        "train.duration": "epochs numepochs steps numsteps maxsteps maxepochs",
        "train.grad_accum_steps": "gradaccum accumsteps gradientaccumulationsteps",
        "train.label_smoothing": "smoothing",
        "data.name": "dataset datasetname",
        "data.root": "datadir datapath path dir folder",
        "data.size": "resolution imgsize inputsize cropsize",
        "data.frames": "numframes cliplen nframes",
        "data.stride": "framestride samplingrate frameinterval",
        "data.batch_size": "bs trainbatchsize",
        "data.workers": "numworkers nworkers",
        "model.name": "arch model modelname backbone",
        "model.drop_path": "droppathrate dpr stochasticdepth dropout",
        "model.dtype": "precision amp fp16 bf16 mixedprecision",
        "model.remat": "checkpointing gradientcheckpointing",
        "init_from": "pretrained finetune initfrom init",
        "augment.randaugment": "aa autoaugment",
        "augment.erase": "reprob randomerasing randomerase",
        "augment.flip": "hflip horizontalflip",
        "eval.every": "evalevery evalinterval valinterval",
        "checkpoint.every": "saveevery saveinterval",
        "mesh.device": "gpus devices platform",
    }.items()
    for synonym in synonyms.split()
}


def load_config(arguments: ConfigArguments) -> ml_collections.ConfigDict:
    """Return the configuration of a command line, after checking the values of all keys that are not open.

    Raises:
      UserError: no file, a file that fails or returns something else, an unknown key, or a value of
        another type or outside its range.
    """
    config = load_file(arguments.file).config
    override(config, arguments.overrides)
    automatic.check_given(config)
    return config


class File(NamedTuple):
    """A configuration file."""

    config: ml_collections.ConfigDict  # the result of get_config()
    constants: Mapping[str, Any]  # global names of the file, such as STUDY


def load_file(given: str) -> File:
    """Load a configuration file.

    Args:
      given: the value of --config: FILE or FILE:ARGUMENT, where FILE may be a name in configs/.

    Raises:
      UserError: no file, or a file that fails or returns something else.
    """
    if not given:
        raise UserError("no configuration is given: set --config, for example --config=moving_digits")
    name, _, argument = given.partition(":")
    path = find_file(name)
    try:
        constants = runpy.run_path(str(path))
        if not callable(get_config := constants.get("get_config")):
            raise UserError(f"{path} has no function get_config()")
        config = get_config(argument) if argument else get_config()
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(f"{error.filename or path}:{error.lineno or 1}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        raise _file_error(error, path) from error
    if not isinstance(config, ml_collections.ConfigDict) or dict(keys_of(config)).keys() != KEYS.keys():
        raise UserError(
            f"get_config() in {path} must return structvit_jax.config.default_config() with changed values"
        )
    return File(config, constants)


def override(config: ml_collections.ConfigDict, overrides: Mapping[str, str]) -> None:
    """Set keys of a configuration in place, from the text of their values.

    Raises:
      UserError: an unknown key, or a value of another type.
    """
    for name, text in overrides.items():
        if name in config and name not in KEYS:
            first = next(key for key in KEYS if key.startswith(f"{name}."))
            raise UserError(f"config.{name} is a section; set its keys, such as --config.{first}=VALUE")
        if name not in KEYS:
            raise UserError(f"the configuration has no key {name!r}.{suggest_key(name)}")
        key = KEYS[name]
        try:
            is_unset = text == "None" and key.default is None
            set_value(config, name, None if is_unset else _parse(text, key.type))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
            needs = _TYPES.get(key.type, key.type.__name__)
            raise UserError(f"--config.{name}={short(text)}: it takes {needs}") from error


_TYPES = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    tuple: "a tuple, such as (1,2)",
    object: "an integer or a tuple, such as 3 or (3,5)",
}


def _parse(text: str, kind: type) -> Any:
    """Parse a text as a value of the type `kind`.

    Raises:
      ValueError, SyntaxError, MemoryError, RecursionError: the text is malformed.
    """
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
    """Return the path of a configuration file, given as a path or as a name in configs/.

    Raises:
      UserError: there is no such file.
    """
    path = Path(name)
    if path.suffix == ".py" and os.path.isfile(path):
        return path
    packaged = Path(str(resources.files("structvit_jax"))) / "configs"
    candidate = packaged / f"{path.name.removesuffix('.py')}.py"
    if path.parent.name in ("", "configs") and len(path.parts) <= 2 and candidate.is_file():
        return candidate
    known = sorted(file.stem for file in packaged.glob("*.py"))
    beside = glob.glob("*.py", root_dir=path.parent) if path.suffix == ".py" else []
    hint = did_you_mean(name, [str(path.parent / file) for file in beside] or known)
    raise UserError(f"no configuration file (.py) at {name!r}.{hint}")


def _file_error(error: BaseException, path: Path) -> UserError:
    """Return the error message for an exception that the code of a configuration file raised."""
    frames = list(traceback.walk_tb(error.__traceback__))
    lines = [line for frame, line in frames if frame.f_code.co_filename == str(path)]
    where = f"{path}:{lines[-1]}" if lines else str(path)
    # ConfigDict's exception for a missing key has only a message. The key is a local name of its method.
    names, missing = frames[-1][0].f_locals, isinstance(error, AttributeError | KeyError)
    if missing and isinstance(names.get("self"), ml_collections.ConfigDict):
        key = str(names.get("attribute", names.get("key")))
        return UserError(f"{where}: the configuration has no key {key!r}.{suggest_key(key)}")
    text = " ".join(str(error).split())[:300]
    return UserError(f"{where}: {type(error).__name__}: {text}")


def suggest_key(wrong: str) -> str:
    """Return " Did you mean ...?" with at most three keys, or how to list all keys if none is similar."""
    section, _, name = wrong.rpartition(".")
    plain = name.lower().replace("_", "")
    last = {key: key.rpartition(".")[2] for key in KEYS}
    near = [key for key in KEYS if last[key] == name or last[key].replace("_", "") == plain]
    near += [_SYNONYMS[plain]] if plain in _SYNONYMS else []
    near = near or difflib.get_close_matches(wrong, KEYS, n=2, cutoff=0.7)
    near = near or [key for key in KEYS if difflib.SequenceMatcher(None, name, last[key]).ratio() > 0.75]
    if not near:
        return " structvit show --keys lists all keys."
    near = sorted(dict.fromkeys(near), key=lambda key: not key.startswith(f"{section}."))[:3]
    return " Did you mean " + " or ".join(f"config.{key}" for key in near) + "?"
