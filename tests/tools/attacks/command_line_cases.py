"""Command lines: missing, unknown, repeated and malformed options and arguments of every command."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

from attacks.case import Case, Result
from attacks.commands import ARMS, CLIP, COMMANDS, DIGITS, IMAGE, case, short
from attacks.names import LONG, NINES

_case = functools.partial(case, "flags")

# Appended to a valid command line.
_APPENDED = {
    "unknown flag": "--nonsense=1",
    "surplus word": "surplus",
    "empty word": "",
    "not UTF-8": "\udcff",
    "long word": LONG,
    "unfinished flag": "--",
    "option of Python": "-x",
}
_IGNORED = {"unfinished flag": (0, 2)}
_NO_ARGUMENTS = ("bench input", "check")  # run without arguments, too
_SLOW = ("check",)  # runs every kernel at full shapes

# Values of options that are refused; those with other exit codes are in the second table.
_BAD_VALUES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "main": {
        "--mode": ("", "nonsense", "Train", "show", "plan"),
        "--peer": ("torch",),
        "--config.nonsense": ("1",),
        "--config": ("", "x.py", LONG, "<here>"),
    },
    "train": {
        "--mode": ("train",),
        "--config": ("", "x.py", LONG, "<here>", "nonsense", "digits:nonsense", ":digits", "../digits"),
    },
    "show": {
        "--config.data.mean": ("1", "(1,)", "(1,2)", "('a','b','c')", "(nan,1,1)", "x", "((((", LONG),
        "--config.nonsense": ("1",),
        "--config.train": ("1", ""),
        "--config.train.nonsense": ("1",),
        "--config.train.seed.more": ("1",),
        "--config.": ("1",),
        "--config..": ("1",),
        "--config.train.": ("1",),
        "--config.__class__": ("1",),
        "--config": ("", "x.py", LONG, "<here>", "nonsense", "moving-digits", "configs/digits.txt"),
        "--data": ("1",),
    },
    "plan": {"--device_batch": ("0", "-1", "x", "1.5"), "--topologies": ("h100:1",)},
    "predict": {
        "--top": ("0", "-1", "x", "", "1.5", NINES),
        "--format": ("xml", "", "TEXT"),
        "--every": ("-1", "nan", "x", "", "-inf"),
        "--config": ("digits", "", "<here>"),
        "--config.data.size": ("x", "-1", "0", "1000000000"),
        "--config.model.name": ("deit_tiny", "nonsense", ""),
        "--checkpoint": ("<image_run>",),
    },
    "explain": {
        "--head": ("-1", "99", "x", "99999999999999999999"),
        "--layer": ("nonsense", LONG),
        "--query": ("1", "1,2,3", "-1,0", "nan,0", "inf,1", "999,0", "x,y", ",", f"{NINES},0"),
        "--beside": ("<here>/missing", "<images>", ",,"),
        "--animate": ("", "png", "MP4"),
        "--smooth": ("1", "false"),
    },
    "check": {"--device": ("", "nonsense", "CPU", "gpu", "tpu")},
    "evaluate": {"--config": ("digits",), "--config.eval.batch_size": ("0", "x")},
    "export": {"--platforms": ("nonsense", "cpu,nonsense", ",")},
    "report": {"--hardest": ("-1", "x", "1.5")},
    "convert": {
        "--model": ("nonsense", "deit_tiny", "uniformer_b", LONG),
        "--data": ("nonsense", "kinetics400"),
        "--head_width": ("1", "x", "32"),
        "--weights": ("", "both"),
        "--labels": ("<here>/missing", "/dev/null", "<here>", "<images>/val/one/0.png"),
        "--inflate": ("nonsense",),
        "--noise": ("x", "nan", "-1", "inf"),
        "--config.model.name": ("deit_tiny",),
    },
    "prepare folder": {
        "--workers": ("0", "-1", "x", "1.5"),
        "--out": ("<images>",),
        "--transcode": ("-1", "x", "1.5", NINES),
        "--val_fraction": ("-1", "1", "nan", "x"),
        "--config.data.root": ("<images>",),
    },
    "prepare shards": {
        "--shards": ("-1", "x", "1.5", NINES),
        "--train_split": ("nonsense", "", "../x", LONG),
        "--test_split": ("nonsense", "/dev/null"),
        "--beam_runner": ("nonsense", "os.system"),
        "--beam_option": ("x", "="),
    },
    "prepare label_maps": {"--top": ("0", "-1", "x"), "--config.data.size": ("-1", "x")},
    "bench input": {
        "--rounds": ("0", "-1", "x"),
        "--workers": ("x", "-1", "1,,2", ",", "1.5", "1025", NINES),
        "--peer": ("", "nonsense"),
        "--config": ("nonsense", DIGITS.partition("=")[2]),
        "--config.data.root": ("<clips>", "<here>/missing"),
        "--config.data.size": ("x", "-1"),
    },
    "plan --program": {
        "--program": ("", "<here>/missing", "<here>", "/dev/null", IMAGE),
        "--parts": ("x", "1.5", "-1"),
        "--depth": ("x", "1.5", "-1", "0"),
        "--config": ("digits",),
        "--config.data.size": ("24",),
    },
    "ablate": {
        "--arms": (
            "",
            "a",
            "a: x=1",
            "x",
            "1",
            "a:",
            "a: model.structure_dim",
            ": model.structure_dim=1",
            LONG,
        ),
        "--lrs": ("-1.0", "nan", "0.0", "x", "inf", "1e39", "", ",", "(1e-3,)", "1e-3,,1e-3"),
        "--against": ("nonsense",),
        "--same_time": ("nonsense",),
        "--seeds": ("0", "-1", "x"),
        "--tune_seeds": ("0", "x"),
        "--rounds": ("0", "x"),
        "--config.ablate.seeds": ("1",),
    },
}
_OTHER_VALUES = (  # command, option, values, exit codes
    ("report", "--hardest", ("0", NINES), (0, 2)),
    ("convert", "--noise", ("0", "1e39"), (0, 2)),
    ("predict", "--every", ("inf", "1e400"), (0, 2)),
    ("export", "--platforms", ("",), (0, 2)),
    ("predict", "--top", ("99999999999999999999",), (0, 2)),
    ("predict", "--config.mesh.device", ("gpu", "tpu", "nonsense", ""), (2,)),
    ("predict", "--config.data.test_clips", ("2", "1000000000"), (2,)),
    ("predict", "--config.data.test_crops", ("3",), (0,)),
    ("prepare shards", "--shards", ("1000000",), (0, 2)),
    ("prepare folder", "--workers", ("3",), (0,)),
    ("show", "--config", ("digits", "digits.py", "configs/digits.py", "digits/"), (0,)),
)

# Arguments of `structvit` itself, exit codes, and text that the output has to contain.
_STRUCTVIT: dict[str, tuple[tuple[str, ...], tuple[int, ...], str]] = {
    "help": (("--help",), (0,), "structvit train --config=moving_digits"),
    "short help": (("-h",), (0,), "Commands:"),
    "version": (("--version",), (0,), "structvit_jax "),
    "nothing": ((), (0,), "Commands:"),
    "empty word": (("",), (2,), "error: No such command ''"),
    "not UTF-8": (("\udcff",), (2,), "error: No such command"),
    "long word": ((LONG,), (2,), "error: No such command"),
    "escapes": (("\x1b[31mtrain",), (2,), "error: No such command"),
    "misspelt command": (("trian",), (2,), "Did you mean 'train'?"),
    "command in capitals": (("Train",), (2,), "Did you mean 'train'?"),
    "old module": (("structvit_jax.predict",), (2,), "error: No such command"),
    "module path": (("../train",), (2,), "error: No such command"),
    "private module": (("configuration",), (2,), "error: No such command"),
    "option first": (("--config=digits", "train"), (2,), "error: "),
    "unknown option": (("--nonsense",), (2,), "error: "),
    "unfinished": (("--",), (0, 2), ""),
    "misspelt subcommand": (("prepare", "fodler"), (2,), "Did you mean 'folder'?"),
    "subcommand with a dash": (("prepare", "label-maps", "--help"), (0,), "CHECKPOINT"),
    "prepare, nothing": (("prepare",), (0,), "kinetics400"),
    "bench, nothing": (("bench",), (0,), "model"),
    "bench, misspelt": (("bench", "imput"), (2,), "Did you mean 'input'?"),
    "bench, missing file": (("bench", "input", "<here>/missing.mp4"), (2,), "missing.mp4 cannot be read"),
    "bench, device": (("bench", "input", "/dev/null"), (2,), "/dev/null cannot be read"),
    "bench, empty folder": (("bench", "input", "<here>"), (2,), "there are no videos or images in"),
    "prepare, empty word": (("prepare", ""), (2,), "error: No such command ''"),
    "option with dashes": (
        ("prepare", "folder", "<images>", "--check", "--train-split=nonsense"),
        (2,),
        "nonsense",
    ),
    "misspelt option": (("predict", "x", "y", "--tpo=1"), (2,), "--top"),
    "misspelt choice": (("predict", "x", "y", "--format=jsnl"), (2,), "jsonl"),
    "abbreviated option": (("predict", "x", "y", "--feat=x"), (2,), "--features"),
    "value missing": (("predict", "x", "y", "--top"), (2,), "--top"),
    "value for a switch": (("show", DIGITS, "--data=x"), (2,), "--data"),
    "misspelt configuration": (("show", "--config=moving_digit"), (2,), "Did you mean 'moving_digits'"),
    "misspelt key": (("show", DIGITS, "--config.optimizer.learning_rate=1"), (2,), "config.optimizer.lr"),
    "configuration twice": (("show", "--config=<here>/missing.py", DIGITS), (0,), "deit_tiny_struct_1_video"),
    "second configuration missing": (("show", DIGITS, "--config=<here>/missing.py"), (2,), "missing.py"),
    "configuration without =": (("show", *DIGITS.split("=", 1)), (0,), "deit_tiny_struct_1_video"),
    "configuration alone": (("show", "--config"), (2,), "--config"),
    "key without a value": (("show", DIGITS, "--config.train.seed"), (2,), "config.train.seed"),
    "key before the configuration": (("show", "--config.train.seed=7", DIGITS), (0,), "seed: 7"),
    "arms of one name": (("ablate", DIGITS, ARMS[0], ARMS[0], "--workdir=<here>/out"), (2,), "error: "),
    "arms of unknown keys": (("ablate", DIGITS, "--arms=a: x=1", "--arms=b: y=2"), (2,), "error: "),
    "arms missing": (("ablate", DIGITS, "--workdir=<here>/out"), (2,), "--arms"),
}
# Variables that a shell sets to complete a command line, exit codes, and text of the output.
_COMPLETIONS = (
    ("bash_source", "", "", (0,), "complete"),
    ("zsh_source", "", "", (0,), "compdef"),
    ("fish_source", "", "", (0,), "complete"),
    ("bash_complete", "structvit tr", "1", (0,), "train"),
    ("bash_complete", "structvit prepare ", "2", (0,), "folder"),
    ("bash_complete", "structvit predict --to", "2", (0,), "--top"),
    ("bash_complete", "structvit nonsense ", "2", (0, 2), ""),
    ("bash_complete", "structvit 'open", "1", (0, 2), ""),
    ("bash_complete", "structvit train --config=", "2", (0,), ""),
    ("bash_complete", "structvit", "x", (0, 2), ""),
    ("bash_complete", "structvit", "99999999999999999999", (0, 2), ""),
    ("bash_complete", None, None, (0, 2), ""),
    ("nonsense", "", "", (2,), "error: "),
    ("nonsense_source", "", "", (2,), "error: "),
    ("", "", "", (0,), "Commands:"),
)


def cases() -> Iterator[Case]:
    for command, right in COMMANDS.items():
        if command not in _SLOW:
            yield case("as documented", command, command, *right, codes=(0,), seconds=60)
        yield _case(f"{command}: help", command, "--help", codes=(0,))
        if command not in _NO_ARGUMENTS:
            yield _case(f"{command}: nothing", command)
        for name, argument in _APPENDED.items():
            if not (command in _SLOW and name in _IGNORED):
                yield _case(f"{command}: {name}", command, *right, argument, codes=_IGNORED.get(name, (2,)))
    for command, flags in _BAD_VALUES.items():
        for flag, values in flags.items():
            yield from (_value(command, flag, value, (2,)) for value in values)
    for command, flag, values, codes in _OTHER_VALUES:
        yield from (_value(command, flag, value, codes) for value in values)
    yield from _videos()
    for name, (arguments, codes, text) in _STRUCTVIT.items():
        yield Case(
            "flags",
            f"structvit: {name}",
            "structvit_jax",
            arguments,
            codes,
            check=functools.partial(_has, text),
        )
    yield from _completions()


def _value(command: str, flag: str, value: str, codes: tuple[int, ...]) -> Case:
    """Return a case with a value of an option in the place of the valid one."""
    others = (argument for argument in COMMANDS[command] if not argument.startswith(f"{flag}="))
    name = f"{command}: {flag}={short(value)}"
    return _case(name, command, *others, f"{flag}={value}", codes=codes)


def _videos() -> Iterator[Case]:
    """Values of --every, for videos, and examples of the test split."""
    run = "<clip_run>"
    for value, codes in {"1e-9": (0, 2), "0.5": (0,), "1e300": (0,), "nan": (2,), "inf": (0, 2)}.items():
        name = f"predict a video: --every={value}"
        yield _case(name, "predict", run, CLIP, f"--every={value}", codes=codes)
    for number in ("99", "-1", "x", "", NINES, "\u00b2", "1e3"):
        for command in ("predict", "explain"):
            arguments = (run, f"test:{number}", *(["--out=<here>/out"] * (command == "explain")))
            yield _case(f"{command}: test:{short(number)}", command, *arguments)


def _completions() -> Iterator[Case]:
    for kind, arguments, position, codes, text in _COMPLETIONS:
        yield Case(
            "flags",
            f"structvit: completion {kind} of {arguments} at {position}",
            "structvit_jax",
            codes=codes,
            environment={"_STRUCTVIT_COMPLETE": kind, "COMP_WORDS": arguments, "COMP_CWORD": position},
            check=functools.partial(_has, text),
        )


def _has(text: str, here: Path, result: Result) -> str:
    """Check that the output contains a text."""
    del here
    return "" if text in result.stdout + result.stderr else f"{text!r} is not in the output"
