"""The scripts of launch/, against stand-ins of the cloud's commands and of the program."""

import json
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

LAUNCH, DATA = ROOT / "launch", ROOT / "tests" / "data" / "launch"
SCRIPTS = sorted(LAUNCH.iterdir())
RUN = ["--config=configs/digits.py", "--workdir=gs://bucket/run", "--config.train.note=two words"]


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


class Play:
    """A folder with stand-ins on PATH; what the program does is in exits, what was called in its files."""

    def __init__(self, folder):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.exits("0")
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(folder),
            "PLAY": str(folder),
            "PYTHON": str(DATA / "program.sh"),
            "LOCAL_POLL_SECONDS": "0.05",
            "LOCAL_GRACE_SECONDS": "1",
            "TPU_RUN_POLL_SECONDS": "0.05",
            "TPU_RUN_TRIES": "4",
            "TPU_WORKER_PATIENCE": "2",
        }

    def exits(self, *does, process=None):
        name = "exits" if process is None else f"exits-{process}"
        (self.folder / name).write_text("\n".join(does) + "\n")

    def started(self, process=0):
        """(arguments, environment) of each start of a process."""
        path = self.folder / f"started-{process}"
        lines = path.read_text().splitlines() if path.exists() else []
        environments = [dict(word.split("=", 1) for word in line.split()) for line in lines[1::2]]
        return list(zip(lines[::2], environments, strict=True))

    def start(self, *command, **environment):
        return subprocess.Popen(
            list(map(str, command)),
            cwd=self.folder,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *command, **environment):
        with self.start(*command, **environment) as process:
            process.stdout, process.stderr = map(Text, process.communicate(timeout=60))
        return process

    def nothing_is_left(self):
        pids = (self.folder / "pids").read_text().split()
        return wait_for(lambda: not any(alive(pid) for pid in pids))


class Text(str):
    """What a process wrote; Popen closes its streams at the end."""

    def close(self):
        pass


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


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
    ("arguments", "says"),
    [
        ([], "nothing to run"),
        (["--processes", "0", "--", "x"], "--processes is a whole number above 0, not '0'"),
        (["--processes=two", "--", "x"], "not 'two'"),
        (["--cpu-devices", "-1", "--", "x"], "--cpu-devices"),
        (["--restarts", "x", "--", "x"], "--restarts"),
        (["--logs"], "--logs needs a value"),
        (["--config=x"], "unknown option '--config=x'"),
    ],
)
def test_local_refuses(play, arguments, says):
    refused(local(play, *arguments), says)


def refused(process, says):
    """One line that says what is wrong, and exit code 2."""
    assert process.returncode == 2, process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("error: ") and says in line
    assert not process.stdout


def test_local_needs_an_interpreter(play):
    refused(local(play, "--", "x", PYTHON="/nowhere/python"), "no interpreter '/nowhere/python'")


def test_local_dry_run(play):
    process = local(play, "--dry-run", "--processes=2", "--cpu-devices=4", "--", *RUN)
    first, second = map(shlex.split, process.stdout.splitlines())
    assert first[0] == "env" and first[-len(RUN) - 3 :] == [play.environment["PYTHON"], "-m", MAIN, *RUN]
    assert {"JAX_PROCESS_ID=0", "JAX_NUM_PROCESSES=2", "JAX_PLATFORMS=cpu"} < set(first)
    assert "JAX_PROCESS_ID=1" in second and second[-2:] == [">>runs/local/process-1.log", "2>&1"]
    assert not play.started() and not (play.folder / "runs").exists()


MAIN = "structvit_jax.main"


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
    refused(local(play, "--processes=3", "--", "x"), "4 GPUs cannot be shared out evenly among 3 processes")


