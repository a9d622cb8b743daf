"""Configurations and options with values at the ends of their ranges, or beyond them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

from attacks.case import Case, Result
from attacks.commands import DIGITS, case, short, train
from attacks.names import LONG, NINES

_case = functools.partial(case, "extremes")
_train = functools.partial(train, "extremes")

_HUGE = "9" * 30
# Keys of a training, and exit codes.
_EXTREMES: tuple[tuple[tuple[str, ...], tuple[int, ...]], ...] = (
    (("optimizer.lr=1e39",), (2,)),
    (("optimizer.lr=1e30",), (0, 2)),
    (("optimizer.eps=1e-300",), (0, 2)),
    (("optimizer.weight_decay=1e39",), (0, 2)),
    (("mesh.device=gpu",), (2,)),
    (("mesh.device=tpu",), (2,)),
    (("mesh.data=7",), (2,)),
    (("mesh.data=100000",), (2,)),
    (("mesh.fsdp=3",), (2,)),
    (("mesh.heartbeat=999999999999",), (0, 2)),
    (("mesh.compilation_cache=/dev/null/x",), (0, 2)),
    (("mesh.compilation_cache=<here>/cache",), (0,)),
    (("eval.batch_size=100000",), (0, 2)),
    (("eval.batch_size=1000000000000",), (0, 2)),
    (("data.batch_size=1000000000000000000000",), (2,)),
    (("data.size=1000000",), (2,)),
    (("data.size=1",), (2,)),
    (("data.frames=1",), (0, 2)),
    (("data.train_examples=1000000000000",), (0, 2)),
    (("data.train_examples=0",), (2,)),
    (("data.test_examples=0",), (0, 2)),
    (("data.test_clips=1000000",), (0, 2)),
    (("data.short_side=1000000",), (0, 2)),
    (("data.stride=1000000",), (0, 2)),
    (("data.crop_fraction=1e-300",), (2,)),
    (("data.test_split=tune", "data.train_split="), (0, 2)),
    (("model.remat=full",), (0,)),
    (("model.remat=dots",), (0,)),
    (("model.dtype=bfloat16",), (0,)),
    (("model.widths=()",), (2,)),
    (("model.widths=(0,)",), (2,)),
    (("model.widths=(-16,)",), (2,)),
    (("model.widths=(16,16)",), (2,)),
    (("model.widths=(1.5,)",), (2,)),
    (("model.widths=('x',)",), (2,)),
    (("model.depths=(0,)",), (2,)),
    (("model.head_width=0",), (2,)),
    (("model.head_width=5",), (2,)),
    (("model.patch=0",), (2,)),
    (("model.patch=1000",), (2,)),
    (("model.structure_dim=-1",), (2,)),
    (("model.key_window=(3,3)",), (2,)),
    (("model.key_window=999",), (0, 2)),
    (("model.key_window=x",), (2,)),
    (("model.drop_path=2.0",), (2,)),
    (("model.drop_path=nan",), (2,)),
    (("model.token_labels=True",), (2,)),
    (("augment.randaugment=nonsense",), (2,)),
    (("augment.randaugment=rand-m999999999-n5",), (0, 2)),
    (("augment.randaugment=rand-m5-n1000000000",), (2,)),
    (("augment.repeated_augmentation=1000000",), (0, 2)),
    (("augment.mixup=1e300",), (0, 2)),
    (("augment.crop_area=(1e-300,1e-300)",), (0, 2)),
    (("augment.crop_aspect=(1e-300,1e300)",), (0, 2)),
    (("train.grad_accum_steps=3",), (2,)),
    (("train.grad_accum_steps=1000000",), (2,)),
    (("train.duration=0 steps",), (2,)),
    (("train.duration=nonsense",), (2,)),
    (("train.duration=-1 steps",), (2,)),
    (("train.duration=nan epochs",), (2,)),
    ((f"train.duration={_HUGE} steps",), (2,)),
    ((f"train.duration={'9' * 400} steps",), (2,)),
    ((f"train.duration={NINES} epochs",), (2,)),
    ((f"optimizer.warmup={_HUGE} steps",), (2,)),
    ((f"optimizer.lr_update_every={_HUGE} steps",), (0, 2)),
    ((f"optimizer.lr_update_every={'9' * 400} steps",), (2,)),
    ((f"eval.every={'9' * 400} steps",), (2,)),
    ((f"checkpoint.every={_HUGE} steps",), (0, 2)),
    ((f"checkpoint.keep_every={'9' * 400} examples",), (2,)),
    (("checkpoint.keep_best=99999999999999999999",), (0, 2)),
    (("optimizer.lr_update_delay=99999999999999999999", "optimizer.lr_update_every=1 steps"), (0, 2)),
    (("optimizer.freeze=nonsense*",), (2,)),
    (("optimizer.freeze=*",), (0, 2)),
    (("optimizer.freeze=[",), (2,)),
    (("data.name=nonsense",), (2,)),
    (("data.name=noise:",), (2,)),
    (("data.name=noise:-1",), (2,)),
    (("data.name=tfds:",), (2,)),
    (("data.name=tfds:nonsense",), (2,)),
    (("data.name=tfds:../../x", "data.frames=0"), (2,)),
    (("data.name=folder", "data.root=<here>/missing"), (2,)),
    (("data.name=folder", "data.root="), (2,)),
    (("data.name=folder", "data.root=/dev/null"), (2,)),
    (("data.name=folder", "data.root=gs://bucket/x"), (2, 75)),
    (("data.name=folder", f"data.root={LONG}"), (2,)),
    (("data.label_maps=<here>/missing",), (2,)),
    (("data.workers=1",), (0,)),
    (("data.workers=-2",), (2,)),
    (("data.cache=on", "data.workers=1"), (0,)),
    (("data.cache=on", "data.cache_gib=1e-9"), (0,)),
    (("data.cache=on", "data.cache_gib=1e5"), (0,)),
    (("data.cache=nonsense",), (2,)),
    (("data.cache_gib=-1.0",), (2,)),
    (("data.cache_gib=nan",), (2,)),
)
# Options of commands that take a configuration, and exit codes.
_OPTIONS: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = (
    ("train", ("--profile=x",), (2,)),
    ("train", ("--profile=5:1",), (2,)),
    ("train", ("--profile=-1:2",), (2,)),
    ("train", ("--profile=1:3",), (0,)),
    ("train", (f"--profile=1:{_HUGE}",), (0, 2)),
    ("train", (f"--profile=1:{NINES}",), (2,)),
    ("main", ("--profile=x",), (2,)),
    ("main", ("--mode=eval",), (2,)),
    ("plan", ("--device_batch=10000000",), (0, 2)),
    ("plan", ("--device_batch=1000000000000000000",), (2,)),
    ("plan", ("--config.data.size=1000000000",), (2,)),
    ("show", ("--config.data.size=1000000000",), (0, 2)),
    ("plan", ("--topology=nonsense",), (2,)),
    ("plan", ("--topology=v5e:999999x999999",), (2,)),
    ("plan", ("--topology=h100:0",), (2,)),
    ("plan", ("--topology=h100:-1",), (2,)),
    ("plan", (f"--topology=h100:{_HUGE}",), (2,)),
    ("plan", (f"--topology=h100:{NINES}",), (2,)),
    ("plan", ("--topology=h100:9999",), (2,)),
    ("plan", ("--topology=h100:99999999",), (2,)),
    ("plan", ("--topology=1",), (2,)),
    ("plan", ("--topology=",), (2,)),
    ("plan", ("--topology=h100:1", "--topology=nonsense"), (2,)),
    ("plan", ("--device_memory=nonsense",), (2,)),
    ("plan", ("--device_memory=-1GB",), (2,)),
    ("plan", ("--device_memory=0GB",), (2,)),
    ("plan", ("--device_memory=1e400GB",), (2,)),
    ("plan", (f"--device_memory={NINES}GB",), (2,)),
    ("bench model", ("--only=nonsense",), (2,)),
    ("bench model", ("--rounds=0",), (2,)),
    ("show", ("--data", "--config.data.batch_size=1000000000000"), (2,)),
)


def cases() -> Iterator[Case]:
    for changes, codes in _EXTREMES:
        name = short(" ".join(changes))
        yield _train(name, *(f"--config.{change}" for change in changes), codes=codes)
    for command, arguments, codes in _OPTIONS:
        yield _case(
            f"{command} {short(' '.join(arguments))}",
            command,
            DIGITS,
            "--workdir=<here>/run",
            *arguments,
            codes=codes,
        )
    twice = [f"--config.data.mean=({n},{n},{n})" for n in (0.1, 0.2)]
    yield _case("a tuple twice", "show", DIGITS, *twice, codes=(0,), check=_second_mean)


def _second_mean(here: Path, result: Result) -> str:
    """Check that the second of two values of a key is taken."""
    del here
    mean = result.stdout.partition("  mean: ")[2].splitlines()[1:4]
    return "" if mean == ["  - 0.2"] * 3 else f"the mean is {mean}"
