# The cloud functions of launch/tpu_run.sh, which sources this file: calls of gcloud and their retries. Variables
# are the options and settings of that script.
# shellcheck shell=bash disable=SC2154

# Run a command; a dry run only prints it.
run() {
  local line
  if [[ $dry_run ]]; then
    printf -v line ' %q' "$@"
    echo "${line# }" >&3
  else
    "$@"
  fi
}

cloud() { run gcloud compute tpus "$@" "${where[@]}"; }

# Run a command on worker $1, or on all. gcloud's messages are shown only if it fails.
remote() {
  local result
  cloud tpu-vm ssh "$name" --worker="$1" --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30 \
    --command="$2" </dev/null 2>"$tmp/ssh" && return || result=$?
  tail -n 5 "$tmp/ssh" >&2
  return "$result"
}

# Print a value of a description; MISSING if there is none, UNKNOWN if the call fails.
describe() {
  local value
  if value=$(cloud "$1" describe "$name" --format="value($2)" 2>"$tmp/describe"); then
    echo "${value:-UNKNOWN}"
  elif grep -q NOT_FOUND "$tmp/describe"; then
    echo MISSING
  else
    tail -n 2 "$tmp/describe" >&2
    echo UNKNOWN
  fi
}

# Print READY, GONE, or the state to wait in. The request may stay ACTIVE after its machines are gone.
tpu_state() {
  local state
  state=$(describe queued-resources state.state)
  [[ $state != ACTIVE ]] || state=$(describe tpu-vm state)
  case $state in
    FAILED | SUSPENDING | SUSPENDED | DELETING | MISSING | PREEMPTED | TERMINATED | STOPPING | STOPPED) echo GONE ;;
    *) echo "$state" ;;
  esac
}

# Run a command until it succeeds; fail only if the TPU is gone. Exit code 2 is an error that retries do not fix.
insist() {
  local try result
  for ((try = 1; ; try++)); do
    "$@" && return 0 || result=$?
    ((result != 2)) || exit 2
    [[ $(tpu_state) != GONE ]] || return 1
    ((try < tries)) || leave "'$1' failed $try times"
    sleep "$poll"
  done
}

create() {
  cloud queued-resources create "$name" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${account:+--service-account="$account"} ${create_flags[@]+"${create_flags[@]}"}
}

# Deleting is refused in some states, such as while the service removes the machines.
remove() {
  local try
  for ((try = 1; try <= tries; try++)); do
    [[ $(describe queued-resources state.state) != MISSING ]] || return 0
    cloud queued-resources delete "$name" --force || sleep "$poll"
    [[ ! $dry_run ]] || return 0
  done
  leave "$name could not be deleted"
}

# End this command, not the run.
leave() {
  say "$1; the TPU $name may still exist and cost: --status shows it, --delete deletes it"
  exit 1
}

# Wait for a TPU that answers; fail if none was granted or it was preempted at once.
ensure() {
  local state last='' unknown=0 try
  if [[ $(tpu_state) == GONE ]]; then
    remove # its remains hold the name and count against the quota
    for ((try = 1; ; try++)); do
      create && break
      [[ $(describe queued-resources state.state) == MISSING ]] || break # it was created nevertheless
      ((try < 3)) || leave "the TPU could not be requested (see above)"
      sleep "$poll"
    done
  fi
  while :; do
    state=$(tpu_state)
    [[ $state == "$last" ]] || say "$name: $state"
    last=$state
    case $state in
      READY) check_type && return ;;
      GONE) say "reason: $(describe queued-resources state.failedData.error.message)" && return 1 ;;
      UNKNOWN) ((++unknown < tries)) || leave "the cloud does not return the state of $name" ;;
      *) unknown=0 ;;
    esac
    sleep "$poll"
  done
}

check_type() {
  local found
  found=$(describe tpu-vm acceleratorType)
  [[ $found == "$type" || $found == UNKNOWN ]] || fail "$name exists as $found, not $type; choose another --name"
}

copy() { cloud tpu-vm scp "$tmp/code.tar.gz" "$name:structvit_run.tar.gz" --worker=all; }

install() {
  local unpack='rm -rf structvit_run/code && mkdir -p structvit_run/code &&'
  unpack+=' tar -xzf structvit_run.tar.gz -C structvit_run/code'
  remote all "$unpack && $worker install${setup:+ && ($setup)}"
}

start() {
  local line
  printf -v line ' %q' "$commit" "${arguments[@]}"
  remote all "$worker start$line"
}

# Store the states of all workers. After repairs, worker 0 may be there and another one be new.
look() {
  remote all "if test -e structvit_run/command; then $worker log 1000000000; else echo '@ none'; fi" >"$tmp/look"
}
