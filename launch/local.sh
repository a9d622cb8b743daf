#!/usr/bin/env bash
# Run structvit_jax as several processes on one machine, on its GPUs or to simulate a cluster.
#
#   launch/local.sh [options] -- --config=configs/NAME.py [--workdir=DIR] [--config.a.b=v ...]
#
#   --processes N     number of processes (2)
#   --cpu-devices M   run on the CPU, each process with M devices; by default GPUs are distributed evenly
#   --restarts K      restart all processes after a crash or an interruption, at most K times (0)
#   --logs DIR        folder for the output of processes 1, 2, ...; that of 0 is shown (runs/local)
#   --dry-run         print the commands without running them
#
# Exit code: 0 complete; 2 manual intervention is required; 75 stopped or interrupted: the same command resumes;
# else the first failing one. SIGTERM and SIGINT are passed on as SIGTERM, and the processes save; a third signal
# kills them. PYTHON names the interpreter.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll=${LOCAL_POLL_SECONDS:-1}    # between checks of the processes
grace=${LOCAL_GRACE_SECONDS:-60} # for the others to end after a failure, and again after SIGTERM

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
      *) fail "unknown option '$1'; put arguments of the program after --" ;;
    esac
  done
  [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--processes must be a positive integer, not '$processes'"
  [[ $cpu_devices =~ ^([1-9][0-9]*)?$ ]] || fail "--cpu-devices must be a positive integer, not '$cpu_devices'"
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts must be a number, not '$restarts'"
  (($#)) || fail "nothing to run; add -- --config=configs/NAME.py"
  arguments=("$@")
}

find_python() {
  python=${PYTHON:-$root/.venv/bin/python}
  [[ ${PYTHON:-} || -x $python ]] || python=python3
  command -v "$python" >/dev/null || fail "no interpreter '$python'; make run sets one up, PYTHON names another"
}

# Store the GPUs to distribute in the array gpus; none with --cpu-devices.
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
    fail "${#gpus[@]} GPUs are not divisible by $processes processes; change --processes"
}

# Find a port on which nothing listens, below those of outgoing connections.
find_port() {
  local try
  for ((try = 0; try < 100; try++)); do
    port=$((10000 + RANDOM % 20000))
    (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 0
  done
  fail "found no free port on 127.0.0.1"
}

# Store the command of process $1 in the array command.
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

# Each process leads its own session: Ctrl-C reaches it only through this script, and processes that it leaves
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
    ((!stops)) || signal_all TERM # the signal came before the process was listed
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

# Wait for all; the first failure starts the timeout of the others.
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
      kill -KILL -- "-${pids[i]}" 2>/dev/null || true # its helpers, if any are left
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

# Store one exit code for all in the variable verdict. Processes that this script killed do not count.
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
mkdir -p "$logs" || fail "cannot create the folder '$logs' for logs"
stops=0 pids=() codes=() forced=()
trap on_stop TERM INT HUP
trap 'signal_all KILL' EXIT # leave no process behind, whatever ends this script
for ((attempt = 0; ; attempt++)); do
  start_all
  watch_all
  judge
  ((verdict != 0 && verdict != 2 && !stops && attempt < restarts)) || exit "$verdict"
  say "restarting all processes ($((attempt + 1)) of $restarts)"
done
