"""Command lines: flags of a configuration, its errors in one line, and did-you-mean suggestions."""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from typing import Any

import ml_collections
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from structvit_jax.card import from_card, keys_of
from structvit_jax.config import check_config, default_config
from structvit_jax.errors import UserError, did_you_mean, exit_in_one_line

_NO_CONFIGS = (
    " The configurations are in the repository, in configs/, and are not installed with the package: run this"
    " in a clone, or give the path of such a file with --config=PATH"
)

# What other projects call our keys, by the last word of the key, lower case and without underscores.
_SYNONYMS = {
    **dict.fromkeys(("learningrate", "baselr", "maxlr", "peaklr"), "optimizer.lr"),
    **dict.fromkeys(("epochs", "numepochs", "steps", "numsteps", "maxsteps", "maxepochs"), "train.duration"),
    **dict.fromkeys(("warmupsteps", "warmupepochs"), "optimizer.warmup"),
    **dict.fromkeys(("minlr", "finallr"), "optimizer.end_lr"),
    **dict.fromkeys(("wd", "decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("gradclip", "clipgrad", "maxgradnorm", "gradientclipping"), "optimizer.clip_norm"),
    **dict.fromkeys(("emadecay", "modelema"), "optimizer.ema"),
    **dict.fromkeys(("gradaccum", "accumsteps", "gradientaccumulationsteps"), "train.accumulate"),
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

_IS_USER_ERROR = f"{UserError.__module__}.{UserError.__name__}: "  # in the text of a traceback


def parse_flags(
    argv: Sequence[str],
    *,
    config_file: bool = False,
    config: ml_collections.ConfigDict | None = None,
    known_only: bool = False,
) -> list[str]:
    """Read flags, also those of a configuration; return positional arguments without the program's name.

    If a key of a configuration is given more than once, the last value counts, also of tuples. --help and -h
    print the help and exit with 0.

    Args:
      argv: the command line with the program's name.
      config_file: whether --config has to name a file.
      config: changed in place by flags of its keys.
      known_only: leaves unknown flags among the positional arguments.

    Raises:
      UserError: an unknown flag or key, a value that it does not take, or a configuration file that fails.
    """
    app.define_help_flags()
    words = _last_values(argv)
    if help_words := [word for word in argv if re.fullmatch(r"-h|-\?|--?help\w*", word)]:
        words = [argv[0], "--help" if help_words[0] == "-h" else help_words[0]]
    elif config_file:
        config_path(argv)
    try:
        if config is not None:
            config_flags.DEFINE_config_dict("config", config, "See structvit_jax.config.")
        positional = flags.FLAGS(words, known_only=known_only)[1:]
        if config_file:
            _check_structure(flags.FLAGS["config"].value)
        return positional
    except SystemExit as end:
        raise SystemExit(0 if help_words else end.code) from end  # absl's is 1 after --help
    except Exception as error:
        cause = error.__cause__ if isinstance(error, OSError) else None  # the file's own error
        raise _config_error(cause or error, words) from error


def _check_structure(config: Any) -> None:
    """Raise UserError if what a file returned is no configuration, and the OSError that kept it from being
    read."""
    items = getattr(config, "items", None)
    if items is None or {key for key, _ in keys_of(config)} != {key for key, _ in keys_of(default_config())}:
        raise UserError(
            "the configuration does not have the right keys: get_config() has to return"
            " structvit_jax.config.default_config() with other values"
        )


def _last_values(words: Sequence[str]) -> list[str]:
    """Leave out values of configuration keys that are given again; ml_collections would join tuples."""
    kept: list[list[str]] = []
    for word in words:
        follows = kept and re.fullmatch(r"--?config\.[\w.]+", kept[-1][0]) and len(kept[-1]) == 1
        if follows and not word.startswith("-"):
            kept[-1].append(word)  # --config.key value
        else:
            kept.append([word])
    last = {_key_of(group[0]): number for number, group in enumerate(kept)}
    groups = [g for number, g in enumerate(kept) if not _key_of(g[0]) or last[_key_of(g[0])] == number]
    return [word for group in groups for word in group]


def _key_of(word: str) -> str:
    """Return "optimizer.lr" of "--config.optimizer.lr=1"; "" of other words."""
    match = re.match(r"--?(?:no)?config\.([\w.]+)", word)
    return match[1] if match else ""


def _config_error(error: BaseException, words: Sequence[str]) -> UserError:
    """Return the line for an exception while a configuration was read: an unknown key, or an error of the
    file itself, with its line."""
    keys = [key for key, _ in keys_of(default_config())]
    sections = {key.rpartition(".")[0] for key in keys}
    wrong = next((key for key in map(_key_of, words) if key and key not in (*keys, *sections)), "")
    if isinstance(error, KeyError | AttributeError) and wrong:
        return UserError(f"the configuration has no key {wrong!r}.{suggest_key(wrong, keys)}")
    if isinstance(error, SyntaxError):
        return UserError(f"{error.filename}:{error.lineno}: {error.msg}")
    if isinstance(error, UserError):
        return error
    path = str(_named_config(words)) if any(map(re.compile("--?config(=|$)").match, words)) else ""
    if isinstance(error, AttributeError) and error.name == "get_config":
        return UserError(f"{path} has no function get_config()")
    text = _last_line(error)
    if _IS_USER_ERROR in str(error):  # of the file's own
        return UserError(text)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    lines += map(int, re.findall(rf'File "{re.escape(path)}", line (\d+)', str(error)))  # of ml_collections
    where = f"{path}:{lines[-1]}: " if lines else ""
    if isinstance(error, AttributeError | KeyError) and (word := _unknown_word(str(error))):
        return UserError(f"{where}the configuration has no key {word!r}.{suggest_key(word, keys)}")
    is_named = isinstance(error, flags.Error) or text.startswith(type(error).__name__)
    return UserError(f"{where}{'' if is_named else f'{type(error).__name__}: '}{text[:300]}")


def suggest_key(wrong: str, keys: Collection[str]) -> str:
    """Return ' Did you mean ...?' with keys that may have been meant by `wrong`, or where to find all."""
    section, _, word = wrong.rpartition(".")
    plain = word.lower().replace("_", "")
    last = {key: key.rpartition(".")[2] for key in keys}
    near = [key for key in keys if last[key] == word or last[key].replace("_", "") == plain]
    if plain in _SYNONYMS:
        near.append(_SYNONYMS[plain])
    close = difflib.get_close_matches(wrong, keys, n=2, cutoff=0.7)
    near = near or close or [k for k in keys if difflib.SequenceMatcher(None, word, last[k]).ratio() > 0.75]
    if not near:
        return " --mode=show prints all keys."
    near = sorted(dict.fromkeys(near), key=lambda key: not key.startswith(f"{section}."))[:3]
    return " Did you mean " + " or ".join(f"config.{key}" for key in near) + "?"


def run_command(main: Callable[[list[str]], None]) -> None:
    """Run a module that is a command: an expected failure is one line and its exit code."""
    logging.set_verbosity(logging.FATAL)  # Orbax logs its whole life; what matters it raises
    with exit_in_one_line():
        main(sys.argv)


def config_path(argv: Sequence[str]) -> epath.Path:
    """The file that --config names, without an argument after ':'.

    Raises:
      UserError: none, or one that is not there.
    """
    path = _named_config(argv)
    if path.suffix != ".py" or not os.path.isfile(path):  # epath takes a pipe for a file
        folder = path if path.is_dir() else path.parent
        known = [str(file) for file in folder.glob("*.py")] if folder.is_dir() else []
        hint = did_you_mean("" if path.is_dir() else str(path), known) if known else _NO_CONFIGS
        raise UserError(f"no configuration file (.py) at {str(path)!r}.{hint}")
    return path


def _named_config(argv: Sequence[str]) -> epath.Path:
    for position, word in enumerate(argv):
        if (match := re.match("--?config=(.*)", word)) and match[1]:
            return epath.Path(match[1].split(":")[0])
        if word in ("--config", "-config") and position + 1 < len(argv):
            return epath.Path(argv[position + 1].split(":")[0])
    raise UserError("say which configuration: --config=configs/moving_digits.py")


def checkpoint_config(argv: Sequence[str], *positional: str) -> list[Any]:
    """What a command that acts on a checkpoint is given: its positional arguments, the first of them the
    checkpoint, and the configuration of its card, with what flags change of it.

    Raises:
      UserError: other arguments, no checkpoint, or flags that do not fit.
    """
    given = _words(argv)
    if len(given) != len(positional):
        raise UserError(f"it takes {' '.join(positional)}, and flags as --config.data.root=DIR; see --help")
    return [*_of_card(argv, given[0])[:2], *given[1:]]


def checkpoint_and_paths(argv: Sequence[str], paths: str) -> tuple[str, Any, list[str]]:
    """The same for a command that acts on files: --checkpoint, the configuration, and the files' paths, of
    which there is one at least; `paths` is what they are called."""
    checkpoint = flags.DEFINE_string("checkpoint", None, "RUN/checkpoints/STEP, or RUN for its latest.")
    if _words(argv) and checkpoint.value:
        where, config, files = _of_card(argv, checkpoint.value)
        if files:
            return where, config, files
    raise UserError(f"it takes --checkpoint=RUN, {paths}, and flags as --config.data.size=N; see --help")


def _words(argv):
    """Return positional arguments before the keys are known: a key's value that stands apart is one, too."""
    return [word for word in parse_flags(argv, known_only=True) if not word.startswith("-")]


def _of_card(argv, checkpoint):
    """Return the checkpoint as it was given, the configuration of its card with what flags change of it, and
    positional arguments. A run that is training may replace its newest checkpoint meanwhile."""
    from structvit_jax.training import (
        mesh,  # here, so that a mistake in other commands' flags is told at once
    )
    from structvit_jax.training.restore import open_card

    key = "--config.mesh.device="  # asked first, since reading the card opens a device
    mesh.select_devices(next((word.removeprefix(key) for word in argv if word.startswith(key)), "auto"))
    config = from_card(open_card(checkpoint)["config"], checkpoint)
    words = parse_flags(argv, config=config)
    check_config(config)
    mesh.use_compilation_cache(config.mesh.compilation_cache)
    return checkpoint, config, words


def _unknown_word(message: str) -> str:
    """Return the key that a locked configuration does not have, from the message of ml_collections; "" if it
    says something else."""
    patterns = (r'(?s).*instead of "(\w+)".*', r"""(?s)['"]+Key "(\w+)".*""", r"""['"]+(\w+)['"]+""")
    match = next(filter(None, (re.fullmatch(pattern, message) for pattern in patterns)), None)
    return match[1] if match else ""


def _last_line(error: BaseException) -> str:
    """Return what an error says, without the traceback that ml_collections puts before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1].removeprefix(_IS_USER_ERROR)
