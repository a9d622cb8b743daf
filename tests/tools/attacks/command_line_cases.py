"""Command lines: every command with flags that are missing, unknown, of another type, or extreme."""

from __future__ import annotations

import os
import random
import stat
from collections.abc import Iterator
from pathlib import Path

from attacks.case import Case, Result
from attacks.commands import ARMS, CLIP, COMMANDS, DIGITS, IMAGE, case, main, short
from attacks.damage import folder, text
from attacks.names import LONG, NINES

_REMOTE = ("gs://bucket/x", "s3://bucket/x", "http://<silent>/x")

# What is put after arguments that are right, or in their place; the commands that do without arguments.
_AFTER = {
    "unknown flag": "--nonsense=1",
    "surplus word": "surplus",
    "empty word": "",
    "not UTF-8": "\udcff",
    "long word": LONG,
    "unfinished flag": "--",
    "option of Python": "-x",
}
_NO_ARGUMENTS = ("motion", "data.bench")
_TAKES_MORE = ("predict", "report")  # words: the case is then one of a file that is not there
_IGNORED = {"unfinished flag": (0, 2)}

# Values of flags that are refused; for codes other than 2 the second table.
_BAD_VALUES = {
    "main": {
        "--mode": ("", "nonsense", "Train"),
        "--peer": ("", "nonsense", "torch"),
        "--config.data.mean": ("1", "(1,)", "(1,2)", "('a','b','c')", "(nan,1,1)", "x", "((((", LONG),
        "--config.nonsense": ("1",),
        "--config.train": ("1", ""),
        "--config.train.nonsense": ("1",),
        "--config.train.seed.more": ("1",),
        "--config": ("", "x.py", LONG, "<here>"),
    },
    "predict": {
        "--top": ("0", "-1", "x", "", "1.5", NINES),
        "--format": ("xml", "", "TEXT"),
        "--every": ("-1", "nan", "x", "", "-inf"),
        "--config.data.size": ("x", "-1", "0", "1000000000"),
        "--config.model.name": ("deit_tiny", "nonsense", ""),
    },
    "explain": {
        "--head": ("-1", "99", "x", "99999999999999999999"),
        "--layer": ("nonsense", LONG),
        "--query": ("1", "1,2,3", "-1,0", "nan,0", "inf,1", "999,0", "x,y", ",", f"{NINES},0"),
        "--beside": ("<here>/missing", "<images>", ",,"),
    },
    "export": {"--platforms": ("nonsense", "cpu,nonsense", ",")},
    "report": {"--hardest": ("-1", "x", "1.5")},
    "convert": {
        "--model": ("nonsense", "deit_tiny", "uniformer_b", LONG),
        "--data": ("nonsense", "kinetics400"),
        "--head_width": ("1", "x", "32"),
        "--labels": ("<here>/missing", "/dev/null", "<here>", "<images>/val/one/0.png"),
        "--inflate": ("nonsense",),
        "--noise": ("x", "nan", "-1", "inf"),
    },
    "data.prepare": {"--workers": ("0", "-1", "x", "1.5"), "--out": ("<images>",)},
    "data.shards": {
        "--shards": ("-1", "x", "1.5", NINES),
        "--train_split": ("nonsense", "", "../x", LONG),
        "--test_split": ("nonsense", "/dev/null"),
        "--beam_runner": ("nonsense", "os.system"),
    },
    "label_maps": {"--top": ("0", "-1", "x"), "--config.data.size": ("-1", "x")},
    "motion": {"--clips": ("0", "7", "-1", "x", "1e3")},
    "data.bench": {
        "--video": ("<here>/missing.mp4", "/dev/null", "<here>"),
        "--image": ("<here>/missing.png", "/dev/null", "<here>"),
        "--clips": ("0", "-1", "x"),
        "--memory": ("-1", "x", "1"),
    },
    "traffic": {
        "--parts": ("x", "1.5"),
        "--depth": ("x", "1.5"),
        "--trips": ("x", "=", "x=y", "x=-1", f"x={NINES}"),
        "--unknown": ("x", "1.5"),
    },
    "ablate": {
        "--config.ablate.arms": (
            "()",
            "('a',)",
            "('a: x=1','b: y=2')",
            "x",
            "(1,2)",
            "('a:','a:')",
        ),
        "--config.ablate.lrs": ("(-1.0,)", "(nan,)", "(0.0,)", "('x',)", "(inf,)", "(1e39,)", "x"),
        "--config.ablate.against": ("nonsense",),
        "--config.ablate.same_time": ("nonsense",),
        "--config.ablate.seeds": ("0", "-1", "x"),
        "--config.ablate.tune_seeds": ("0", "x"),
    },
}
_OTHER_VALUES = (  # command, flag, values, exit codes
    ("report", "--hardest", ("0", NINES), (0, 2)),
    ("convert", "--noise", ("0", "1e39"), (0, 2)),
    ("predict", "--every", ("inf", "1e400"), (0, 2)),
    ("export", "--platforms", ("",), (0, 2)),
    ("data.bench", "--video", (IMAGE,), (0, 2)),
    ("data.bench", "--image", (CLIP,), (0, 2)),
    ("traffic", "--parts", ("-1",), (0, 2)),
    ("traffic", "--depth", ("-1",), (0, 2)),
    ("traffic", "--unknown", ("-1",), (0, 2)),
    ("predict", "--top", ("99999999999999999999",), (0, 2)),
    ("predict", "--config.mesh.device", ("gpu", "tpu", "nonsense", ""), (2,)),
    ("predict", "--config.data.test_clips", ("2", "1000000000"), (2,)),
    ("predict", "--config.data.test_crops", ("3",), (0,)),
    ("data.shards", "--shards", ("1000000",), (0, 2)),
    ("data.prepare", "--workers", ("3",), (0,)),
)

