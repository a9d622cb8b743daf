#!/usr/bin/env bash
# Stands in for "python -m structvit_jax.main" and, as python3 on a worker, for uv. $PLAY holds for process I
# the file exits-I (or exits): what each start does, one a line, the last again: an exit code, or "hang" until
# SIGTERM and then 75, or "deaf" until SIGKILL, or the signal that kills it. It writes down its arguments and
# its environment in started-I.
set -euo pipefail

if [[ $* == '-m uv venv'* ]]; then
  mkdir -p "${*: -1}/bin"
  cp "$0" "${*: -1}/bin/python"
  exit
elif [[ $* == '-m uv '* ]]; then
  exit
fi
id=${JAX_PROCESS_ID:-${WORKER:-0}}
{
  echo "$*"
  env | sed -nE '/^(JAX_|XLA_|CUDA_)/p' | paste -sd ' '
} >>"$PLAY/started-$id"
start=$(($(wc -l <"$PLAY/started-$id") / 2))
exits=$PLAY/exits
[[ ! -e $exits-$id ]] || exits=$exits-$id
does=$(head -n "$start" "$exits" | tail -n 1)
echo "process $id, start $start: $*"
sleep 1000 & # a helper that the program leaves behind
echo "$! $$" >>"$PLAY/pids"
case $does in
  hang) trap 'echo saved; exit 75' TERM ;;
  deaf) trap '' TERM ;;
  [A-Z]*) kill "-$does" $$ ;;
  *) exit "$does" ;;
esac
while :; do sleep 0.05; done
