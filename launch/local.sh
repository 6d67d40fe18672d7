#!/usr/bin/env bash
# Trains a config on this machine and starts it again after a crash, from its newest checkpoint.
#
#   launch/local.sh configs/nano.py --workdir=runs/nano [--config.key=value ...]
#
# Ends with the trainer's exit code where a second attempt would change nothing: 0 done, 2 a mistake in what was given,
# 3 a check that did not hold, 75 interrupted and saved, 130 Ctrl-C. Anything else (out of memory, a signal) is tried
# again, at most RETRIES times (default 3).
set -u
if [ $# -lt 1 ]; then
  sed -n '2,8s/^# \{0,1\}//p' "$0"
  exit 2
fi
config=$1
shift
# Large pages for what a training step allocates on a CPU (BUILD.md, "It is slow while training").
export GLIBC_TUNABLES="${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}"
for attempt in $(seq 0 "${RETRIES:-3}"); do
  [ "$attempt" -eq 0 ] || echo "launch: attempt $((attempt + 1))" >&2
  code=0
  "${PYTHON:-python}" -m smallcoder_jax.main --config="$config" "$@" || code=$?
  case $code in 0 | 2 | 3 | 75 | 130) exit "$code" ;; esac
  echo "launch: the trainer ended with code $code" >&2
done
exit "$code"
