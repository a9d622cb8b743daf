#!/usr/bin/env bash
# launch/tpu_run.sh runs this script on each worker of a TPU; it is of no other use.
#
#   tpu_worker.sh install             create the environment for the code around this script
#   tpu_worker.sh start LABEL ARGS    run structvit_jax.main in the background; LABEL identifies the code
#   tpu_worker.sh log LINE            print complete lines of its output from LINE on (0: the last 20), then the state
#   tpu_worker.sh stop SECONDS        wait for its end this long, then SIGTERM, then SIGKILL; print the state
#
# The state is one line: "@ none|running|exited|lost CODE LINES". CODE is - unless it exited; LINES is the number
# of lines in the log. Lost: the machine or the process died without an exit code.
set -euo pipefail

code=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
run=$HOME/structvit_run
patience=${TPU_WORKER_PATIENCE:-120} # seconds from SIGTERM to SIGKILL
mkdir -p "$run"

state() {
  local name=none result=-
  if [[ -e $run/exit ]]; then
    name=exited result=$(<"$run/exit")
  elif ! flock --nonblock "$run/lock" true; then
    name=running
  elif [[ -e $run/command ]]; then
    name=lost
  fi
  echo "@ $name $result $(cat "$run/log" 2>/dev/null | wc -l)"
}

# The images' Python is older than 3.11; uv installs a newer one.
install() {
  cd "$code"
  python3 -m uv --version >/dev/null 2>&1 || python3 -m pip install --quiet --user uv ||
    python3 -m pip install --quiet --user --break-system-packages uv
  python3 -m uv venv --quiet --allow-existing --python 3.11 "$run/venv"
  python3 -m uv pip install --quiet --python "$run/venv/bin/python" -c requirements.lock -e ".[tpu,gcs]"
}

start() {
  local command
  printf -v command ' %q' "$@"
  shift
  exec 9>>"$run/lock"
  if ! flock --nonblock 9; then
    [[ $(<"$run/command") != "$command" ]] || return 0 # already running, for example after a lost connection
    echo "error: the TPU runs another command or other code:$(<"$run/command")" >&2
    exit 2
  fi
  rm -f "$run/exit"
  echo "$command" >"$run/command"
  cd "$code"
  # The lock is inherited: it is held until the last process of the program has ended.
  setsid nohup bash "$code/launch/tpu_worker.sh" supervise "$@" >>"$run/log" 2>&1 </dev/null &
  echo $! >"$run/pid"
}

supervise() {
  local child result
  "$run/venv/bin/python" -m structvit_jax.main "$@" &
  child=$!
  trap 'kill -TERM "$child" 2>/dev/null || true' TERM
  while kill -0 "$child" 2>/dev/null; do
    wait "$child" || true # SIGTERM ends wait early
  done
  wait "$child" && result=0 || result=$?
  rm -f /tmp/libtpu_lockfile 2>/dev/null || true # a crash leaves it behind, and it blocks the TPU
  echo "$result" >"$run/exit.new"
  mv "$run/exit.new" "$run/exit"
  kill -KILL 0 # processes that the program left behind, and this shell
}

ended_within() {
  local end=$((SECONDS + $1))
  while [[ $(state) == '@ running'* ]]; do
    ((SECONDS < end)) || return 1
    sleep 0.2
  done
}

stop() {
  if ! ended_within "$1"; then
    kill -TERM "$(<"$run/pid")" || true
    ended_within "$patience" || kill -KILL -- "-$(<"$run/pid")" || true
  fi
  state
}

log() {
  local now total
  now=$(state)
  total=${now##* }
  if (($1 > 0 && $1 <= total)); then
    sed -n "$1,${total}p" "$run/log"
  elif (($1 == 0)) && ((total)); then
    head -n "$total" "$run/log" | tail -n 20
  fi
  echo "$now"
}

"$@"
