"""Trains, evaluates or shows a configuration.

    python -m structvit_jax.main --config=configs/moving_digits.py [--mode=train|eval|show]
        [--workdir=DIR] [--config.section.key=value ...]

The same command resumes a run that was interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from structvit_jax import data
from structvit_jax.config import check_config
from structvit_jax.errors import UserError, did_you_mean

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, as configs/moving_digits.py.")
_MODE = flags.DEFINE_enum("mode", "train", ["train", "eval", "show"], "What to do with the configuration.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; by default runs/NAME.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    config = _CONFIG.value
    check_config(config)
    dataset = data.load(
        config.data.name,
        train_examples=config.data.train_examples,
        test_examples=config.data.test_examples,
        seed=config.train.seed,
    )
    if _MODE.value == "show":
        from structvit_jax import show

        print(show.describe(config, dataset))
        return

    from structvit_jax.training import loop, mesh

    mesh.select_devices(config.mesh.device)
    workdir = epath.Path(_WORKDIR.value or os.path.join("runs", epath.Path(_config_path(sys.argv)).stem))
    {"train": loop.train, "eval": loop.evaluate_run}[_MODE.value](config, workdir, dataset)


def _config_path(argv: Sequence[str]) -> str:
    """The file that --config names, without an argument after ':'."""
    for position, word in enumerate(argv):
        if word.startswith("--config="):
            return word.removeprefix("--config=").split(":")[0]
        if word == "--config" and position + 1 < len(argv):
            return argv[position + 1].split(":")[0]
    raise UserError("say which configuration: --config=configs/moving_digits.py")


def _parse(argv: Sequence[str]) -> list[str]:
    """Reads the flags; whatever is wrong with them becomes one line that says what is near."""
    if not any(word.startswith("--help") for word in argv):
        path = epath.Path(_config_path(argv))
        if not path.exists():
            known = [str(file) for file in path.parent.glob("*.py")] if path.parent.exists() else []
            raise UserError(f"no configuration at {path}.{did_you_mean(str(path), known) if known else ''}")
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, KeyError, AttributeError, TypeError) as error:
        message = error.args[0] if error.args else error
        raise UserError(" ".join(str(message).strip("'\"").replace("\\n", " ").split())) from error


def run() -> None:
    """The command line: a user's mistake is one line and exit code 2."""
    logging.set_verbosity(logging.ERROR)  # Orbax tells its whole life at lower levels
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
