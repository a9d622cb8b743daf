"""launch/local.sh and launch/slurm.sbatch against stand-ins; what all scripts have in common."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from play import DATA, LAUNCH, MAIN, RUN, SCRIPTS, Play, refused, script, wait_for


@pytest.fixture
def play(tmp_path):
    return Play(tmp_path)


def test_shellcheck():
    tool = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert tool, "shellcheck comes with the extra dev"
    command = [tool, "--external-sources", *SCRIPTS, DATA / "program.sh"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout


@pytest.mark.parametrize("name", ["local.sh", "slurm.sbatch", "tpu_run.sh"])
def test_help_is_the_comment_at_the_top(play, name):
    process = play.run("bash", LAUNCH / name, "--help")
    assert process.returncode == 0 and not process.stderr
    assert f"launch/{name}" in process.stdout and "--dry-run" in process.stdout
    assert "set -euo" not in process.stdout and "#" not in process.stdout


# ---- local.sh


def local(play, *arguments, **environment):
    return play.run(LAUNCH / "local.sh", *arguments, **environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to run"),
        (["--processes", "0", "--", "x"], "--processes must be a positive integer, not '0'"),
        (["--processes=two", "--", "x"], "not 'two'"),
        (["--cpu-devices", "-1", "--", "x"], "--cpu-devices"),
        (["--restarts", "x", "--", "x"], "--restarts"),
        (["--logs"], "--logs needs a value"),
        (["--config=x"], "unknown option '--config=x'"),
    ],
)
def test_local_refuses(play, arguments, message):
    refused(local(play, *arguments), message)


def test_local_needs_an_interpreter(play):
    refused(local(play, "--", "x", PYTHON="/nowhere/python"), "no interpreter '/nowhere/python'")


def test_local_dry_run(play):
    process = local(play, "--dry-run", "--processes=2", "--cpu-devices=4", "--", *RUN)
    first, second = map(shlex.split, process.stdout.splitlines())
    assert first[0] == "env" and first[-len(RUN) - 3 :] == [play.environment["PYTHON"], "-m", MAIN, *RUN]
    assert {"JAX_PROCESS_ID=0", "JAX_NUM_PROCESSES=2", "JAX_PLATFORMS=cpu"} < set(first)
    assert "JAX_PROCESS_ID=1" in second and second[-2:] == [">>runs/local/process-1.log", "2>&1"]
    assert not play.started() and not (play.folder / "runs").exists()


def test_local_environment_and_output(play):
    process = local(play, "--processes=3", "--cpu-devices=2", "--logs", "logs", "--", *RUN, XLA_FLAGS="--a")
    assert process.returncode == 0, process.stderr
    addresses = set()
    for i in range(3):
        ((arguments, environment),) = play.started(i)
        assert arguments == f"-m {MAIN} {' '.join(RUN)}"
        assert (environment["JAX_PROCESS_ID"], environment["JAX_NUM_PROCESSES"]) == (str(i), "3")
        assert environment["JAX_PLATFORMS"] == "cpu" and environment["XLA_FLAGS"] == "--a"
        assert environment["--xla_force_host_platform_device_count"] == "2", "added to the user's own flags"
        addresses.add(environment["JAX_COORDINATOR_ADDRESS"])
    (address,) = addresses
    assert address.startswith("127.0.0.1:")
    assert process.stdout.startswith("process 0") and "process 1" not in process.stdout
    assert (play.folder / "logs" / "process-2.log").read_text().startswith("process 2")
    assert play.nothing_is_left()


def test_local_shares_out_gpus(play):
    script(play.bin / "nvidia-smi", 'for i in 0 1 2 3; do echo "GPU $i: H"; done')
    assert local(play, "--", "x").returncode == 0
    assert [play.started(i)[0][1]["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["0,1", "2,3"]
    assert local(play, "--", "x", CUDA_VISIBLE_DEVICES="5,7").returncode == 0
    assert [play.started(i)[1][1]["CUDA_VISIBLE_DEVICES"] for i in (0, 1)] == ["5", "7"]
    refused(local(play, "--processes=3", "--", "x"), "4 GPUs are not divisible by 3 processes")


@pytest.mark.parametrize(
    ("does", "code", "message"),
    [
        (["0", "0"], 0, ""),
        (["hang", "2"], 2, "process 1 (pid"),
        (["75", "2"], 2, "exit code 2"),
        (["75", "3"], 75, "exit code 3"),
        (["3", "deaf"], 3, "process 0 (pid"),
        (["hang", "KILL"], 75, "killed by SIGKILL"),
    ],
)
def test_local_exit_code(play, does, code, message):
    for process, what in enumerate(does):
        play.exits(what, process=process)
    grace = "0" if {"hang", "deaf"} & set(does) else "60"  # those that end by themselves may take their time
    process = local(play, "--", "x", LOCAL_GRACE_SECONDS=grace)
    assert process.returncode == code, process.stderr
    assert message in process.stderr
    if does[1] not in ("0", "deaf"):
        assert "  1| process 1, start 1: -m structvit_jax.main x" in process.stderr
    assert play.nothing_is_left()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_the_signal_on_and_leaves_nothing(play, sent):
    play.exits("hang")
    process = play.start(LAUNCH / "local.sh", "--restarts=3", "--", "x")
    assert wait_for(lambda: (play.folder / "pids").exists() and both_wait(play))
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "saved" in out and "saved" in (play.folder / "runs/local/process-1.log").read_text()
    assert len(play.started()) == 1, "who stops it does not want it started again"
    assert play.nothing_is_left()


def both_wait(play):
    return len((play.folder / "pids").read_text().splitlines()) == 2


def test_local_third_signal_kills(play):
    play.exits("deaf")
    process = play.start(LAUNCH / "local.sh", "--", "x")
    assert wait_for(lambda: (play.folder / "pids").exists() and both_wait(play))
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
    process.communicate(timeout=60)
    assert process.returncode not in (0, 2, 75)
    assert play.nothing_is_left()


@pytest.mark.parametrize(
    ("does", "restarts", "code", "starts"),
    [
        (["75", "1", "0"], 5, 0, 3),
        (["75", "75", "75"], 1, 75, 2),
        (["75", "2", "0"], 5, 2, 2),
    ],
)
def test_local_restarts(play, does, restarts, code, starts):
    play.exits(*does)
    process = local(play, f"--restarts={restarts}", "--", "x")
    assert (process.returncode, len(play.started())) == (code, starts), process.stderr
    assert play.nothing_is_left()


# ---- slurm.sbatch


@pytest.fixture
def slurm(play):
    """Inside a job; srun plays the program's first line, and ends with 75 when scancel is called."""
    script(
        play.bin / "srun",
        'printf "%s\\n" "$@" >>"$PLAY/srun"; echo "on stderr" >&2; trap "exit 137" TERM\n'
        'does=$(cat "$PLAY/exits")\n'
        'if [[ -e $PLAY/errors ]]; then cat "$PLAY/errors" >&2; fi\n'
        'while [[ $does == hang ]]; do [[ ! -e $PLAY/scancel ]] || exit 75; sleep 0.02; done; exit "$does"',
    )
    for name in ("scancel", "scontrol"):
        script(play.bin / name, f'echo "$@" >>"$PLAY/{name}"; exit "${{SCONTROL:-0}}"')
    script(play.bin / "squeue", 'echo "${STATE:-RUNNING}"')
    job = {"ID": "7", "JOB_NUM_NODES": "2", "GPUS_ON_NODE": "4", "CPUS_ON_NODE": "34"}
    play.environment |= {f"SLURM_{key}": value for key, value in job.items()}
    play.environment["SLURM_JOB_ID"] = "7"
    return play


