#!/usr/bin/env bash
# Run structvit_jax on a Cloud TPU: create the TPU or take the one of that name, copy the commit that is checked
# out, install it, start it on every worker, show worker 0's output, and resume after preemptions.
#
#   launch/tpu_run.sh --name NAME --zone ZONE --type v5litepod-16 [options] -- --config=configs/NAME.py
#       --workdir=gs://BUCKET/PATH [--config.a.b=v ...]
#   launch/tpu_run.sh --name NAME --zone ZONE --status | --logs | --stop | --delete
#
#   --runtime VERSION      TPU software version (by default that of the type)
#   --project P            cloud project (by default gcloud's)
#   --spot                 a cheaper TPU that may be preempted at any time
#   --service-account A    account of the workers, for access to the bucket
#   --create-flag FLAG     another flag for "queued-resources create", as --reserved; may be repeated
#   --setup COMMAND        command that each worker runs after installing, such as copying data from a bucket
#   --restarts K           number of restarts after a preemption, an interruption or a crash (10)
#   --keep                 keep the TPU after the run; it continues to cost (the default)
#   --delete-when-done     delete the TPU after the run
#   --dry-run              print the commands without running them
#
# The run does not need this command: it continues after Ctrl-C or a lost connection, and the same command
# follows it again. Exit code: 0 complete, 2 manual intervention is required, 75 out of restarts, else a failure.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
poll=${TPU_RUN_POLL_SECONDS:-30}
tries=${TPU_RUN_TRIES:-40} # failures in a row while the TPU exists
stop=${TPU_RUN_STOP_SECONDS:-60} # for the other workers to end after worker 0
worker='bash structvit_run/code/launch/tpu_worker.sh'

fail() {
  echo "error: $*" >&2
  exit 2
}

say() { echo "tpu_run.sh: $*" >&2; }

# shellcheck source=launch/tpu_cloud.sh
source "$root/launch/tpu_cloud.sh"

parse() {
  name='' zone='' type='' runtime='' project='' account='' setup='' restarts=10 action=run
  dry_run='' delete_when_done='' create_flags=() arguments=()
  while (($#)); do
    case $1 in
      -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p;}' "$0" && exit 0 ;;
      --spot) create_flags+=(--spot) && shift ;;
      --keep) delete_when_done='' && shift ;;
      --delete-when-done) delete_when_done=yes && shift ;;
      --dry-run) dry_run=yes && shift ;;
      --status | --logs | --stop | --delete) action=${1#--} && shift ;;
      --) shift && arguments=("$@") && break ;;
      --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;;
      --name | --zone | --type | --runtime | --project | --service-account | --create-flag | --setup | --restarts)
        (($# > 1)) && [[ $2 && $2 != -- ]] || fail "$1 needs a value"
        case $1 in
          --service-account) account=$2 ;;
          --create-flag) create_flags+=("$2") ;;
          *) printf -v "${1#--}" %s "$2" ;;
        esac
        shift 2
        ;;
      *) fail "unknown option '$1'; put arguments of the program after --" ;;
    esac
  done
  [[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
    fail "--name must be 1 to 63 lower-case letters, digits and dashes, starting with a letter, not '$name'"
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-[a-z]$ ]] || fail "--zone must be a zone such as us-west4-a, not '$zone'"
  where=(--zone="$zone" ${project:+--project="$project"} --quiet)
  [[ $dry_run ]] || command -v gcloud >/dev/null || fail "no gcloud on PATH; install the Google Cloud CLI"
  [[ $action != run ]] || check_run
}

check_run() {
  local word config='' workdir='' hosts
  [[ $restarts =~ ^[0-9]+$ ]] || fail "--restarts must be a number, not '$restarts'"
  find_hosts
  for word in ${arguments[@]+"${arguments[@]}"}; do
    case $word in
      --config=*) config=${word#*=} ;;
      --workdir=*) workdir=${word#*=} ;;
    esac
  done
  config=${config%%:*} # without the configuration's argument
  [[ $config ]] || fail "no configuration; add -- --config=configs/NAME.py --workdir=gs://BUCKET/PATH"
  commit=$(git -C "$root" rev-parse --short HEAD) || fail "$root is not a git checkout, so there is no commit to copy"
  git -C "$root" cat-file -e "HEAD:$config" 2>/dev/null || fail "$config is not in the commit to copy; commit it first"
  git -C "$root" diff --quiet HEAD || say "warning: uncommitted changes are not copied; $commit runs without them"
  if [[ $workdir != gs://* ]]; then
    ((hosts == 1)) || fail "$type has $hosts hosts that share no disk; add --workdir=gs://BUCKET/PATH"
    say "warning: without --workdir=gs://BUCKET/PATH the checkpoints are lost with the TPU"
  fi
}

# Store the type's number of hosts and default software version. v2 to v4 and v5p count cores, two per chip.
find_hosts() {
  local usual size=${type##*-}
  case $type in
    v2-* | v3-* | v4-*) usual=tpu-ubuntu2204-base ;;
    v5p-*) usual=v2-alpha-tpuv5 ;;
    v5litepod-*) usual=v2-alpha-tpuv5-lite ;;
    v6e-*) usual=v2-alpha-tpuv6e ;;
    v5e-*) fail "--type $type is named v5litepod-$size" ;;
    *) usual='' ;;
  esac
  [[ $usual && ${type%-*} != *-* && $size =~ ^[1-9][0-9]{0,4}$ ]] ||
    fail "--type must be v2-N, v3-N, v4-N, v5litepod-N, v5p-N or v6e-N, not '$type'"
  case $type in
    v5litepod-[14] | v6e-[14]) hosts=1 ;;
    *) ((size % 8 == 0)) || fail "--type $type: N must be a multiple of 8 (or 1 or 4 for v5litepod and v6e)" ;;&
    v5litepod-* | v6e-*) hosts=$((size == 8 ? 1 : size / 4)) ;; # one host has 8 chips; of several, each has 4
    *) hosts=$((size / 8)) ;;
  esac
  runtime=${runtime:-$usual}
}

