"""The commands and the Python of the documentation run, with short settings and small models."""

import contextlib
import functools
import os
import shlex
import subprocess
import sys

import click
import clips
import numpy as np
import pytest
import torch
from blocks import blocks
from conftest import COMPILER, ROOT
from small import SMALL

from structvit_jax import convert, create_model
from structvit_jax.cli import structvit
from structvit_jax.config import default_config, keys_of
from structvit_jax.models import weights

BLOCKS = blocks()
RUN = [block for block in BLOCKS if block.marker == "run"]
# Pages whose blocks run one after another in one folder, so that they share runs.
GROUPS = [["README.md"], ["docs/index.md", "docs/explain.md", "docs/devices.md", "docs/structsa.md"]]
SHORT = {  # for commands that train or plan
    "train.duration": "2 steps",
    "optimizer.warmup": "0 steps",
    "data.batch_size": "8",
    "data.train_examples": "64",
    "data.test_examples": "64",
    "eval.every": "",
}
TINY = {"data.size": "24", "data.frames": "4", "train.grad_accum_steps": "1"}  # in place of 224, 16 and 2


class Reader:
    """Run blocks in a folder, as a reader of the documentation would."""

    def __init__(self, command, folder):
        self.command, self.folder = command, folder
        self.output = ""

    def bash(self, line: str) -> None:
        if "DIR" in line:
            line = line.replace("DIR", str(self._clips()))
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            self.output = self._make(words)
        elif words[0] == "curl":
            self._download(words[-1])
        elif words[0] == "structvit":
            self.output = self._structvit(words)
        else:
            assert words == ["source", ".venv/bin/activate"]

    def _structvit(self, words: list[str]) -> str:
        program, *arguments = words[1:]
        if program in ("train", "plan") or "--data" in arguments:
            arguments = [word.replace("structvit_s_", "structvit_tiny_") for word in arguments]
            short = SHORT | (TINY if "finetune" in "".join(words) else {})
            arguments += [f"--config.{key}={value}" for key, value in short.items()]
            arguments += [] if "deit" in "".join(words) or "finetune" in "".join(words) else SMALL
        chdir = functools.partial(os.chdir, self.folder)
        process = self.command(*arguments, program=program, first=chdir)
        assert process.returncode == 0, f"{shlex.join(words)}\n{process.stdout}{process.stderr}"
        return process.stdout

    def _make(self, words: list[str]) -> str:
        """Run make in the environment of the tests, with its installing step done."""
        short = [f"--config.{key}={value}" for key, value in SHORT.items()]
        arguments = shlex.join([*short, *SMALL, f"--workdir={self.folder / 'runs' / 'moving_digits'}"])
        done = [f"--assume-old={sys.prefix}/.installed-cpu", f"VENV={sys.prefix}", "ACCELERATOR=cpu"]
        environment = os.environ | {"XLA_FLAGS": COMPILER}
        process = subprocess.run(
            [*words, *done, f"ARGS={arguments}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        assert "result: top1" in process.stdout
        return process.stdout

    def _clips(self):
        root = self.folder / "clips"
        if not root.exists():
            clips.write_folder(root, {"train": 3, "val": 2})
        return root

    def _download(self, url: str) -> None:
        """Write a file of the released shape, of a tiny model, in place of the released one."""
        assert url.startswith("https://huggingface.co/Sense-X/uniformer_video/resolve/main/")
        arrays = weights.split(create_model("uniformer_tiny_video", num_classes=400))[1]
        state_dict = convert.to_torch(arrays.params | arrays.batch_stats)
        tensors = {key: torch.from_numpy(np.array(array)) for key, array in state_dict.items()}
        torch.save(tensors, self.folder / url.rpartition("/")[2])


def test_the_first_block_installs_and_trains():
    assert RUN[0].page == "README.md" and RUN[0].lines[0] == "make run"


def test_every_page_with_blocks_to_run_is_in_a_group():
    assert sorted({block.page for block in RUN}) == sorted(page for group in GROUPS for page in group)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_blocks_run(group, command, tmp_path):
    reader = Reader(command, tmp_path)
    outputs = {}
    for block in (block for page in group for block in RUN if block.page == page):
        if block.language == "python":
            with contextlib.chdir(tmp_path):
                exec(compile(block.body, block.page, "exec"), {})
        for line in block.lines if block.language == "bash" else []:
            reader.bash(line)
            outputs[line] = reader.output
    results = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.glob("runs/*/result.json")}
    if group == ["README.md"]:
        assert results == {"runs/moving_digits", "runs/folder", "runs/finetune"}
        assert "the run is complete" in outputs["structvit train --config=moving_digits"]
        (fine_tuned,) = [text for line, text in outputs.items() if "init_from" in line]
        assert "as plain attention: 6 arrays" in fine_tuned and "re-initialised, for " in fine_tuned
        assert (tmp_path / "runs" / "folder" / "batch.png").exists()
    else:
        assert results == {"runs/moving_digits", "runs/digits", "runs/deit"}
        written = {path.name for path in (tmp_path / "runs" / "moving_digits").iterdir()}
        assert written >= {"explained.png", "explained.html", "report.html", "model.jax", "model.jax.json"}


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "bash"], ids=lambda b: b.page
)
def test_commands_and_options_exist(block):
    """Also in blocks that do not run."""
    config = dict(keys_of(default_config()))
    for line in block.lines:
        words = shlex.split(line, comments=True)
        while "=" in words[0]:  # variables of the environment
            words.pop(0)
        found: click.Command = structvit
        path = words if words[0] == "structvit" else []
        for word in path[1:]:
            if not isinstance(found, click.Group):
                break
            found = found.commands.get(word) or found.get_command(click.Context(found), word)
            assert found is not None, line
        options = {option for parameter in found.params for option in parameter.opts}
        for word in words:
            option = word.partition("=")[0]
            if option.startswith("--config."):
                assert option.removeprefix("--config.") in config, line
            elif path and option.startswith("--") and option != "--config":
                assert option in options, line
