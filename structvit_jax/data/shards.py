"""ArrayRecord shards of a folder of clips or images, for clusters."""

from __future__ import annotations

from collections.abc import Sequence

from structvit_jax.data.folder import Layout, is_video, read_splits
from structvit_jax.data.shard_writer import write_shards
from structvit_jax.utils.paths import write_errors_as_user_error


def write(
    root: str,
    out: str,
    *,
    train_split: str = "train",
    test_split: str = "val",
    val_fraction: float = 0.0,
    images: bool = False,
    shards: int = 0,
    beam_runner: str = "",
    beam_options: Sequence[str] = (),
) -> None:
    """Write the shards of a folder and print how many examples they hold.

    Args:
      root: a folder as `structvit_jax.data.folder` describes it.
      out: what becomes the config.data.root to train from; a folder or a bucket.
      train_split, test_split, val_fraction: of the folder, as in a configuration.
      images: whether files are images; otherwise what most of them are.
      shards: files per split; 0 chooses.
      beam_runner: of Apache Beam, as "DirectRunner"; without it one process writes.
      beam_options: of Beam's pipeline, as "key=value".

    Raises:
      UserError: a folder that is not understood, or an output that cannot be written.
    """
    layout = Layout(root, train_split, test_split, val_fraction, option="--")
    splits = read_splits(layout, video=not images and is_video(layout))
    names = (name.strip("./") or "train" for name in (train_split, test_split))
    indices = dict(zip(names, splits, strict=True))
    with write_errors_as_user_error(out):
        write_shards(indices, out, shards=shards, runner=beam_runner, options=list(beam_options))
    print(f"{out}: {', '.join(f'{len(index)} {name}' for name, index in indices.items())} examples")