def sbatch(play, *arguments, **environment):
    return play.run("bash", LAUNCH / "slurm.sbatch", *arguments, **environment)


def requeued(play):
    path = play.folder / "scontrol"
    return path.read_text().splitlines() if path.exists() else []


def test_slurm_asks_for_a_signal_and_to_be_queued_again():
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    options = {line.split()[1] for line in lines if line.startswith("#SBATCH ")}
    assert {"--signal=B:TERM@120", "--requeue", "--open-mode=append", "--exclusive"} <= options
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:]), "SLURM reads none after a command"


def test_slurm_dry_run(play):
    process = play.run("bash", LAUNCH / "slurm.sbatch", "--dry-run", *RUN, SLURM_GPUS_ON_NODE="8")
    (line,) = process.stdout.splitlines()
    words = shlex.split(line)
    assert words[0] == "srun" and {"--ntasks=8", "--kill-on-bad-exit=1", "--gpu-bind=none"} < set(words)
    assert words[-len(RUN) - 2 :] == ["-m", MAIN, *RUN]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ([], {}, "--config=configs/NAME.py"),
        (["--config=x"], {"SLURM_JOB_ID": ""}, "not inside a job"),
        (["--config=x"], {"SLURM_GPUS_ON_NODE": ""}, "--gpus-per-node"),
        (["--config=x"], {"PYTHON": "/nowhere"}, "no interpreter '/nowhere'"),
    ],
)
def test_slurm_refuses(slurm, arguments, environment, message):
    refused(sbatch(slurm, *arguments, **environment), message)


def test_slurm_runs_one_task_per_gpu(slurm):
    process = sbatch(slurm, *RUN)
    assert process.returncode == 0, process.stderr
    words = (slurm.folder / "srun").read_text().splitlines()
    assert {"--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=8"} < set(words)
    assert words[-len(RUN) :] == RUN
    assert "on stderr" in process.stderr and not requeued(slurm)


@pytest.mark.parametrize(
    ("does", "errors", "environment", "code", "again"),
    [
        ("75", "", {}, 75, True),
        ("2", "", {}, 2, False),
        ("1", "", {}, 1, False),
        ("75", "srun: error: n1: task 3: Exited with exit code 2", {}, 2, False),
        ("75", "srun: error: n[1-2]: tasks 0-2,4: Exited with exit code 75", {}, 75, True),
        ("75", "", {"STATE": "COMPLETING"}, 75, False),
        ("75", "", {"SLURM_RESTART_COUNT": "3", "MAX_REQUEUES": "3"}, 75, False),
    ],
)
def test_slurm_exit_code(slurm, does, errors, environment, code, again):
    slurm.exits(does)
    if errors:
        (slurm.folder / "errors").write_text(errors + "\n")
    process = sbatch(slurm, *RUN, **environment)
    assert process.returncode == code, process.stderr
    assert requeued(slurm) == (["requeue 7"] if again else [])


def test_slurm_reports_when_the_job_cannot_be_requeued(slurm):
    slurm.exits("75")
    process = sbatch(slurm, *RUN, SCONTROL="1")
    assert process.returncode == 75 and "the same sbatch command resumes" in process.stderr


def test_slurm_passes_the_signal_to_the_tasks(slurm):
    slurm.exits("hang")
    process = slurm.start("bash", LAUNCH / "slurm.sbatch", *RUN)
    assert wait_for(lambda: (slurm.folder / "srun").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 75
    assert (slurm.folder / "scancel").read_text() == "--signal=TERM 7\n"
    assert requeued(slurm) == ["requeue 7"]
