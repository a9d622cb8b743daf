#!/usr/bin/env bash
# Runs structvit_jax as several processes on one machine, to use its GPUs or to try out a cluster.
#
#   launch/local.sh [options] -- --config=configs/NAME.py [--workdir=DIR] [--config.a.b=v ...]
#
#   --processes N     how many processes (2)
#   --cpu-devices M   run on the CPU, each process with M devices; without it GPUs are shared out evenly
#   --restarts K      start all again after a crash or an interruption, at most K times (0)
#   --logs DIR        where the output of processes 1, 2, ... goes; that of 0 is shown (runs/local)
#   --dry-run         print the commands, run none
#
# Exit code: 0 when complete; 2 when a process says that a person has to mend something; 75 when stopped or
# interrupted, so that the same command resumes; else the first failing one. SIGTERM and SIGINT are passed on
# as SIGTERM, on which the processes save; a third one kills them. PYTHON names the interpreter.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll=${LOCAL_POLL_SECONDS:-1}    # between two looks at the processes
grace=${LOCAL_GRACE_SECONDS:-60} # after a failure: for the others to end by themselves, and again after SIGTERM

fail() {
  echo "error: $*" >&2
  exit 2
}

say() { echo "local.sh: $*" >&2; }

parse() {
  processes=2 cpu_devices='' restarts=0 logs=runs/local dry_run=''
  while (($#)); do
    case $1 in
      -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "$0" && exit 0 ;;
      --dry-run) dry_run=yes && shift ;;
      --) shift && break ;;
      --processes=* | --cpu-devices=* | --restarts=* | --logs=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --processes | --cpu-devices | --restarts | --logs)
        (($# > 1)) && [[ $2 && $2 != -- ]] || fail "$1 needs a value"
        case $1 in
          --processes) processes=$2 ;;
          --cpu-devices) cpu_devices=$2 ;;
          --restarts) restarts=$2 ;;
          --logs) logs=$2 ;;
        esac
        shift 2
        ;;
      *) fail "unknown option '$1'; what is meant for the program comes after --" ;;
    esac
  done
  [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes is a whole number above 0, not '$processes'"
  [[ $cpu_devices =~ ^([1-9][0-9]*)?$ ]] || fail "--cpu-devices is a whole number above 0, not '$cpu_devices'"
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts is a whole number, not '$restarts'"
  (($#)) || fail "nothing to run; say -- --config=configs/NAME.py"
  arguments=("$@")
}

find_python() {
  python=${PYTHON:-$root/.venv/bin/python}
  [[ ${PYTHON:-} || -x $python ]] || python=python3
  command -v "$python" >/dev/null || fail "no interpreter '$python'; make run sets one up, PYTHON names another"
}

# The GPUs to share out, in the array gpus; none with --cpu-devices.
find_gpus() {
  local count
  gpus=()
  [[ ! $cpu_devices ]] || return 0
  if [[ ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  elif command -v nvidia-smi >/dev/null; then
    count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
    for ((i = 0; i < count; i++)); do gpus+=("$i"); done
  fi
  ((${#gpus[@]} % processes == 0)) ||
    fail "${#gpus[@]} GPUs cannot be shared out evenly among $processes processes; change --processes"
}

# A port where nothing listens, below those that the system gives to outgoing connections.
find_port() {
  local try
  for ((try = 0; try < 100; try++)); do
    port=$((10000 + RANDOM % 20000))
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 0
  done
  fail "found no free port on 127.0.0.1"
}

# The whole command of process $1, in the array command.
make_command() {
  local share=$((${#gpus[@]} / processes)) visible
  command=(env "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$1")
  if [[ $cpu_devices ]]; then
    command+=(JAX_PLATFORMS=cpu
      "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$cpu_devices")
  elif ((share)); then
    visible=$(IFS=, && echo "${gpus[*]:$1*share:share}")
    command+=("CUDA_VISIBLE_DEVICES=$visible")
  fi
  command+=("$python" -m structvit_jax.main "${arguments[@]}")
}

# Each process leads a session of its own: Ctrl-C reaches it through this script only, and what it leaves
# behind can be found.
start_all() {
  pids=() codes=() forced=()
  find_port
  for ((i = 0; i < processes && !stops; i++)); do
    make_command "$i"
    if ((i == 0)); then
      setsid "${command[@]}" </dev/null &
    else
      setsid "${command[@]}" </dev/null >>"$logs/process-$i.log" 2>&1 &
    fi
    pids+=($!)
    ((!stops)) || signal_all TERM # the signal came before the process was on the list
  done
}

signal_all() {
  local i
  for i in "${!pids[@]}"; do
    [[ ! ${codes[i]:-} ]] || continue
    if [[ $1 == KILL ]]; then
      forced[i]=yes
      kill -KILL -- "-${pids[i]}" 2>/dev/null || true
    fi
    kill "-$1" "${pids[i]}" 2>/dev/null || true
  done
}

on_stop() {
  ((++stops))
  if ((stops < 3)); then
    say "stopping: the processes save first"
    signal_all TERM
  else
    signal_all KILL
  fi
}

report() {
  local what="exit code $2"
  (($2 <= 128)) || what="killed by SIG$(kill -l $(($2 - 128)))"
  say "process $1 (pid ${pids[$1]}): $what"
  (($1 == 0 || stops)) || tail -n 15 "$logs/process-$1.log" | sed "s/^/  $1| /" >&2
}

# Waits for all; the first failure starts the clock for the others.
watch_all() {
  local ended=0 failed_at='' asked='' code i
  first=0
  while ((ended < ${#pids[@]})); do
    sleep "$poll" || true # Ctrl-C ends it early
    for i in "${!pids[@]}"; do
      if [[ ${codes[i]:-} ]] || kill -0 "${pids[i]}" 2>/dev/null; then continue; fi
      wait "${pids[i]}" && code=0 || code=$?
      codes[i]=$code
      ended=$((ended + 1))
      kill -KILL -- "-${pids[i]}" 2>/dev/null || true # its helpers, should it have left some
      ((code)) || continue
      report "$i" "$code"
      ((first)) || first=$code
      failed_at=${failed_at:-$SECONDS}
    done
    if [[ ! $failed_at ]]; then
      continue
    elif ((SECONDS >= failed_at + 2 * grace)); then
      signal_all KILL
    elif [[ ! $asked ]] && ((!stops && SECONDS >= failed_at + grace)); then
      asked=yes
      signal_all TERM
    fi
  done
}

# One exit code for all, in the variable verdict. What this script killed itself says nothing.
judge() {
  local i
  verdict=$first
  for i in "${!codes[@]}"; do
    if ((codes[i] == 2)); then
      verdict=2
      return
    elif ((codes[i] == 75 || codes[i] > 128)) && [[ ! ${forced[i]:-} ]]; then
      verdict=75
    fi
  done
  ((!stops || ${#pids[@]} == processes)) || verdict=75 # stopped before all were started
}

parse "$@"
find_python
find_gpus
if [[ $dry_run ]]; then
  find_port
  for ((i = 0; i < processes; i++)); do
    make_command "$i"
    printf -v line ' %q' "${command[@]}"
    ((i == 0)) || printf -v line '%s >>%q 2>&1' "$line" "$logs/process-$i.log"
    echo "${line# }"
  done
  exit 0
fi
mkdir -p "$logs" || fail "cannot make the folder of logs '$logs'"
stops=0 pids=() codes=() forced=()
trap on_stop TERM INT HUP
trap 'signal_all KILL' EXIT # nothing is left behind, whatever ends this script
for ((attempt = 0; ; attempt++)); do
  start_all
  watch_all
  judge
  ((verdict != 0 && verdict != 2 && !stops && attempt < restarts)) || exit "$verdict"
  say "starting all again ($((attempt + 1)) of $restarts)"
done
