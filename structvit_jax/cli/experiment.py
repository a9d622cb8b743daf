"""Open the data and the devices of a configuration."""

from __future__ import annotations

from typing import NamedTuple

import ml_collections
from etils import epath

from structvit_jax import data
from structvit_jax.config import automatic, check_config
from structvit_jax.data.media import configure_decoding
from structvit_jax.utils import cores
from structvit_jax.utils.paths import parse_path


class Experiment(NamedTuple):
    """A configuration without open keys, and its data."""

    config: ml_collections.ConfigDict
    workdir: epath.Path
    dataset: data.Dataset


def open_experiment(
    config: ml_collections.ConfigDict, workdir: str, *, survey: bool = False, cached: bool = True
) -> Experiment:
    """Open the data of a configuration, fill in its open keys, open its devices, and log the chosen values.

    Args:
      config: see `structvit_jax.cli.configuration.load_config`.
      workdir: folder of the run; if it has a checkpoint, that sets the open keys.
      survey: if the data are files, examine them first and log warnings.
      cached: cache compiled programs; False for those of other machines, which cannot be loaded here.

    Raises:
      UserError: a configuration, data or devices that cannot be used.
    """
    from structvit_jax.runtime import processes
    from structvit_jax.training import start

    configure_decoding()
    folder, lines = parse_path(workdir), list[str]()
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
    dataset = data.load(config.data, config.augment, config.train.seed, splits)
    if survey and dataset.in_files:
        found = dataset.survey()
        found.check()
        lines += found.lines()
    select_devices(config, cached=cached)
    cores.share_cores(processes.processes_on_these_cores())
    for line in lines:
        processes.log(line)
    return Experiment(config, folder, dataset)


def select_devices(config: ml_collections.ConfigDict, *, cached: bool = True) -> None:
    """Open the devices of config.mesh; with `cached`, use its cache of compiled programs."""
    from structvit_jax.runtime import devices

    devices.select_devices(config.mesh.device)
    devices.use_compilation_cache(config.mesh.compilation_cache if cached else "")
