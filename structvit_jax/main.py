"""Trains, evaluates, shows, plans or benchmarks a configuration, or draws its data.

    python -m structvit_jax.main --config=configs/moving_digits.py [--mode=train|eval|show|plan|data|bench]
        [--workdir=DIR] [--peer=torch] [--config.section.key=value ...]

The same command resumes a run that was interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import ml_collections
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from structvit_jax import data, open_keys, signals
from structvit_jax.command import config_path, parse_flags
from structvit_jax.config import check_config
from structvit_jax.errors import UserError, exit_in_one_line

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, as configs/moving_digits.py.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "eval", "show", "plan", "data", "bench"],
    "What to do with the configuration.",
)
_PEER = flags.DEFINE_enum("peer", None, ["torch"], "For --mode=bench: what to compare with.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run lives; by default runs/NAME.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; options start with --")
    config = _CONFIG.value
    open_keys.check_given(config)
    if _PEER.value and _MODE.value != "bench":
        raise UserError("--peer is for --mode=bench")
    if _MODE.value != "train":
        signals.LISTENER.stop()
    from structvit_jax.training import processes, watch  # here, so that a mistake in flags is told at once

    if _MODE.value in ("train", "eval"):
        processes.join(config.mesh.heartbeat, stoppable=_MODE.value == "train")
    with watch.ending_together(config.mesh.heartbeat):
        _act(config)


def _open(config: ml_collections.ConfigDict, workdir: epath.Path) -> _Opened:
    """Fill in the keys that a configuration leaves open and open its data. Opens no device.

    Raises:
      UserError: a configuration or data that cannot be used; in training, data that make it pointless.
    """
    from structvit_jax.training import start

    left_open = open_keys.missing(config)
    config = start.settle(config, workdir)
    if left_open:
        open_keys.fill_model(config, lambda: data.is_video(config.data))
    splits = data.sources(config.data, config.train.seed)
    lines = []
    if left_open:
        typical = data.typical(splits[0])
        facts = open_keys.DataFacts(len(splits[0]), len(splits[1]), *typical[:3])
        open_keys.fill(config, facts)
        lines.append(open_keys.describe(config, facts))
    check_config(config)
    return _Opened(config, data.load(config.data, config.augment, config.train.seed, splits), lines)


class _Opened(NamedTuple):
    """What --mode acts on."""

    config: ml_collections.ConfigDict
    dataset: data.Dataset
    lines: list[str]  # to print


def _survey(dataset: data.Dataset) -> list[str]:
    """Look at the data before training, and return the lines to print.

    Raises:
      UserError: data that make a training pointless.
    """
    if _MODE.value == "data":
        found = dataset.survey()
        print(found.table(), flush=True)
        found.check()
        return []
    if _MODE.value != "train" or not dataset.in_files:
        return []
    found = dataset.survey()
    found.check()
    return found.lines()


def _act(config: ml_collections.ConfigDict) -> None:
    """Do what --mode says."""
    from structvit_jax.paths import parse_path

    workdir = parse_path(_WORKDIR.value or os.path.join("runs", config_path(sys.argv).stem))
    config, dataset, lines = _open(config, workdir)
    lines += _survey(dataset)
    # here, so that a mistake in the data is reported at once
    from structvit_jax import bench, chips, plan, sheet, show
    from structvit_jax.training import loop, mesh, processes, storage

    cache = config.mesh.compilation_cache
    if _MODE.value == "plan" and config.topologies:
        chips.pretend_devices(tuple(config.topologies))
        cache = ""  # programs for other machines cannot be read back
    mesh.select_devices(config.mesh.device)
    mesh.use_compilation_cache(cache)
    for line in lines:
        processes.say(line)
    if _MODE.value == "show":
        print(show.describe(config, dataset))
        return
    if _MODE.value == "plan":
        print(plan.describe(config, dataset, workdir))
        return
    if _MODE.value == "bench":
        bench.run(config, dataset, workdir, _PEER.value)
        return
    if _MODE.value == "data":
        path = workdir / "batch.png"
        with storage.naming_failures(workdir):
            rows = sheet.write(config, dataset, path)
        print(f"{path}: {rows} rows of the first batch, as the model gets them")
        return
    if _MODE.value == "eval":
        loop.evaluate(config, workdir, workdir, dataset)
        return
    loop.train(config, workdir, dataset)


def _parse(argv: Sequence[str]) -> list[str]:
    """Read the flags for `app.run`, which takes positional arguments with the program's name."""
    return [argv[0], *parse_flags(argv, config_file=True)]


def run() -> None:
    """Run the command line: a user's mistake is one line and exit code 2."""
    signals.prepare_command(trains=True)
    logging.set_verbosity(logging.FATAL)  # Orbax logs its whole life; what matters it raises
    try:
        with exit_in_one_line():
            app.run(main, flags_parser=_parse)
    except SystemExit as end:
        if not isinstance(end.__cause__, UserError):
            raise
        sys.stdout.flush()
        os._exit(end.__cause__.exit_code)  # Python's own end would let the threads of failed saves complain


if __name__ == "__main__":
    run()
