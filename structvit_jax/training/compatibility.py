"""Check that the data of a run fit a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath

from structvit_jax.data.types import Dataset
from structvit_jax.runtime import processes
from structvit_jax.runtime.processes import log
from structvit_jax.utils.errors import UserError


def adopt_classes(data: Dataset, card: Mapping[str, Any]) -> None:
    """Number the labels of the data like the classes of a checkpoint, by name.

    Raises:
      UserError: the data have other classes, or the checkpoint does not name its classes.
    """
    if card["class_names"] is None:
        raise UserError(
            "the checkpoint does not name its classes, so its outputs cannot be matched to the data's labels;"
            " name them with structvit convert CHECKPOINT DESTINATION --labels=FILE, one a line"
        )
    if data.adopt_classes(card["class_names"]):
        log("note: the classes of the data are in another order than the checkpoint's; matched by name")


def check_data(data: Dataset, card: Mapping[str, Any], path: epath.Path, *, is_complete: bool) -> None:
    """Compare the data with those that a checkpoint was trained on.

    An incomplete run may continue if half of a common sample is the same, for example after files were
    repaired.

    Args:
      data: of the run.
      card: of the checkpoint.
      path: of the checkpoint, for error messages.
      is_complete: whether the checkpoint is the last of its run.

    Raises:
      UserError: the run is complete and the data differ, or most of the data differ.
    """
    if not card.get("data"):  # converted weights
        return
    changes = processes.broadcast_from_primary(lambda: data.changes_since(card["data"]))
    if changes.same:
        return
    if is_complete or 2 * changes.alike < changes.sampled:
        kind = "the complete run of" if is_complete else "a run on"
        raise UserError(
            f"{path} is {kind} other data ({changes.described}); choose another --workdir for these, or"
            " evaluate the checkpoint on them with --mode=eval"
        )
    log(f"note: the data have changed ({changes.described})")


def same_test_data(data: Dataset, card: Mapping[str, Any]) -> bool:
    """Return whether the test data are those of a checkpoint's run, by their fingerprint."""
    changes = processes.broadcast_from_primary(lambda: data.changes_since(card["data"], test_only=True))
    return changes.same
