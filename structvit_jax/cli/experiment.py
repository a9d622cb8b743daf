"""Load the configuration of a command line and open its data."""

from __future__ import annotations

from typing import NamedTuple

import ml_collections
from etils import epath

from structvit_jax import data
from structvit_jax.cli.configuration import load_config
from structvit_jax.cli.options import Words
from structvit_jax.config import automatic, check_config
from structvit_jax.data.media import configure_decoding
from structvit_jax.utils.paths import parse_path


class Opened(NamedTuple):
    """An experiment that is ready to run."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    dataset: data.Dataset
    lines: list[str]  # to log


def load(words: Words) -> ml_collections.ConfigDict:
    """Load the configuration of a command line and check its values, except open ones.

    Raises:
      UserError: a configuration that cannot be used.
    """
    config = load_config(words)
    automatic.check_given(config)
    return config


def open_data(config: ml_collections.ConfigDict, workdir: str) -> Opened:
    """Fill in open keys of a configuration and open its data, without opening a device.

    Raises:
      UserError: a configuration or data that cannot be used.
    """
    from structvit_jax.training import start

    configure_decoding()
    folder, lines = parse_path(workdir), []
    left_open = automatic.missing(config)
    config = start.resolve_open_keys(config, folder)
    if left_open:
        automatic.fill_model(config, lambda: data.is_video(config.data))
    splits = data.sources(config.data, config.train.seed)
    if left_open:
        typical = data.typical(splits[0])
        facts = automatic.DataFacts(len(splits[0]), len(splits[1]), *typical[:3])
        automatic.fill(config, facts)
        lines.append(automatic.describe(config, facts))
    check_config(config)
    return Opened(config, folder, data.load(config.data, config.augment, config.train.seed, splits), lines)


def select_devices(config: ml_collections.ConfigDict, *, cached: bool = True) -> None:
    """Open the devices of a configuration.

    Args:
      config: its section mesh.
      cached: cache compiled programs; those for other machines cannot be loaded again.
    """
    from structvit_jax.runtime import devices

    devices.select_devices(config.mesh.device)
    devices.use_compilation_cache(config.mesh.compilation_cache if cached else "")