# Places that hold no checkpoint, for every command that takes one.
_NO_CHECKPOINT = (
    "",
    "<here>/missing",
    "<here>",
    "/dev/null",
    "/dev/null/x",
    "<images>",
    IMAGE,
    "<image_run>/checkpoints/99",
    f"<image_run>/checkpoints/{NINES}",
    "<image_run>/checkpoints/\u00b2",
    LONG,
    "\udcff",
    "~nobody/x",
)
_TAKE_CHECKPOINT = {
    "predict": ("--checkpoint={}", IMAGE),
    "explain": ("--checkpoint={}", IMAGE, "--out=<here>/out"),
    "export": ("--checkpoint={}", "<here>/out.jax"),
    "evaluate": ("{}",),
    "label_maps": ("{}", "<here>/out"),
    "convert": ("{}", "<here>/out"),
    "report": ("{}", "--out=<here>/out.html"),
    "main": (DIGITS, "--config.init_from={}", "--workdir=<here>/run"),
}

# Outputs that cannot be written, for every command that writes.
_UNWRITABLE = ("<here>/file/x", f"<here>/{LONG}", "\udcff/../file/x")
_WRITE = {
    "train": ("main", DIGITS, "--workdir={}"),
    "data": ("main", DIGITS, "--mode=data", "--workdir={}"),
    "plan": ("main", DIGITS, "--mode=plan", "--workdir={}"),
    "features": ("predict", *COMMANDS["predict"], "--features={}"),
    "explain": ("explain", *COMMANDS["explain"][:2], "--out={}"),
    "export": ("export", "--checkpoint=<image_run>", "--platforms=cpu", "{}"),
    "report": ("report", "<image_run>", "--out={}"),
    "evaluate": ("evaluate", "<image_run>", "--out={}"),
    "convert": ("convert", "<structvit_run>", "{}"),
    "convert to a file": ("convert", "<structvit_run>", "{}.safetensors"),
    "prepare": ("data.prepare", "folder", "<images>", "--images", "--out={}"),
    "shards": ("data.shards", "<images>", "{}", "--images"),
    "label maps": ("label_maps", "<structvit_run>", "{}"),
    "ablate": ("ablate", DIGITS, ARMS, "--workdir={}"),
    "motion": ("motion", "{}", "--clips=8"),
}
_PLANS_ONLY = ("plan",)  # writes nothing, so that any place will do
_FILES = ("export", "report", "motion", "convert to a file")  # whose output is a file, not a folder

# Trainings, unless another mode is named, with values at the ends of their range: changes and exit codes.
_HUGE = "9" * 30
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
    (("model.kernels=reference",), (0, 2)),
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
    (("profile=x",), (2,)),
    (("profile=5:1",), (2,)),
    (("profile=-1:2",), (2,)),
    (("profile=1:3",), (0,)),
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
    (("--mode=eval",), (2,)),
    (("--mode=plan", "device_batch=1000000000"), (0, 2)),
    (("--mode=plan", "device_batch=1000000000000000000"), (0, 2)),
    (("--mode=plan", "data.size=1000000000"), (2,)),
    (("--mode=show", "data.size=1000000000"), (0, 2)),
    (("--mode=plan", "topologies=('nonsense',)"), (2,)),
    (("--mode=plan", "topologies=('v5e:999999x999999',)"), (2,)),
    (("--mode=plan", "topologies=('h100:0',)"), (2,)),
    (("--mode=plan", "topologies=('h100:-1',)"), (2,)),
    (("--mode=plan", f"topologies=('h100:{_HUGE}',)"), (2,)),
    (("--mode=plan", "topologies=(1,)"), (2,)),
    (("--mode=plan", "device_memory=nonsense"), (2,)),
    (("--mode=plan", "device_memory=-1GB"), (2,)),
    (("--mode=plan", "device_memory=0GB"), (2,)),
    (("--mode=plan", "device_memory=1e400GB"), (2,)),
    (("--mode=bench", "bench.only=nonsense"), (2,)),
    (("--mode=bench", "bench.rounds=0"), (2,)),
    (("--mode=data", "data.batch_size=1000000000000"), (2,)),
)