# End the run with exit code $1.
finish() {
  say "$2"
  if [[ $delete_when_done ]]; then
    remove
  else
    say "the TPU $name is kept and continues to cost; --delete deletes it"
  fi
  exit "$1"
}

# Show worker 0's output to its end, then store the exit codes of all in $codes; fail if the TPU is gone.
follow() {
  local misses=0 answer last=''
  while :; do
    if answer=$(remote 0 "$worker log $from") && last=${answer##*$'\n'} && [[ $last == '@ '* ]]; then
      misses=0
      printf %s "${answer%"$last"}"
      from=$((${last##* } + 1))
      [[ $last == '@ running'* ]] || break
    else
      [[ $(tpu_state) != GONE ]] || return 1
      ((++misses < tries)) || leave "worker 0 does not answer; the run may continue"
    fi
    sleep "$poll"
  done
  # The others end soon after; the exit code of one of them may be the reason.
  answer=$(remote all "$worker stop $stop") || true
  codes=$(grep '^@ ' <<<"$last"$'\n'"$answer" | cut -d ' ' -f 2,3)
}

# Run once, from the TPU to the end of the program; store "gone" or an exit code in $outcome.
attempt() {
  outcome=gone
  ensure || return 0
  insist look || return 0
  # Do not replace the code of a running program, or before a restart on the same machines.
  if ! grep -q '^@ running' "$tmp/look" && { [[ ! $deployed ]] || grep -q '^@ none' "$tmp/look"; }; then
    insist copy || return 0
    tries=3 insist install || return 0
  fi
  deployed=yes
  insist start || return 0
  follow || return 0
  if grep -qx 'exited 2' <<<"$codes"; then
    outcome=2
  elif grep -qxE 'exited 75|lost.*|none.*' <<<"$codes"; then
    outcome=75
  else
    outcome=$(sed -n '/^exited 0$/!s/^exited //p' <<<"$codes" | head -n 1)
    outcome=${outcome:-0}
  fi
}

show_plan() {
  cloud queued-resources describe "$name" --format='value(state.state)'
  create
  cloud tpu-vm describe "$name" --format='value(state)'
  copy
  install
  start
  remote 0 "$worker log 0"
  remote all "$worker stop $stop"
  [[ ! $delete_when_done ]] || remove
}

run_to_the_end() {
  local restart
  deployed='' codes='' from=0
  run git -C "$root" archive --format=tar.gz --output="$tmp/code.tar.gz" "$commit"
  if [[ $dry_run ]]; then show_plan && return; fi
  trap 'say "the run continues without this command; the same command follows it again" && exit 130' INT TERM
  for ((restart = 0; ; restart++)); do
    attempt
    case $outcome in
      0) finish 0 "complete" ;;
      2) finish 2 "manual intervention is required (see above); not retried" ;;
      gone) say "the TPU is gone" && deployed='' from=0 ;;
      *) say "the program ended with exit code $outcome" ;;
    esac
    if ((restart >= restarts)); then
      [[ $outcome != gone ]] || outcome=75
      finish "$outcome" "no restarts left; the same command resumes"
    fi
    say "resuming ($((restart + 1)) of $restarts)"
    sleep "$poll"
  done
}

parse "$@"
exec 3>&1
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
case $action in
  run) run_to_the_end ;;
  status)
    echo "request: $(describe queued-resources state.state)"
    echo "machines: $(describe tpu-vm state)"
    [[ $(tpu_state) != READY ]] || remote all "$worker log 1000000000"
    ;;
  logs) remote 0 "tail -n 100 structvit_run/log" ;;
  stop) remote all "$worker stop 0" ;;
  delete)
    if [[ $dry_run || $(tpu_state) == READY ]]; then
      remote all "$worker stop 0" || say "could not ask the program to save first"
    fi
    remove
    ;;
esac
