"""Pictures of what a model's attention reads in an image or a video.

    python -m structvit_jax.explain --checkpoint=RUN FILE [--query=T,Y,X] [--layer=NAME] [--head=N]
        [--beside=RUN,RUN] [--out=DIR] [--config.section.key=value ...]

For one query, a position of the input: its correlations with all positions, the attention of each of the D
patterns beside the kernels that make them, and the final map, the weight with which each value counts in the
end. Writes explained.png, of one layer and head, and explained.html into DIR: a page by itself in which a
person points at a query and picks layer and head, with the models of --beside at its side.

FILE is an image, a video, a folder of frames, or test:N, example N of the data that the model was tested on.
--query counts frames and pixels as the model sees them (Y,X of an image); without it, it is the most textured
place of the middle frame. --layer is a block, as blocks3.0; without it, the last whose frames have at least
3 x 3 positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from etils import epath

from structvit_jax.command import checkpoint_and_paths, run_command
from structvit_jax.errors import DecodeError, UserError, known
from structvit_jax.explain import page, picture
from structvit_jax.explain.maps import Layer, layers, position_of, query_maps, textured
from structvit_jax.trained import Trained, load_trained
from structvit_jax.training.commit import FOLDER
from structvit_jax.training.storage import naming_failures, write

_QUERY = flags.DEFINE_list("query", None, "Frame, row and column of the position that is explained.")
_LAYER = flags.DEFINE_string("layer", None, "The attention block of the picture, as blocks3.0.")
_HEAD = flags.DEFINE_integer("head", 0, "The head of the picture.", lower_bound=0)
_BESIDE = flags.DEFINE_list("beside", [], "Checkpoints of other models for the page.")
_OUT = flags.DEFINE_string("out", ".", "Folder for the picture and the page.")
_LEAST = 3  # positions along the sides of a frame that make a map worth looking at


class Explained(NamedTuple):
    """A model and what one input makes of it."""

    trained: Trained
    pixels: np.ndarray  # uint8 [[time,] height, width, 3], RGB, as the model saw it
    layers: Mapping[str, Layer]
    says: str  # the classes that it finds most probable

    @property
    def title(self) -> str:
        run, _, step = self.trained.where.rpartition(f"/{FOLDER}/")
        return f"{self.trained.config.model.name}, {run}, step {step}"


def main(argv: list[str]) -> None:
    checkpoint, config, paths = checkpoint_and_paths(argv, "FILE")
    if len(paths) > 1:
        raise UserError(f"it explains one file; {', '.join(paths)} are {len(paths)}")
    first, *others = (
        _explained(trained, paths[0])
        for trained in (load_trained(checkpoint, config), *map(load_trained, _BESIDE.value))
    )
    name = known("layer", _LAYER.value, first.layers) if _LAYER.value else _last(first.layers)
    layer, head = first.layers[name], _HEAD.value
    point = _asked(first.pixels, _QUERY.value) if _QUERY.value else textured(first.pixels, layer.grid)
    query = query_maps(layer, head, position_of(layer, point))
    heading = f"{paths[0]}: {first.says}\n{first.title}, {name}, head {head}, {layer.kind}"
    html = page.build(
        [page.Shown(model.title, model.says, model.layers) for model in (first, *others)],
        first.pixels,
        title=f"What attention reads in {paths[0]}",
        layer=name,
        head=head,
        point=point,
    )
    folder = epath.Path(_OUT.value)
    with naming_failures(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "explained.png", picture.draw(first.pixels, layer, query, head, heading))
        write(folder / "explained.html", html)
    print(f"{first.says}\n{folder / 'explained.png'}: {name}, head {head}\n{folder / 'explained.html'}")


def _explained(trained: Trained, path: str) -> Explained:
    """Raises UserError: a file that cannot be read."""
    try:
        views = trained.read(path)
    except DecodeError as error:
        raise UserError(f"{path}: {error}") from error
    view = views[trained.reader.middle]
    x = trained.normalized(view[None])
    best = trained.prediction(path, trained.scores(views)).best(3)
    says = ", ".join(f"{name} {share:.3f}" for name, share in best)
    pixels = view[..., ::-1] if trained.config.data.channels == "bgr" else view
    return Explained(trained, pixels, layers(trained.network, x), says)


def _last(found: Mapping[str, Layer]) -> str:
    """The last layer whose maps are worth looking at, or else the last."""
    large = [name for name, layer in found.items() if min(layer.grid[-2:]) >= _LEAST]
    return (large or list(found))[-1]


def _asked(pixels: np.ndarray, words: Sequence[str]) -> tuple[float, ...]:
    """--query as shares of the input's sides."""
    sides = pixels.shape[:-1]
    try:
        place = [float(word) for word in words]
    except ValueError:
        place = []
    if len(place) != len(sides) or not all(0 <= at < side for at, side in zip(place, sides, strict=True)):
        names = "T,Y,X" if len(sides) == 3 else "Y,X"
        most = ",".join(str(side - 1) for side in sides)
        raise UserError(f"--query={','.join(words)} should be {names}, from 0 to {most}")
    return tuple((at + 0.5) / side for at, side in zip(place, sides, strict=True))


if __name__ == "__main__":
    run_command(main)