@pytest.mark.parametrize(
    ("does", "code", "says"),
    [
        (["0", "0"], 0, ""),
        (["hang", "2"], 2, "process 1 (pid"),
        (["75", "2"], 2, "exit code 2"),
        (["75", "3"], 75, "exit code 3"),
        (["3", "deaf"], 3, "process 0 (pid"),
        (["hang", "KILL"], 75, "killed by SIGKILL"),
    ],
)
def test_local_exit_code(play, does, code, says):
    for process, what in enumerate(does):
        play.exits(what, process=process)
    process = local(play, "--", "x", LOCAL_GRACE_SECONDS="0")
    assert process.returncode == code, process.stderr
    assert says in process.stderr
    if does[1] not in ("0", "deaf"):
        assert "  1| process 1, start 1: -m structvit_jax.main x" in process.stderr
    assert play.nothing_is_left()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_local_passes_the_signal_on_and_leaves_nothing(play, sent):
    play.exits("hang")
    process = play.start(LAUNCH / "local.sh", "--restarts=3", "--", "x")
    assert wait_for(lambda: (play.folder / "pids").exists() and both_wait(play))
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
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
    process.communicate(timeout=20)
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
    ("arguments", "environment", "says"),
    [
        ([], {}, "--config=configs/NAME.py"),
        (["--config=x"], {"SLURM_JOB_ID": ""}, "not inside a job"),
        (["--config=x"], {"SLURM_GPUS_ON_NODE": ""}, "--gpus-per-node"),
        (["--config=x"], {"PYTHON": "/nowhere"}, "no interpreter '/nowhere'"),
    ],
)
def test_slurm_refuses(slurm, arguments, environment, says):
    refused(sbatch(slurm, *arguments, **environment), says)


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


def test_slurm_says_when_it_cannot_be_queued_again(slurm):
    slurm.exits("75")
    process = sbatch(slurm, *RUN, SCONTROL="1")
    assert process.returncode == 75 and "the same sbatch command resumes" in process.stderr


def test_slurm_passes_the_signal_to_the_tasks(slurm):
    slurm.exits("hang")
    process = slurm.start("bash", LAUNCH / "slurm.sbatch", *RUN)
    assert wait_for(lambda: (slurm.folder / "srun").exists())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert (slurm.folder / "scancel").read_text() == "--signal=TERM 7\n"
    assert requeued(slurm) == ["requeue 7"]


# ---- tpu_run.sh


class Cloud(Play):
    """A checkout of its own, the stand-in of gcloud, and folders as workers."""

    where = ("--name=pod", "--zone=us-west4-a")

    def __init__(self, folder):
        super().__init__(folder)
        script(self.bin / "gcloud", f'exec {sys.executable} -I -S {DATA / "gcloud.py"} "$@"')
        shutil.copy(DATA / "program.sh", self.bin / "python3")
        self.environment |= {"CLOUD": str(folder), "GIT_CONFIG_GLOBAL": "/dev/null"}
        self.checkout = folder / "checkout"
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / "configs").mkdir()
        (self.checkout / "configs" / "digits.py").write_text("")
        for line in ("init -q", "add .", "-c user.name=x -c user.email=x@y commit -q -m x"):
            subprocess.run(["git", "-C", self.checkout, *line.split()], check=True)
        self.scenario()

    def scenario(self, **entries):
        (self.folder / "scenario.json").write_text(json.dumps(entries))

    def command(self, *options, arguments=RUN):
        script = self.checkout / "launch" / "tpu_run.sh"
        return [script, *self.where, "--type=v5litepod-16", *options, "--", *arguments]

    def launch(self, *options, **environment):
        return self.run(*self.command(*options), **environment)

    def manage(self, option):
        return self.run(self.checkout / "launch" / "tpu_run.sh", *self.where, option)

    def calls(self, *verbs):
        """What was called, in short: the verb, for ssh also what the worker was told."""
        path = self.folder / "calls.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = []
        for words in map(json.loads, lines):
            told = [word for word in words if word.startswith("--command=")]
            verb = told[0].split("tpu_worker.sh ")[-1].split()[0] if told else words[3]
            if verb in verbs:
                found.append(words)
        return found

    def count(self, verb):
        return len(self.calls(verb))


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for path in tmp_path.glob("worker-*/structvit_run/pid"):
        if not (path.parent / "exit").exists():
            os.killpg(int(path.read_text()), signal.SIGKILL)


CONFIG = RUN[:1]


