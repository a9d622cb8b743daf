"""`structvit show`: describe a configuration, or draw a batch of its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from structvit_jax.cli.options import ConfigArguments, ConfigCommand

if TYPE_CHECKING:
    import ml_collections

    from structvit_jax.data import Dataset


@click.command(cls=ConfigCommand)
@click.option(
    "--data", "shows_data", is_flag=True, help="Examine the data, and draw a batch to WORKDIR/batch.png."
)
@click.option("--keys", "lists_keys", is_flag=True, help="List all keys of a configuration and exit.")
def command(arguments: ConfigArguments, shows_data: bool, lists_keys: bool) -> None:
    """Describe a configuration, or draw a batch of its data.

    Prints all keys, the number of parameters and multiply-accumulates of each part of the model, the shapes
    of a batch, and the number of steps.

    \b
    Example:
      structvit show --config=moving_digits
      structvit show --config=folder --config.data.root=DIR --data
      structvit show --keys
    """
    if lists_keys:
        from structvit_jax.config import describe_keys

        print(describe_keys())
        return
    from structvit_jax.cli.configuration import load_config
    from structvit_jax.cli.experiment import open_experiment

    config = load_config(arguments)
    if shows_data and config.data.workers < 0:
        config.data.workers = 0  # threads read one batch before processes have started
    opened = open_experiment(config, arguments.workdir)
    if not shows_data:
        print(describe(opened.config, opened.dataset))
        return
    found = opened.dataset.survey()
    print(found.table(), flush=True)
    found.check()

    from structvit_jax.analysis import batch_preview
    from structvit_jax.runtime import storage

    path = opened.workdir / "batch.png"
    with storage.io_errors_as_user_error(opened.workdir):
        rows = batch_preview.write(opened.config, opened.dataset, path)
    print(f"{path}: {rows} rows of the first batch, as the model sees them")


def describe(config: ml_collections.ConfigDict, data: Dataset) -> str:
    """Describe the configuration, the parts of its model, its batches and its steps as text.

    Raises:
      UserError: the model does not fit the shape of the data.
    """
    from structvit_jax.config import durations, model_arguments
    from structvit_jax.performance.cost import cost
    from structvit_jax.utils.tables import align_columns

    arguments = model_arguments(config)
    counted = cost(arguments.pop("name"), data.shape, len(data.class_names), **arguments)
    steps = durations(config, data.rows_per_epoch)
    rows = [("part", "parameters", "multiply-accumulates")]
    rows += [(name, f"{part.params:,}", f"{part.macs:,}") for name, part in counted.parts.items()]
    rows += [("total", f"{counted.params:,}", f"{counted.macs:,}")]
    table = [f"  {line}" for line in align_columns(rows)]
    kinds = ", ".join(f"{kind} {macs:,}" for kind, macs in counted.kinds.items())
    batch = config.data.batch_size
    return "\n".join(
        [
            str(config).rstrip(),
            "",
            f"{config.model.name}, {len(data.class_names)} classes, one example:",
            *table,
            f"  by kind: {kinds}",
            "",
            f"batch: inputs uint8 {[batch, *data.shape]},"
            f" labels int32 [{batch}], mask bool [{batch}], index int32 [{batch}]",
            f"{data.train_examples} training and {data.test_examples} test {data.unit};"
            f" {data.rows_per_epoch / batch:g} steps per epoch, {steps.total} in all,"
            f" {steps.warmup} of them warm-up",
        ]
    )
