"""What a configuration means, without training: the config, the model's parts, the batch, the steps."""

from __future__ import annotations

from typing import Any

import ml_collections

from structvit_jax.config import durations, model_arguments
from structvit_jax.models import cost


def describe(config: ml_collections.ConfigDict, data: Any) -> str:
    """The text of `--mode=show`.

    Raises:
      UserError: a model that does not take the data's shape.
    """
    arguments = model_arguments(config)
    counted = cost(arguments.pop("name"), data.shape, len(data.class_names), **arguments)
    steps = durations(config, data.rows_per_epoch)
    rows = [("part", "parameters", "multiply-accumulates")]
    rows += [(name, f"{part.params:,}", f"{part.macs:,}") for name, part in counted.parts.items()]
    rows += [("total", f"{counted.params:,}", f"{counted.macs:,}")]
    wide = [max(len(row[column]) for row in rows) for column in range(3)]
    table = [f"  {a:<{wide[0]}}  {b:>{wide[1]}}  {c:>{wide[2]}}" for a, b, c in rows]
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