@pytest.mark.parametrize(
    ("options", "arguments", "says"),
    [
        (["--name=Pod"], RUN, "--name is 1 to 63 small letters"),
        (["--zone=west"], RUN, "--zone is a zone"),
        (["--type=v9-8"], RUN, "--type is v2-N"),
        (["--type=v5e-8"], RUN, "--type v5e-8 is called v5litepod-8"),
        (["--type=v4-12"], RUN, "N is a multiple of 8"),
        (["--restarts=many"], RUN, "--restarts is a whole number"),
        (["--runtime"], RUN, "--runtime needs a value"),
        (["--config=x"], RUN, "unknown option '--config'"),
        ([], RUN[1:], "say which configuration"),
        ([], ["--config=configs/mine.py"], "configs/mine.py is not in the commit to copy"),
        ([], CONFIG, "v5litepod-16 has 4 hosts that share no disk"),
        (["--type=v4-16"], CONFIG, "v4-16 has 2 hosts"),
        (["--type=v5p-32"], [*CONFIG, "--workdir=runs/x"], "v5p-32 has 4 hosts"),
    ],
)
def test_tpu_refuses(cloud, options, arguments, says):
    refused(cloud.run(*cloud.command(*options, arguments=arguments)), says)
    assert not cloud.calls("create", "describe", "ssh")


def test_tpu_needs_gcloud(cloud):
    (cloud.bin / "gcloud").unlink()
    for tool in ("bash", "dirname", "git", "sed", "env"):
        (cloud.bin / tool).symlink_to(shutil.which(tool))
    refused(cloud.launch(PATH=str(cloud.bin)), "no gcloud on PATH")


@pytest.mark.parametrize(
    ("kind", "runtime"),
    [
        ("v3-8", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-4", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-8", "v2-alpha-tpuv6e"),
    ],
)
def test_tpu_dry_run_of_one_host(cloud, kind, runtime):
    process = cloud.run(*cloud.command("--dry-run", f"--type={kind}", arguments=CONFIG))
    assert process.returncode == 0 and "the checkpoints are lost with the TPU" in process.stderr
    assert f"--runtime-version={runtime}" in process.stdout


def test_tpu_dry_run(cloud):
    (cloud.checkout / "configs" / "digits.py").write_text("changed")
    process = cloud.launch(
        "--dry-run", "--spot", "--project=p", "--service-account=a@p", "--delete-when-done"
    )
    assert process.returncode == 0 and "uncommitted changes are not copied" in process.stderr
    assert not cloud.calls("describe", "create", "start")
    archive, *lines = map(shlex.split, process.stdout.splitlines())
    assert archive[0] == "git" and "archive" in archive
    assert all(line[:3] == ["gcloud", "compute", "tpus"] and "--project=p" in line for line in lines)
    (create,) = (line for line in lines if "create" in line)
    assert {"--spot", "--service-account=a@p", "--accelerator-type=v5litepod-16", "--node-id=pod"} < set(
        create
    )
    told = [shlex.split(w.removeprefix("--command=")) for line in lines for w in line if "--command=" in w]
    (start,) = (words for words in told if "start" in words)
    assert start[-len(RUN) :] == RUN, "what the worker's shell reads is what was given here"
    assert "delete" in lines[-1]