def cases() -> Iterator[Case]:
    for command, right in COMMANDS.items():
        yield case("as documented", command, command, *right, codes=(0,))
        yield case("flags", f"{command}: help", command, "--help", codes=(0,))
        if command not in _NO_ARGUMENTS:
            yield case("flags", f"{command}: nothing", command)
        for name, word in _AFTER.items():
            codes = _IGNORED.get(name, (2,))
            yield case("flags", f"{command}: {name}", command, *right, word, codes=codes)
    for command, flags in _BAD_VALUES.items():
        for flag, values in flags.items():
            yield from (_value(command, flag, value, (2,)) for value in values)
    for command, flag, values, codes in _OTHER_VALUES:
        yield from (_value(command, flag, value, codes) for value in values)
    yield from _videos()
    yield from _places()
    for changes, codes in _EXTREMES:
        words = [word if word.startswith("--") else f"--config.{word}" for word in changes]
        yield main("extremes", short(" ".join(changes)), *words, codes=codes)
    twice = [f"--config.data.mean=({n},{n},{n})" for n in (0.1, 0.2)]
    yield main("extremes", "a tuple twice", *twice, "--mode=show", codes=(0, 2), check=_mean_of_three)


def _value(command: str, flag: str, value: str, codes: tuple[int, ...]) -> Case:
    others = (word for word in COMMANDS[command] if not word.startswith(f"{flag}="))
    name = f"{command}: {flag}={short(value)}"
    return case("flags", name, command, *others, f"{flag}={value}", codes=codes)


def _videos() -> Iterator[Case]:
    """--every, which is of videos, and examples of the test split."""
    right = "--checkpoint=<clip_run>"
    for value, codes in {"1e-9": (0, 2), "0.5": (0,), "1e300": (0,), "nan": (2,), "inf": (0, 2)}.items():
        yield case(
            "flags",
            f"predict a video: --every={value}",
            "predict",
            right,
            CLIP,
            f"--every={value}",
            codes=codes,
        )
    for number in ("99", "-1", "x", "", NINES, "\u00b2", "1e3"):
        for command in ("predict", "explain"):
            words = (right, f"test:{number}", *(["--out=<here>/out"] * (command == "explain")))
            yield case("flags", f"{command}: test:{short(number)}", command, *words)


def _places() -> Iterator[Case]:
    """Checkpoints that are not there, and outputs that cannot be written."""
    for command, words in _TAKE_CHECKPOINT.items():
        for place in _NO_CHECKPOINT:
            if place or command != "main":  # where it means none
                filled = [word.replace("{}", place) for word in words]
                yield case("places", f"{command} of {short(place)}", command, *filled)
        for place in _REMOTE:
            filled = [word.replace("{}", place) for word in words]
            name = f"{command} of {place}"
            yield case("places", name, command, *filled, codes=(2, 75), first=_impatient)
    for name, (command, *words) in _WRITE.items():
        codes = (0, 2) if name in _PLANS_ONLY else (2,)
        remote = (0, 2, 75) if name in _PLANS_ONLY else (2, 75)
        places = [*_UNWRITABLE, *(["<here>/folder"] * (name in _FILES))]
        for place in places:
            filled = [word.replace("{}", place) for word in words]
            yield case("places", f"{name} to {short(place)}", command, *filled, codes=codes, prepare=_file)
        for place in _REMOTE:
            filled = [word.replace("{}", place) for word in words]
            yield case("places", f"{name} to {place}", command, *filled, codes=remote, first=_impatient)
        if name in _FILES and hasattr(os, "geteuid") and os.geteuid() == 0:
            filled = [word.replace("{}", "<here>/null").removesuffix(".safetensors") for word in words]
            if name != "convert to a file":
                yield case(
                    "places",
                    f"{name} to a device",
                    command,
                    *filled,
                    codes=(0, 2),
                    prepare=_device,
                    check=_still_a_device,
                )


def _file(here: Path, chance: random.Random) -> None:
    text("file", "")(here, chance)
    for name in ("folder", "folder.safetensors"):
        folder(name)(here, chance)


def _device(here: Path, chance: random.Random) -> None:
    """A second /dev/null, since what is attacked may replace it."""
    del chance
    os.mknod(here / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))


def _still_a_device(here: Path, result: Result) -> str:
    del result
    return "" if stat.S_ISCHR(os.lstat(here / "null").st_mode) else "the device was replaced by a file"


def _mean_of_three(here: Path, result: Result) -> str:
    """For a flag of a tuple that is given twice."""
    del here
    lines = result.stdout.partition("  mean: ")[2].splitlines()[1:]
    count = next((n for n, line in enumerate(lines) if not line.startswith("  - ")), 0)
    return "" if result.code == 2 or count == 3 else f"the mean has {count} values"


def _impatient() -> None:
    """Try buckets as often as the client does, but without its minute of pauses."""
    from gcsfs import retry

    retry.min = lambda *pauses: 0.01
