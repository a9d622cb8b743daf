"""Writes ArrayRecord shards of encoded clips or images, for clusters.

    python -m structvit_jax.data.shards ROOT OUT [--train_split=train] [--test_split=val] [--images]
        [--shards=N] [--beam_runner=DirectRunner] [--beam_option=key=value ...]

ROOT is a folder as `structvit_jax.data.folder` describes it, such as `structvit_jax.data.prepare` writes; OUT
becomes the config.data.root to train from. Parts of long files are cut out without decoding. Examples that
cannot be read keep their place, with the reason, so that batches are the same as from ROOT. With a Beam
runner records are made in parallel (pip install -c requirements.lock -e ".[beam]"). If OUT is a bucket,
shards are written to a local disk and then copied; training reads them where the bucket is mounted.
"""

from __future__ import annotations

import argparse
import sys

from structvit_jax.data.folder import Layout, is_video, read_splits
from structvit_jax.data.shard_writer import write_shards
from structvit_jax.errors import exit_in_one_line
from structvit_jax.paths import writing


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root")
    parser.add_argument("out")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--test_split", default="val")
    parser.add_argument("--val_fraction", type=float, default=0.0, help="to hold out without a test split")
    parser.add_argument(
        "--images", action="store_true", help="files are images; by default what most of them are"
    )
    parser.add_argument("--shards", type=int, default=0, help="files per split")
    parser.add_argument("--beam_runner", default="", help="as DirectRunner; without it, one process")
    parser.add_argument("--beam_option", action="append", default=[], help="key=value, of Beam's pipeline")
    chosen = parser.parse_args(arguments)
    layout = Layout(chosen.root, chosen.train_split, chosen.test_split, chosen.val_fraction, option="--")
    splits = read_splits(layout, video=not chosen.images and is_video(layout))
    names = (name.strip("./") or "train" for name in (chosen.train_split, chosen.test_split))
    indices = dict(zip(names, splits, strict=True))
    with writing(chosen.out):
        write_shards(
            indices, chosen.out, shards=chosen.shards, runner=chosen.beam_runner, options=chosen.beam_option
        )
    print(f"{chosen.out}: {', '.join(f'{len(index)} {name}' for name, index in indices.items())} examples")


if __name__ == "__main__":
    with exit_in_one_line():
        main(sys.argv[1:])
