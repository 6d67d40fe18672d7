#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice, one process per host, and restarts them after a crash.
#
#   launch/tpu_vm.sh [--dry-run] NAME ZONE --config=configs/medium.py --workdir=/mnt/shared/medium
#
# FOLDER (default smallcoder_jax, in the home directory of every host) is the project; PYTHON (default python3) has it
# installed with the extra [tpu]. The run folder has to be on a file system that all hosts share. jax finds the hosts by
# the metadata of the slice (--coordinator=auto). Each host restarts its own process, at most RETRIES times (default 3):
# when one process dies, the others end within half a minute, and --pause lets all end before any starts again.
set -u
dry=
if [ "${1:-}" = --dry-run ]; then
  dry=1
  shift
fi
if [ $# -lt 3 ]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0"
  exit 2
fi
name=$1
zone=$2
shift 2
words=("${PYTHON:-python3}" -m launch.local --platform=tpu "--retries=${RETRIES:-3}" --pause=60 -- --coordinator=auto "$@")
remote="cd $(printf '%q' "${FOLDER:-smallcoder_jax}") &&$(printf ' %q' "${words[@]}")"
command=(gcloud compute tpus tpu-vm ssh "$name" "--zone=$zone" --worker=all "--command=$remote")
if [ -n "$dry" ]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
