"""Stands in for gcloud: records every call and plays a scenario; workers are folders of this machine.

The folder $CLOUD holds scenario.json, calls.jsonl (what was called) and state.json (what is there now). The
scenario may have, each with a default:

    type        the accelerator type
    hosts       how many workers
    states      for each TPU that is made, what "describe" says of the request, call by call
    creates     exit codes of the calls to "create"
    ssh         exit codes of the calls to "ssh"
    preempt     for each TPU that is made, the look at its log at which it is taken away; 0 for never
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ["CLOUD"])


def main(words):
    scenario = {
        "type": "v5litepod-16",
        "hosts": 2,
        "states": [["ACTIVE"]],
        "creates": [],
        "ssh": [],
        "preempt": [],
    } | json.loads((CLOUD / "scenario.json").read_text())
    path = CLOUD / "state.json"
    state = {"lives": 0, "there": False, "described": 0, "looks": 0, "gone": False, "creates": 0, "ssh": 0}
    if path.exists():
        state = json.loads(path.read_text())
    with (CLOUD / "calls.jsonl").open("a") as file:
        file.write(json.dumps(words) + "\n")
    assert words[:2] == ["compute", "tpus"] and "--quiet" in words, words
    options = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
    try:
        return globals()[f"{words[2]}_{words[3]}".replace("-", "_")](scenario, state, options, words)
    finally:
        path.write_text(json.dumps(state))


def take(scenario, state, key):
    """The next exit code of a list, 0 after its end."""
    state[key] += 1
    return (scenario[key][state[key] - 1 :] or [0])[0]


def of_this_life(scenario, state, key, default):
    entries = scenario[key]
    return entries[min(state["lives"], len(entries)) - 1] if entries else default


def error(text, code=1):
    print(f"ERROR: (gcloud) {text}", file=sys.stderr)
    return code


def queued_resources_describe(scenario, state, options, words):
    if not state["there"]:
        return error("NOT_FOUND: Resource was not found.")
    if "failedData" in options["format"]:
        print("no capacity")
        return 0
    states = of_this_life(scenario, state, "states", ["ACTIVE"])
    print("SUSPENDED" if state["gone"] else states[min(state["described"], len(states) - 1)])
    state["described"] += 1
    return 0


def tpu_vm_describe(scenario, state, options, words):
    if not state["there"]:
        return error("NOT_FOUND: Resource was not found.")
    node = "PREEMPTED" if state["gone"] else "READY"
    print(scenario["type"] if "acceleratorType" in options["format"] else node)
    return 0


def queued_resources_create(scenario, state, options, words):
    if code := take(scenario, state, "creates"):
        return error("quota exceeded", code)
    if state["there"]:
        return error("ALREADY_EXISTS")
    state.update(there=True, gone=False, described=0, looks=0, lives=state["lives"] + 1)
    for home in homes(scenario):
        home.mkdir()
    return 0


def homes(scenario):
    return [CLOUD / f"worker-{i}" for i in range(scenario["hosts"])]


def switch_off(scenario):
    for home in homes(scenario):
        pid = home / "structvit_run" / "pid"
        if pid.exists() and not (pid.parent / "exit").exists():
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        shutil.rmtree(home, ignore_errors=True)


def queued_resources_delete(scenario, state, options, words):
    assert "--force" in words
    if not state["there"]:
        return error("NOT_FOUND")
    switch_off(scenario)
    state.update(there=False)
    return 0


def tpu_vm_scp(scenario, state, options, words):
    source, (_, name) = words[4], words[5].split(":")
    for home in homes(scenario):
        shutil.copy(source, home / name)
    return 0


def tpu_vm_ssh(scenario, state, options, words):
    if code := take(scenario, state, "ssh"):
        return error("connection closed", code)
    if not state["there"] or state["gone"]:
        return error("the TPU is not READY")
    if "tpu_worker.sh log " in options["command"] and options["worker"] == "0":
        state["looks"] += 1
        if state["looks"] == of_this_life(scenario, state, "preempt", 0):
            state["gone"] = True
            switch_off(scenario)
            return error("connection closed", 255)
    codes = []
    for i, home in enumerate(homes(scenario)):
        if options["worker"] in ("all", str(i)):
            environment = os.environ | {"HOME": str(home), "WORKER": str(i)}
            command = ["bash", "-c", options["command"]]
            codes.append(subprocess.run(command, cwd=home, env=environment).returncode)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
