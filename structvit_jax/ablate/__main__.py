"""Trains a grid of arms and seeds and says what they show.

    python -m structvit_jax.ablate --config=configs/ablate_digits.py [--workdir=DIR] [--config.key=value ...]

The section `ablate` of the configuration says the arms, the learning rates of which each arm takes the one
that is best on clips to tune on, and how many seeds each gets on the test clips, which nothing is chosen by.
Writes ablation.md (tables), ablation.json (every run) and ablation.png into the workdir, again after every
arm. The same command goes on where it was interrupted.
"""

from __future__ import annotations

import shlex
import sys

from absl import flags
from ml_collections import config_flags

from structvit_jax.command import config_path, parse_flags, run_command
from structvit_jax.config import check_config
from structvit_jax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file, as configs/ablate_digits.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the runs live; by default runs/NAME.")


def main(argv: list[str]) -> None:
    if surplus := parse_flags(argv, config_file=True):
        raise UserError(f"unexpected argument {surplus[0]!r}; options start with --")
    config = _CONFIG.value
    check_config(config)
    from structvit_jax.ablate import study  # here, so that a mistake in flags is told at once
    from structvit_jax.paths import parse_path
    from structvit_jax.training import mesh

    mesh.select_devices(config.mesh.device)
    mesh.use_compilation_cache(config.mesh.compilation_cache)
    study.run(
        config, parse_path(_WORKDIR.value or f"runs/{config_path(argv).stem}"), shlex.join(sys.argv[1:])
    )


if __name__ == "__main__":
    run_command(main)
