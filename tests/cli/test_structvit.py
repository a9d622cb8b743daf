"""The `structvit` command: help, suggestions, exit codes and completion. No command runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import click
import pytest
from conftest import ROOT

from structvit_jax import cli
from structvit_jax.cli import prepare
from structvit_jax.utils.errors import UserError


def _paths(group: click.Group = cli.structvit, *path: str) -> Iterator[tuple[str, ...]]:
    """Yield the arguments that name each command: ("train",), ("prepare", "folder"), ..."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from _paths(command, *path, name)


def _call(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.call(cli.structvit, arguments) == 0
    return capsys.readouterr().out


def _python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("arguments", [(), *_paths()], ids=" ".join)
def test_help_has_an_example_of_the_command(capsys, arguments):
    text = _call(capsys, *arguments, "--help")
    example = text.partition("  Example:\n")[2].splitlines()[0]
    assert example.startswith(f"    structvit {' '.join(arguments)}".rstrip())
    assert '[default: ""]' not in text


def test_help_imports_nothing_but_click():
    code = (
        "import sys; before = set(sys.modules); from structvit_jax import cli\n"
        f"for arguments in {[(), *_paths()]}: cli.call(cli.structvit, [*arguments, '--help'])\n"
        "print('loaded', *{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = set(_python(code).stdout.splitlines()[-1].split()[1:])
    assert "structvit_jax" in loaded
    assert loaded - set(sys.stdlib_module_names) == {"click", "structvit_jax"}


@pytest.mark.parametrize("arguments", [(), ("prepare",), ("bench",)], ids=" ".join)
def test_a_group_alone_prints_its_help(capsys, arguments):
    assert _call(capsys, *arguments) == _call(capsys, *arguments, "--help")


def test_help_lists_commands_in_order_with_whole_descriptions(capsys):
    lines = _call(capsys, "prepare", "--help").partition("Commands:\n")[2].splitlines()
    names = [line.split()[0] for line in lines if line[2] != " "]
    assert names == ["folder", "list", *prepare.PUBLISHED, "shards", "label_maps"]
    assert not any(line.endswith("...") for line in lines)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("trian", "No such command 'trian'. Did you mean 'train'? See structvit --help"),
        ("prepare fodler", "No such command 'fodler'. Did you mean 'folder'? See structvit prepare --help"),
        ("bench xyz", "No such command 'xyz'. See structvit bench --help"),
        ("predict RUN FILE --tpo=3", "No such option '--tpo'. Did you mean '--top'? See structvit predict"),
        ("predict RUN FILE --format=xml", "'xml' is not one of 'text', 'jsonl', 'csv'. See"),
        ("predict RUN", "Missing argument 'FILE...'. See structvit predict --help"),
        ("predict RUN FILE --config=digits", "its configuration from the checkpoint, not from --config"),
        ("train --config.data.size", "--config.data.size needs a value: --config.data.size=VALUE"),
        ("prepare folder DIR --val-fraction=nan", "nan is not a number. See structvit prepare folder --help"),
        ("prepare shards DIR OUT --beam_option=a=b", "--beam_option needs --beam_runner"),
        ("ablate --config=digits --lrs=0", "'0' is not a list of positive numbers, such as 1e-3,2e-3. See"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_line_with_the_way_out(line, message):
    with pytest.raises(UserError) as error:
        cli.call(cli.structvit, line.split())
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("5", "STUDY in the configuration file should be a dictionary, not int"),
        ("{'arm': ()}", "unknown key of STUDY 'arm'. Did you mean 'arms'?"),
        ("{'seeds': 0}", "Invalid value for '--seeds'"),
        ("{'lrs': (-1.0,)}", "Invalid value for '--lrs'"),
        ("{'arms': 5}", "Invalid value for '--arms'"),
    ],
)
def test_a_wrong_study_is_refused(tmp_path, study, message):
    file = tmp_path / "study.py"
    file.write_text(f"from structvit_jax.config import default_config as get_config\nSTUDY = {study}\n")
    with pytest.raises(UserError, match=message):
        cli.call(cli.structvit, ["ablate", f"--config={file}"])


MAIN = "from structvit_jax.cli import main; main({})"


@pytest.mark.parametrize(
    ("arguments", "code", "out", "err"),
    [
        (["--version"], 0, "structvit_jax ", ""),
        ([], 0, "Usage: structvit", ""),
        (["trian"], 2, "", "error: No such command 'trian'. Did you mean 'train'? See structvit --help\n"),
        (["train", "\x1b[31m"], 2, "", "error: Got unexpected extra argument (\\x1b[31m). See"),
    ],
    ids=["version", "alone", "misspelt", "escape sequence"],
)
def test_exit_code_and_output(arguments, code, out, err):
    process = _python(MAIN.format(arguments))
    assert process.returncode == code
    assert process.stdout.startswith(out) and process.stderr.startswith(err)
    assert len(process.stderr.splitlines()) == bool(code)


@pytest.mark.parametrize(
    ("arguments", "position", "found"),
    [
        ("structvit tr", 1, {"train"}),
        ("structvit prepare s", 2, {"something_v1", "something_v2", "shards"}),
        ("structvit predict --t", 2, {"--top"}),
        ("structvit predict --format ", 3, {"text", "jsonl", "csv"}),
        ("structvit predict ru", 2, {"ru"}),
        ("structvit train --config ", 3, {""}),
    ],
)
def test_a_shell_completes(arguments, position, found):
    variables = {"COMP_WORDS": arguments, "COMP_CWORD": str(position), "_STRUCTVIT_COMPLETE": "bash_complete"}
    process = _python(MAIN.format([]), **variables)
    assert (process.returncode, process.stderr) == (0, "")
    kinds, answers = zip(*(line.split(",") for line in process.stdout.splitlines()), strict=True)
    assert set(answers) == found
    assert set(kinds) == {"file" if found <= {"ru", ""} else "plain"}


def test_completion_script_and_unknown_requests():
    process = _python(MAIN.format([]), _STRUCTVIT_COMPLETE="bash_source")
    assert process.returncode == 0
    assert "_STRUCTVIT_COMPLETE=bash_complete" in process.stdout
    for request, message in (
        ("tcsh_source", "is unknown: use bash"),
        ("bash_complete", "needs the variables"),
    ):
        process = _python(MAIN.format([]), _STRUCTVIT_COMPLETE=request)
        assert (process.returncode, len(process.stderr.splitlines())) == (2, 1)
        assert f"error: _STRUCTVIT_COMPLETE={request} {message}" in process.stderr
