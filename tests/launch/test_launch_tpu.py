"""launch/tpu_run.sh against a stand-in of gcloud: calls recorded, failures and preemptions played."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from play import DATA, LAUNCH, MAIN, RUN, Play, refused, script, wait_for


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
    ("options", "arguments", "message"),
    [
        (["--name=Pod"], RUN, "--name must be 1 to 63 lower-case letters"),
        (["--zone=west"], RUN, "--zone must be a zone"),
        (["--type=v9-8"], RUN, "--type must be v2-N"),
        (["--type=v5e-8"], RUN, "--type v5e-8 is named v5litepod-8"),
        (["--type=v4-12"], RUN, "N must be a multiple of 8"),
        (["--restarts=many"], RUN, "--restarts must be a number"),
        (["--runtime"], RUN, "--runtime needs a value"),
        (["--config=x"], RUN, "unknown option '--config'"),
        ([], RUN[1:], "no configuration"),
        ([], ["--config=configs/mine.py"], "configs/mine.py is not in the commit to copy"),
        ([], CONFIG, "v5litepod-16 has 4 hosts that share no disk"),
        (["--type=v4-16"], CONFIG, "v4-16 has 2 hosts"),
        (["--type=v5p-32"], [*CONFIG, "--workdir=runs/x"], "v5p-32 has 4 hosts"),
    ],
)
def test_tpu_refuses(cloud, options, arguments, message):
    refused(cloud.run(*cloud.command(*options, arguments=arguments)), message)
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
    for text in ("WAITING_FOR_RESOURCES", "PROVISIONING", "READY", "complete", "continues to cost"):
        assert text in process.stderr
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
    assert process.returncode == 2 and "pod exists as v5litepod-16, not v5litepod-32" in process.stderr
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
def test_tpu_user_errors_are_not_retried(cloud, other):
    """Also if worker 0 has only lost the worker that exits with 2; a worker that hangs is stopped."""
    cloud.exits("2" if other == "hang" else "75", process=0)
    cloud.exits(other, process=1)
    process = cloud.run(*cloud.command(), TPU_RUN_STOP_SECONDS="1")
    assert process.returncode == 2 and "manual intervention is required" in process.stderr
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
    assert process.returncode == 1 and "worker 0 does not answer; the run may continue" in process.stderr
    assert not cloud.count("delete")


def test_tpu_run_continues_without_the_command(cloud):
    cloud.exits("hang")
    process = cloud.start(*cloud.command())
    assert wait_for(lambda: cloud.count("log") > 3)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=20)
    assert "the run continues without this command" in err

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
