"""Checkpoints of a run: Orbax directories `checkpoints/STEP/` with weights, optimizer state and a card.

The card is JSON and says what the weights are: class names, configuration, code version. A save that
was interrupted leaves no checkpoint, and Orbax removes its remains when the run goes on.
"""

from __future__ import annotations

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import Mesh

from structvit_jax.errors import UserError
from structvit_jax.models.weights import Weights, mismatches
from structvit_jax.training.mesh import state_sharding
from structvit_jax.training.step import TrainState

FOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints below one folder. As a context, leaving it waits for the saves under way."""

    def __init__(self, workdir: epath.PathLike, *, keep: int | None = None, read_only: bool = False):
        self._folder = epath.Path(workdir) / FOLDER
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=not read_only, read_only=read_only)
        self._manager = ocp.CheckpointManager(self._folder.resolve(), options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def latest(self) -> int | None:
        """The newest finished step."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All finished steps."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> epath.Path:
        return self._folder / str(step)

    def save(self, state: TrainState, card: dict[str, Any]) -> None:
        """Saves in the background, under the state's step."""
        items = {
            "weights": ocp.args.StandardSave(state.weights),
            "optimizer": ocp.args.StandardSave(state.optimizer),
            "card": ocp.args.JsonSave(card),
        }
        self._manager.save(int(state.step), args=ocp.args.Composite(**items))

    def card(self, step: int) -> dict[str, Any]:
        return self._restore(step, card=ocp.args.JsonRestore())["card"]

    def weights(self, step: int, like: Weights, mesh: Mesh, advice: str) -> Weights:
        """The weights of a step, placed on the mesh.

        Raises:
          UserError: they cannot be read, or do not fit `like`: names what differs, and gives `advice`.
        """
        self._check_fit(step, like, advice)
        return self._restore(step, weights=ocp.args.StandardRestore(_target(like, mesh)))["weights"]

    def state(self, step: int, like: TrainState, mesh: Mesh, advice: str) -> TrainState:
        """The whole state after a step; errors as for `weights`."""
        weights = self.weights(step, like.weights, mesh, advice)
        optimizer = ocp.args.StandardRestore(_target(like.optimizer, mesh))
        optimizer = self._restore(step, optimizer=optimizer)["optimizer"]
        return TrainState(jax.device_put(jax.numpy.int32(step), like.step.sharding), weights, optimizer)

    def _restore(self, step, **items):
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, OSError, KeyError) as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step, reason):
        reason = " ".join(str(reason).split())[:300]
        return UserError(
            f"checkpoint {self.path(step)} cannot be read ({reason}); remove it to use an older one"
        )

    def _check_fit(self, step, like, advice):
        try:
            saved = ocp.StandardCheckpointer().metadata((self.path(step) / "weights").resolve()).item_metadata
            saved = saved["params"] | saved["batch_stats"]
        except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
            raise self._unreadable(step, error) from error
        problems = mismatches(like.params | like.batch_stats, saved)
        if problems:
            card = self.card(step)
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise UserError(
                f"checkpoint {self.path(step)} holds another model than the configured one:"
                f" {card['config']['model']['name']} with {len(card['class_names'])} classes"
                f" ({', '.join(problems[:3])}{more}); {advice}"
            )


def _target(like, mesh):
    """Shapes, types and places to restore into."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, state_sharding(mesh, like)
    )


def _locate(path: str) -> tuple[epath.Path, int | None]:
    """Splits "RUN/checkpoints/STEP" into (RUN, STEP); of "RUN" alone the step is None, the latest."""
    folder = epath.Path(path)
    if folder.name.isdigit() and folder.parent.name == FOLDER:
        return folder.parent.parent, int(folder.name)
    return folder, None


def load_weights(path: str, like: Weights, mesh: Mesh) -> Weights:
    """Weights of "RUN/checkpoints/STEP", or of the latest checkpoint in "RUN"."""
    run, step = _locate(path)
    if not (run / FOLDER).exists():
        raise UserError(f"no checkpoint at {path}: it should be RUN/checkpoints/STEP, or RUN for its latest")
    with Checkpoints(run, read_only=True) as checkpoints:
        step = checkpoints.latest() if step is None else step
        if step is None or not checkpoints.path(step).exists():
            kept = ", ".join(map(str, checkpoints.steps())) or "none"
            raise UserError(f"no finished checkpoint at {path}; {run} holds these steps: {kept}")
        advice = "config.init_from takes weights of the configured model"
        return checkpoints.weights(step, like, mesh, advice)