def test_tpu_from_nothing_to_the_end(cloud):
    cloud.scenario(states=[["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]])
    process = cloud.launch("--setup=touch here")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("process 0, start 1") == 1
    for said in ("WAITING_FOR_RESOURCES", "PROVISIONING", "READY", "complete", "goes on costing"):
        assert said in process.stderr
    order = [words[3] for words in cloud.calls("create", "scp")] + [
        w[3] for w in cloud.calls("install", "start")
    ]
    assert order == ["create", "scp", "ssh", "ssh"]
    assert "--spot" not in cloud.calls("create")[0] and not cloud.count("delete")
    for i in (0, 1):
        ((arguments, environment),) = cloud.started(i)
        assert arguments == f"-m {MAIN} {' '.join(RUN)}"
        assert not environment, "JAX finds the other workers by itself"
        assert (cloud.folder / f"worker-{i}" / "here").exists()
    assert cloud.nothing_is_left()


def test_tpu_takes_the_one_that_is_there_and_restarts_on_it(cloud):
    cloud.exits("0", "75", "1", "0")
    assert cloud.launch().returncode == 0
    process = cloud.launch("--delete-when-done")
    assert process.returncode == 0, process.stderr
    assert (cloud.count("create"), cloud.count("scp"), cloud.count("start")) == (1, 2, 4)
    assert "exit code 75" in process.stderr and "exit code 1" in process.stderr
    assert process.stdout.count("process 0, start 2") == process.stdout.count("process 0, start 3") == 1
    assert cloud.count("delete") == 1


def test_tpu_of_another_type_is_not_taken(cloud):
    assert cloud.launch().returncode == 0
    process = cloud.launch("--type=v5litepod-32")
    assert process.returncode == 2 and "pod is there as v5litepod-16, not v5litepod-32" in process.stderr
    assert cloud.count("start") == 1


def test_tpu_resumes_after_a_preemption(cloud):
    cloud.exits("hang", "0")
    cloud.scenario(preempt=[3, 0])
    process = cloud.launch("--spot", "--create-flag=--reserved")
    assert process.returncode == 0, process.stderr
    assert "the TPU is gone" in process.stderr and "resuming (1 of 10)" in process.stderr
    first, second = cloud.calls("create")
    assert first == second and {"--spot", "--reserved"} < set(first)
    first, second = cloud.calls("start")
    assert first == second
    assert (cloud.count("delete"), cloud.count("scp")) == (1, 2)
    assert [arguments for arguments, _ in cloud.started()] == [f"-m {MAIN} {' '.join(RUN)}"] * 2


def test_tpu_of_a_request_that_was_suspended_or_failed_before(cloud):
    cloud.scenario(states=[["PROVISIONING", "FAILED"], ["SUSPENDED"], ["ACTIVE"]])
    process = cloud.launch()
    assert process.returncode == 0, process.stderr
    assert "reason: no capacity" in process.stderr
    assert (cloud.count("create"), cloud.count("delete"), cloud.count("start")) == (3, 2, 1)


def test_tpu_runs_out_of_restarts(cloud):
    cloud.exits("75", "75", "75")
    process = cloud.launch("--restarts=1")
    assert process.returncode == 75 and "no restarts left; the same command resumes" in process.stderr
    assert cloud.count("start") == 2


@pytest.mark.parametrize("other", ["2", "hang"])
def test_tpu_mistakes_are_not_retried(cloud, other):
    """Also not if worker 0 has only lost the one that was mistaken; one that hangs is stopped."""
    cloud.exits("2" if other == "hang" else "75", process=0)
    cloud.exits(other, process=1)
    process = cloud.run(*cloud.command(), TPU_RUN_STOP_SECONDS="1")
    assert process.returncode == 2 and "a person has to mend something" in process.stderr
    assert "process 0, start 1" in process.stdout
    assert cloud.count("start") == 1
    assert cloud.nothing_is_left()


def test_tpu_that_cannot_be_requested(cloud):
    cloud.scenario(creates=[1, 1, 1])
    process = cloud.launch()
    assert process.returncode == 1
    assert "quota exceeded" in process.stderr and "could not be requested" in process.stderr
    assert (cloud.count("create"), cloud.count("start")) == (3, 0)


def test_tpu_lost_connections_are_tried_again(cloud):
    cloud.scenario(creates=[1], ssh=[255, 0, 255, 255, 0, 255, 1])
    process = cloud.launch()
    assert process.returncode == 0, process.stderr
    assert "connection closed" in process.stderr
    assert cloud.count("create") == 2 and len(cloud.started()) == 1


def test_tpu_gives_up_when_nobody_answers(cloud):
    cloud.scenario(ssh=[0, 0, 0, *[255] * 9])
    process = cloud.launch()
    assert process.returncode == 1 and "worker 0 does not answer; the run may go on" in process.stderr
    assert not cloud.count("delete")


def test_tpu_run_goes_on_without_the_command(cloud):
    cloud.exits("hang")
    process = cloud.start(*cloud.command())
    assert wait_for(lambda: cloud.count("log") > 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert "the run goes on without this command" in err

    other = cloud.run(*cloud.command(arguments=[*RUN, "--config.train.seed=1"]))
    assert other.returncode == 2 and "the TPU runs another command" in other.stderr
    assert cloud.manage("--status").stdout.count("@ running") == 2
    assert "process 0, start 1" in cloud.manage("--logs").stdout

    process = cloud.start(*cloud.command("--restarts=0"))
    before = cloud.count("log")
    assert wait_for(lambda: cloud.count("log") > before + 1)
    assert cloud.manage("--stop").stdout.count("@ exited 75") == 2
    out, err = process.communicate(timeout=20)
    assert process.returncode == 75, err
    assert "process 0, start 1" in out and "saved" in out
    assert len(cloud.started()) == 1 and cloud.count("install") == 1

    assert cloud.manage("--delete").returncode == 0
    assert "request: MISSING" in cloud.manage("--status").stdout
