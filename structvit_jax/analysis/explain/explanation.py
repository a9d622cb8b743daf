"""Explain an image or a video: write the picture, the page and the animation of `structvit explain`."""

from __future__ import annotations

from collections.abc import Sequence

import ml_collections
import numpy as np

from structvit_jax.analysis.explain import animation, overlay, page, picture
from structvit_jax.analysis.explain.choice import SCORE, choose
from structvit_jax.analysis.explain.maps import layers, position_of, query_maps
from structvit_jax.analysis.explain.page import ModelView
from structvit_jax.analysis.explain.picture import Drawing, Line
from structvit_jax.inference.trained import TrainedModel, load_trained
from structvit_jax.runtime.storage import write
from structvit_jax.training.checkpoint import FOLDER
from structvit_jax.utils.errors import UserError, check_choice
from structvit_jax.utils.failures import DecodeError, printable
from structvit_jax.utils.paths import parse_path, write_errors_as_user_error

_GREY = "#5a5a5a"
_VERDICTS = {None: ("", _GREY), True: (" ✓", "#1b7837"), False: (" ✗", "#b2182b")}  # mark, colour


def explain(
    checkpoint: str,
    config: ml_collections.ConfigDict,
    path: str,
    *,
    query: Sequence[str] | None,
    layer: str | None,
    head: int | None,
    smooth: bool,
    animate: str | None,
    beside: Sequence[str] | None,
    out: str,
) -> None:
    """Write the files of an explanation; print the prediction, the selected query and the paths.

    The arguments are those of `structvit explain`; `config` is the configuration of the checkpoint.

    Raises:
      UserError: a file cannot be read or written, or the layer, head or query does not exist.
    """
    if animate and config.data.frames == 0:
        raise UserError("--animate needs a model for videos; this one takes images")
    folder = parse_path(out)
    models = [_view(load_trained(checkpoint, config), path)]
    models += [_view(load_trained(other), path) for other in beside or ()]
    (view, pixels, recorded), *_ = models
    frames, crops = overlay.trimmed(recorded, [view.crop for view, _, _ in models])
    views = [view._replace(crop=crop) for (view, _, _), crop in zip(models, crops, strict=True)]

    choice = choose(
        view.layers,
        pixels,
        layer=check_choice("layer", layer, view.layers) if layer else None,
        head=head,
        point=_parse_query(query, pixels.shape[:-1]) if query else None,
    )
    selected = view.layers[choice.layer]
    maps = query_maps(selected, choice.head, position_of(selected, choice.point))
    drawing = Drawing(frames, crops[0], selected, maps, smooth)
    automatic = [
        name for name, value in (("layer", layer), ("head", head), ("query", query)) if value is None
    ]

    title = f"What attention reads in {printable(path)}"
    files: dict[str, str | bytes] = {
        "explained.png": picture.draw(drawing, _heading(path, view, drawing, automatic)),
        "explained.html": page.build(views, frames, choice, title=title, smooth=smooth),
    }
    if animate:
        files[f"explained.{animate}"] = animation.draw(drawing, animate)
    with write_errors_as_user_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write(folder / name, content)

    where = (str(int(at * side)) for at, side in zip(choice.point, pixels.shape[:-1], strict=True))
    print(f"{view.predicted}\n{view.verdict}")
    print(f"layer {choice.layer}, head {choice.head}, query {','.join(where)}")
    for name in files:
        print(printable(str(folder / name)))


def _view(trained: TrainedModel, path: str) -> tuple[ModelView, np.ndarray, np.ndarray]:
    """Predict the class of a file and compute the inputs of all attention layers.

    Returns:
      view: the model with its prediction.
      pixels: the input as the model saw it, uint8 [[time,] height, width, 3], RGB.
      frames: the frames as recorded, uint8 [time, height, width, 3], RGB.

    Raises:
      UserError: the file cannot be read.
    """
    try:
        example = trained.example(path)
    except DecodeError as error:
        raise UserError(f"{printable(path)}: {error}") from error
    pixels = example.views[trained.reader.middle]
    inputs = layers(trained.network, trained.normalized(pixels[None]))
    if trained.config.data.channels == "bgr":
        pixels = pixels[..., ::-1]

    best = trained.prediction(path, trained.scores(example.views)).best(3)
    predicted = ", ".join(f"{printable(name)} {probability:.3f}" for name, probability in best)
    is_right, verdict = None, "true class: unknown"
    if example.true_class:
        is_right = best[0][0] == example.true_class
        verdict = f"true class: {printable(example.true_class)}, {'right' if is_right else 'wrong'}"
    run, _, step = trained.where.rpartition(f"/{FOLDER}/")
    title = printable(f"{trained.config.model.name}, {run}, step {step}")
    view = ModelView(title, predicted, verdict, is_right, inputs, example.crop)
    return view, pixels, example.frames


def _parse_query(query: Sequence[str], sides: Sequence[int]) -> tuple[float, ...]:
    """Convert --query from pixels to fractions of the input's sides.

    Raises:
      UserError: the query is not inside the input.
    """
    try:
        pixel = [float(word) for word in query]
    except ValueError:
        pixel = []
    if len(pixel) != len(sides) or not all(0 <= at < side for at, side in zip(pixel, sides, strict=True)):
        zeros = ",".join("0" * len(sides))
        names, largest = "T,Y,X"[-2 * len(sides) + 1 :], ",".join(str(side - 1) for side in sides)
        raise UserError(f"--query={printable(','.join(query))} should be {names}, from {zeros} to {largest}")
    return tuple(min((at + 0.5) / side, 1 - 1e-9) for at, side in zip(pixel, sides, strict=True))


def _heading(path: str, view: ModelView, drawing: Drawing, automatic: Sequence[str]) -> list[Line]:
    """Return the text above the picture; `automatic` lists the options that were not given by the user."""
    mark, colour = _VERDICTS[view.is_right]
    layer, query = drawing.layer, drawing.query
    selection = f"Selected by the highest score ({', '.join(automatic)}): {SCORE}. " if automatic else ""
    how = "with interpolation between positions" if drawing.smooth else "as one cell per position"
    return [
        Line(printable(path), 12, "bold"),
        Line(f"predicted: {view.predicted}", 10),
        Line(view.verdict + mark, 10, "bold", colour),
        Line(view.title),
        Line(
            f"{layer.name} ({layer.kind}), grid {' × '.join(map(str, layer.grid))}, head {query.head} of"
            f" {layer.attention.heads}; effective rank of the dynamic kernels {query.rank:.2f} of"
            f" {layer.structure_dim}"
        ),
        Line(
            f"{selection}Each map has its own colour scale: {overlay.SCALES}. Maps are averaged over channels"
            f" and drawn {how}.",
            8,
            colour=_GREY,
        ),
    ]
