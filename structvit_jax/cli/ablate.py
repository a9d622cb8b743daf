"""`structvit ablate`: train and compare a grid of models and seeds."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

from structvit_jax.cli import options
from structvit_jax.cli.options import ConfigArguments
from structvit_jax.utils.errors import UserError, check_choice

if TYPE_CHECKING:
    from structvit_jax.analysis.ablate.study import Study

_MAX_RATE = 3.4e38  # just below the largest float32


class _Rates(click.ParamType):
    """Learning rates: a text of numbers separated by commas, or a sequence of numbers."""

    name = "rates"

    def convert(
        self, value: str | Iterable[float], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        try:
            rates = tuple(map(float, value.split(",") if isinstance(value, str) else value))
        except (TypeError, ValueError):
            rates = ()
        if not rates or not all(0 < rate < _MAX_RATE for rate in rates):
            self.fail(f"{value!r} is not a list of positive numbers, such as 1e-3,2e-3", param, ctx)
        return rates


@click.command(cls=options.ConfigCommand)
@click.option(
    "--arms",
    multiple=True,
    metavar="'NAME: KEY=VALUE ...'",
    help="Name of an arm, and the configuration keys that it changes; repeat the option for each arm.",
)
@click.option(
    "--against", metavar="NAME", help="Arm that the others are compared with. Default: the first arm."
)
@click.option("--same_time", metavar="NAME", help="Also train all arms for the training time of this arm.")
@click.option(
    "--lrs", type=_Rates(), metavar="LIST", help="Peak learning rates to try; each arm uses its best."
)
@click.option(
    "--tune_seeds",
    type=click.IntRange(min=1),
    metavar="N",
    help="Runs per learning rate, scored on validation examples.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), metavar="N", help="Runs per arm, scored on held-out test examples."
)
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help="How often to measure the time of a step; the median is used.",
)
def command(arguments: ConfigArguments, **chosen: Any) -> None:
    """Train a grid of arms and seeds, and compare the arms.

    An arm is a variant of the configuration: a name, and the keys that it changes. The dictionary STUDY in
    the configuration file sets the arms and the other options; the command line overrides it. The learning
    rate of each arm is selected on validation examples. Then the arm is trained with several seeds and scored
    on held-out test examples. Differences between arms are reported with confidence intervals. After each
    arm, ablation.md (tables), ablation.json (all runs) and ablation.png are written to the workdir. Re-run
    the command to resume.

    \b
    Example:
      structvit ablate --config=ablate_digits
      structvit ablate --config=digits --arms='D=1: model.structure_dim=1' --arms='D=4: model.structure_dim=4'
    """
    from structvit_jax.cli import experiment
    from structvit_jax.cli.configuration import load_file, override
    from structvit_jax.config import check_config
    from structvit_jax.utils.paths import parse_path

    file = load_file(arguments.file)
    override(file.config, arguments.overrides)
    check_config(file.config)
    changes = {name: value for name, value in chosen.items() if value not in (None, ())}
    study = _study(file.constants.get("STUDY", {}), changes)
    experiment.select_devices(file.config)
    from structvit_jax.analysis.ablate.ablation import Ablation

    ablation = Ablation(file.config, study, parse_path(arguments.workdir))
    ablation.run(shlex.join(sys.argv[2:]))


def _study(defaults: object, changes: Mapping[str, Any]) -> Study:
    """Merge STUDY of a configuration file with the options of the command line, which take precedence.

    Raises:
      UserError: STUDY is not a dictionary, or has an unknown key.
      click.BadParameter: a value in STUDY is not valid for the option of the same name.
    """
    from structvit_jax.analysis.ablate.study import Study

    if not isinstance(defaults, Mapping):
        raise UserError(
            f"STUDY in the configuration file should be a dictionary, not {type(defaults).__name__}"
        )
    context = click.get_current_context()
    known = {str(option.name): option for option in context.command.params if option.name in Study._fields}
    checked = {
        key: known[check_choice("key of STUDY", str(key), known)].type_cast_value(context, value)
        for key, value in defaults.items()
    }
    return Study(**{"arms": (), **checked, **changes})
